"""Standard adversarial training: Madry et al. 2018, https://arxiv.org/abs/1706.06083; 2.3 of arXiv 2005.09147 v10."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ima.attack_losses import LossFunction
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.attacks.pgd import climb
from nnunet_ima.losses import Outputs, first
from nnunet_ima.lp import random_in_ball
from nnunet_ima.settings import PERTURBATION
from nnunet_ima.threat import ThreatModel
from nnunet_ima.trainers.nnUNetTrainerAdversarial import Batch, Step, nnUNetTrainerAdversarial
from nnunet_ima.training_log import Panel


class nnUNetTrainerSAT(nnUNetTrainerAdversarial):
    """Train on perturbed samples alone: each is the worst that K steps of PGD find within the same ε for all."""

    reads: ClassVar[Collection[str]] = PERTURBATION
    # So many of the steps, the first ones, are taken in single precision whatever the others are in.
    exact_steps: ClassVar[int] = 0
    panels: ClassVar[Sequence[Panel]] = (
        Panel("loss", {"perturbed_losses": "perturbed"}),
        Panel("share of samples", {"correct_share": "correct though perturbed"}),
        Panel("per sample", {"passes_per_sample": "forward passes a step"}),
    )

    def adversarial_step(self, batch: Batch) -> Step:
        """The loss at the inner maximum (Eq. 2.1 of Madry et al.)."""
        perturbed, passes = self.perturb(batch, batch.targets, self.sample_loss)
        outputs = self.forward(perturbed)
        loss = self.nnunet_loss(outputs, batch.targets)
        return Step(loss, self.counts(outputs, batch.targets, perturbed_losses=loss, passes=passes + len(perturbed)))

    def perturb(self, batch: Batch, reference: Outputs, loss: LossFunction) -> tuple[Tensor, int]:
        """PGD-K from a random point of the ball, each step 4ε/K (Eq. 3 of the IMA paper), and the passes it took.

        Args:
            batch: holds the images.
            reference: what ``loss`` compares outputs with.
            loss: what is climbed.
        """
        images = batch.images
        threat = self.patch_threat(images, torch.full((len(images),), self.settings.epsilon, device=self.device))
        if self.settings.epsilon == 0:
            return images, 0
        with undisturbed(self.bare_network):
            point, steps = self.start(images, threat), self.settings.steps
            step_size, passes = self.settings.step_factor / steps, 0
            if self.exact_steps and self.attack_autocast is not nullcontext:
                exact = Oracle(self.bare_network, reference, loss, None, chunk=max(1, self.batch_size // 2))
                point = climb(exact, threat, images, point, self.exact_steps, step_size)
                steps, passes = steps - self.exact_steps, int(exact.forward_passes.sum())
            oracle = self.attack_oracle(reference, loss, None)
            perturbed = climb(oracle, threat, images, point, steps, step_size)
        return perturbed, int(oracle.forward_passes.sum()) + passes

    def start(self, images: Tensor, threat: ThreatModel) -> Tensor:
        """Where PGD starts: a random point of the ball."""
        radius, where = threat.radius(images), threat.perturbable(images)
        return threat.project(images + random_in_ball(images, threat.norm, radius, self.generator, where), images)

    def counts(self, outputs: Outputs, targets: Outputs, passes: int, **losses: Tensor) -> dict[str, float]:
        """For the log: of a step, whose network gave ``outputs`` for the perturbed batch."""
        logits, target = first(outputs).detach(), first(targets)
        correct = self.criterion.is_correct(self.criterion.dice(logits, target))
        return {
            "steps": 1,
            "samples": len(target),
            "forward_passes": passes,
            "correct_share": float(correct.float().mean()),
            **{name: float(loss.detach()) for name, loss in losses.items()},
        }
