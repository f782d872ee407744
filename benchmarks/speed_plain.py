"""IMA's step and PGD as their papers print them, every sample in every pass: what ``speed.py`` compares with.

Nothing here is clever on purpose. All samples of a batch go through all K steps and all bisections, whatever became of
them; gradients for the weights are computed along with those for the image; every head of deep supervision is compared
with its target. Noise, Dice, the loss of a sample and the table of margins are those of the package, L2 only.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.losses import Outputs, first
from nnunet_ima.precision import Autocast
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

Loss = Callable[[Outputs, Outputs], Tensor]


class PlainNetwork:
    """Asks a network about a whole batch, as a first version of an attack would.

    Args:
        network: takes images (B, C, *spatial), returns logits or a list of them.
        targets: of the batch.
        loss: one value a sample.
        criterion: what "correct" means.
        autocast: in which the network runs.
    """

    def __init__(
        self, network: nn.Module, targets: Outputs, loss: Loss, criterion: DiceCriterion, autocast: Autocast
    ) -> None:
        self.network, self.targets, self.loss = network, targets, loss
        self.criterion, self.autocast = criterion, autocast
        self.forward_passes = self.backward_passes = 0

    def gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of each sample's loss with respect to its image (B, C, *spatial), and Dice (B,)."""
        images = images.detach().requires_grad_(True)
        with self.autocast():
            outputs = self.network(images)
        # Half precision would lose the gradient of a mean over voxels. Only the direction counts, and a power of two
        # changes no digit.
        loss = self.loss(outputs, self.targets).sum() * 2.0 ** images[0, 0].numel().bit_length()
        torch.autograd.backward(loss)
        assert images.grad is not None
        self.forward_passes += len(images)
        self.backward_passes += len(images)
        return images.grad, self.criterion.dice(first(outputs).detach(), first(self.targets))

    def dice(self, images: Tensor) -> Tensor:
        """Dice (B,)."""
        with torch.no_grad(), self.autocast():
            outputs = self.network(images)
        self.forward_passes += len(images)
        return self.criterion.dice(first(outputs), first(self.targets))


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """(B,) in a shape that broadcasts against the images."""
    return values.reshape(-1, *[1] * (images.ndim - 1))


def length(delta: Tensor) -> Tensor:
    """L2 norm (B,)."""
    return delta.flatten(1).square().sum(1).sqrt()


class Ball(NamedTuple):
    """Where a perturbed image may lie: within ``radius`` (B,) of the clean one, and between ``low`` and ``high``."""

    images: Tensor
    radius: Tensor
    low: Tensor
    high: Tensor

    def project(self, points: Tensor) -> Tensor:
        """Π of Eq. 3, and the range of intensities."""
        delta = points - self.images
        shrink = (self.radius / length(delta).clamp_min(1e-30)).clamp(max=1.0)
        return (self.images + per_image(shrink, delta) * delta).clamp(self.low, self.high)

    def step(self, points: Tensor, gradient: Tensor, share: float) -> Tensor:
        """Eq. 3: along the normalised gradient by ``share`` of the radius."""
        gradient = torch.where(self.high > self.low, gradient, 0)
        direction = gradient / per_image(length(gradient).clamp_min(1e-30), gradient)
        return self.project(points + per_image(share * self.radius, points) * direction)


def plain_gen_adv(
    network: PlainNetwork, ball: Ball, start: Tensor, steps: int, step_factor: float, bisections: int, path: bool
) -> tuple[Tensor, Tensor]:
    """GenAdv for the whole batch: perturbed images and β, (B,).

    Args:
        network: of the batch.
        ball: with the margins E(i) as radii.
        start: (B, C, *spatial), where the ascent starts.
        steps: K.
        step_factor: a step is ``step_factor`` · E / K.
        bisections: N.
        path: bisect from the last correct point (Algorithm 2), else from the clean image (Algorithm 3).
    """
    point, crossed = start, torch.zeros(len(start), dtype=torch.bool, device=start.device)
    clean = ball.project(ball.images)
    correct_side, wrong_side = clean.clone(), start.clone()
    for _ in range(steps):
        gradient, dice = network.gradient(point)
        correct_side, wrong_side, crossed = _note(network, point, dice, correct_side, wrong_side, crossed)
        point = ball.step(point, gradient, step_factor / steps)
    _, wrong_side, crossed = _note(network, point, network.dice(point), correct_side, wrong_side, crossed)
    if not path:
        correct_side = clean
    middle = (correct_side + wrong_side) / 2
    for _ in range(bisections):
        correct = per_image(network.criterion.is_correct(network.dice(middle)), middle)
        correct_side = torch.where(correct, middle, correct_side)
        wrong_side = torch.where(correct, wrong_side, middle)
        middle = (correct_side + wrong_side) / 2
    return torch.where(per_image(crossed, point), middle, point), crossed


def _note(
    network: PlainNetwork, point: Tensor, dice: Tensor, correct_side: Tensor, wrong_side: Tensor, crossed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The last correct and the first wrong point of each sample, and whether there was one."""
    correct = network.criterion.is_correct(dice)
    first_time = ~correct & ~crossed
    correct_side = torch.where(per_image(correct & ~crossed, point), point, correct_side)
    wrong_side = torch.where(per_image(first_time, point), point, wrong_side)
    return correct_side, wrong_side, crossed | first_time


class PlainIMA(nnUNetTrainerIMA):
    """Algorithm 1 for a batch, line by line; the update of the weights is nnU-Net's, as in every trainer here."""

    def on_train_epoch_start(self) -> None:
        """As IMA, but on a CPU its attacks are in nnU-Net's own precision."""
        super().on_train_epoch_start()
        if self.device.type == "cpu":
            self.attack_autocast = nullcontext

    def _keep_graphs(self) -> None:
        """None: its passes ask no oracle, so that graphs would only take memory."""

    def adversarial_step(self, batch: Batch) -> Step:
        """Lines 2 to 17."""
        images, targets, settings = batch.images, batch.targets, self.settings
        outputs = self.forward(images)
        clean_loss = self.nnunet_loss(outputs, targets)
        logits, target = first(outputs).detach(), first(targets)
        foreground = self.criterion.has_foreground(target, logits.shape[1])
        margins = self.margins.margins(batch.samples).to(images)
        attacked = self.criterion.is_correct(self.criterion.dice(logits, target)) & foreground & (margins > 0)

        self.network.eval()
        found, crossed, passes = self.generate(images, targets, margins, attacked)
        self.network.train()
        self.network.zero_grad(set_to_none=True)
        perturbed = torch.where(per_image(attacked, images), found, images)
        crossed = crossed & attacked

        again = self.forward(perturbed)
        perturbed_loss = self.nnunet_loss(again, targets)
        correct = self.criterion.is_correct(self.criterion.dice(first(again).detach(), target)) & attacked
        distance = length(perturbed - images).to(margins)
        expanded = torch.where(correct & ~crossed, margins + settings.delta_epsilon, margins)
        shrunk = torch.where(attacked & ~correct & crossed, (distance + margins) / 2, expanded)
        self._update(batch.samples, shrunk, foreground)
        counts = {
            "steps": 1,
            "samples": len(images),
            "forward_passes": 2 * len(images) + passes,
            "foreground": int(foreground.sum()),
            "correct": int(attacked.sum()),
            "perturbed": int(attacked.sum()),
            "crossed": int(crossed.sum()),
        }
        return Step((1 - settings.beta) * clean_loss + settings.beta * perturbed_loss, counts)

    def generate(
        self, images: Tensor, targets: Outputs, margins: Tensor, attacked: Tensor
    ) -> tuple[Tensor, Tensor, int]:
        """GenAdv for all samples: perturbed images, β, and the forward passes it took."""
        axes = tuple(range(2, images.ndim))
        ball = Ball(images, margins, images.amin(axes, keepdim=True), images.amax(axes, keepdim=True))
        network = PlainNetwork(self.bare_network, targets, self.sample_loss, self.criterion, self.attack_autocast)
        settings = self.settings
        found, crossed = plain_gen_adv(
            network,
            ball,
            ball.project(images + self.noise(ball, attacked)),
            settings.steps,
            settings.step_factor,
            settings.bisections,
            settings.boundary_search == "path",
        )
        return found, crossed, network.forward_passes

    def noise(self, ball: Ball, attacked: Tensor) -> Tensor:
        """Random noise of norm max(E − Δε, Δε), no more than E; numbers are drawn for the attacked samples alone.

        So the same generator gives them the noise that it gives in the trainer.
        """
        step = self.settings.delta_epsilon
        size = torch.minimum((ball.radius - step).clamp_min(step), ball.radius)
        noise = torch.zeros_like(ball.images)
        drawn = ball.images[attacked]
        noise[attacked] = torch.randn(drawn.shape, generator=self.generator, device=drawn.device).to(drawn)
        noise = torch.where(ball.high > ball.low, noise, 0)
        return noise * per_image(size / length(noise).clamp_min(1e-30), noise)


def plain_pgd(network: PlainNetwork, ball: Ball, steps: int, share: float) -> Tensor:
    """PGD from the clean images, each step ``share`` of ε: the lowest Dice (B,) on the way."""
    point = ball.project(ball.images)
    lowest = network.dice(point)
    for _ in range(steps):
        gradient, dice = network.gradient(point)
        lowest = torch.minimum(lowest, dice)
        point = ball.step(point, gradient, share)
    return torch.minimum(lowest, network.dice(point))
