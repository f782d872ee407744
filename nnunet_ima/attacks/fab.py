"""FAB, the fast adaptive boundary attack: Croce & Hein 2020, https://arxiv.org/abs/1907.02044, Algorithm 1.

FAB looks for the smallest perturbation, not for the worst one of a given size. It needs a function that is 0 on the
decision boundary. A classifier has one, the difference of two logits. A segmentation is wrong when its Dice, which has
no gradient, falls to a threshold; in its place stands :class:`~nnunet_ima.attack_losses.DiceLogOdds`, s, minus the
level c that s has at the boundary. c is learnt on the way, for each sample, between the highest s of a point that
turned out right and the lowest of one that turned out wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from nnunet_ima.attack_losses import DiceLogOdds, TargetedDiceLogOdds
from nnunet_ima.attacks.apgd_targeted import rank_other_classes
from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.hyperplane import farthest, relative_radius, size, step_to_hyperplane
from nnunet_ima.losses import Outputs
from nnunet_ima.lp import per_sample, random_on_sphere
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel

# The paper's constants: overshoot η, bias towards the clean image α_max, backward step β.
OVERSHOOT = 1.05
LARGEST_BIAS = 0.1
BACKWARD = 0.9
# How far c moves beyond a point that contradicts what was known; doubled each time in a row.
FIRST_RISE = 0.05
# Factors of the logits, each for a part of the steps: far from the boundary a soft Dice shows the way, close to it only
# a sharp one tells where it is.
SHARPNESS = (1.0, 2.0, 4.0)
# Where restarts begin while no wrong point is known, as a share of what the range allows.
FIRST_START = 0.1


class Margins(NamedTuple):
    """The smallest perturbations found.

    Attributes:
        images: perturbed images (B, C, *spatial) that are wrong; the clean ones where none was found.
        norms: norm (B,) of each perturbation, 0 for samples that are wrong untouched, infinite where none was found.
            For Linf with one radius a channel it is relative to the channels' radii, the largest of which counts as 1.
    """

    images: Tensor
    norms: Tensor


@dataclass(frozen=True)
class FAB(Attack):
    """Steps onto the linearised boundary, biased towards the clean image, and back towards it once beyond.

    As an attack it counts what lies within ε; its points further out earn nothing. Like BPGD it shows how many samples
    can be made wrong, not how wrong. :meth:`margins` gives the smallest perturbations themselves.

    Attributes:
        steps: of each restart; two forward passes and one backward pass each.
        targets: after a run towards any wrong segmentation, one each towards one other class at every voxel, as
            :class:`~nnunet_ima.attacks.apgd_targeted.TargetedAPGD` chooses them; no more than there are (AutoAttack's
            FAB-T, 9).
        restarts: of each run; the first starts at the clean image, the others at random points around it.
        bisections: at the end, of the way between the clean image and the closest wrong
            point (3 in the paper, which leave 12 %).
    """

    name: ClassVar[str] = "fab"
    climbs: ClassVar[bool] = False
    default_loss: ClassVar[str] = "dice-odds"
    steps: int = 100
    targets: int = 9
    restarts: int = 1
    bisections: int = 10

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        self._search(oracle, images, best, within_epsilon=True)

    def margins(self, network: nn.Module, images: Tensor, targets: Outputs) -> Margins:
        """Smallest perturbations that make samples wrong, whatever ``threat.epsilon``; the range is kept.

        Args: as for :meth:`__call__`.
        """
        with self.session(network, images, targets) as (oracle, best):
            return self._search(oracle, images.detach().to(best.images), best, within_epsilon=False)

    def _search(self, oracle: Oracle, images: Tensor, best: BestSoFar, within_epsilon: bool) -> Margins:
        """Algorithm 1 for all aims; with ``within_epsilon`` only while something can be gained within the ball."""
        start = self.threat.project(images, images)
        wrong = ~self.criterion.is_correct(best.dice)
        norms = torch.where(wrong, 0.0, torch.inf).to(images)
        closest = start.clone()
        outside = oracle.under(best=BestSoFar(start))
        ranking: Tensor | None = None
        for restart in range(self.restarts):
            for run in range(1 + self.targets):
                index = self._to_be_improved(best, norms, within_epsilon)
                if not len(index):
                    break
                if run and ranking is None:
                    right = (norms > 0).nonzero()[:, 0]
                    ranking = rank_other_classes(oracle, start, right, self.criterion.labels)
                if run and ranking is not None and run > ranking.shape[1]:
                    break
                towards = ranking[:, run - 1 : run] if run and ranking is not None else None
                walk = _Walk(self, outside, towards, best, images, start, index, norms, closest)
                walk.begin(restart, run, within_epsilon)
                for step in range(self.steps):
                    walk.sharpen(SHARPNESS[step * len(SHARPNESS) // self.steps])
                    walk.step()
                    walk.index = self._to_be_improved(best, norms, within_epsilon)
        index = self._to_be_improved(best, norms, within_epsilon)
        self._bisect(outside, best, images, start, norms, closest, index)
        return Margins(closest, norms)

    def _to_be_improved(self, best: BestSoFar, norms: Tensor, within_epsilon: bool) -> Tensor:
        """Samples that are right untouched; and if only the ball counts, not finished within it."""
        wanted = norms > 0
        if within_epsilon:
            wanted = wanted & self.unfinished(best.dice)
        return wanted.nonzero()[:, 0]

    def _bisect(
        self,
        oracle: Oracle,
        best: BestSoFar,
        images: Tensor,
        start: Tensor,
        norms: Tensor,
        closest: Tensor,
        index: Tensor,
    ) -> None:
        """The paper's final search, on the way from the clean image to the closest wrong point."""
        index = index[torch.isfinite(norms[index])]
        right = start[index]
        for _ in range(self.bisections if len(index) else 0):
            middle = oracle.rounded((right + closest[index]) / 2, index)
            dice = oracle.dice(middle, index)
            credit(self.threat.select(index), best, images[index], middle, dice, index)
            wrong = ~self.criterion.is_correct(dice)
            closest[index[wrong]] = middle[wrong]
            norms[index[wrong]] = size(self.threat.select(index), middle - start[index], start[index])[wrong]
            right = torch.where(per_sample(wrong, right), right, middle)


class _Walk:
    """One restart of Algorithm 1 for the samples ``index``; ``norms`` and ``closest``, of all samples, are updated."""

    def __init__(
        self,
        attack: FAB,
        oracle: Oracle,
        towards: Tensor | None,
        best: BestSoFar,
        images: Tensor,
        start: Tensor,
        index: Tensor,
        norms: Tensor,
        closest: Tensor,
    ) -> None:
        self.attack, self.oracle, self.towards, self.best = attack, oracle, towards, best
        self.images, self.start, self.index = images, start, index
        self.norms, self.closest = norms, closest
        self.level = _Level(attack.criterion.threshold, start)
        self.sharpness = torch.full((len(start),), SHARPNESS[0]).to(start)
        self.point = start.clone()

    def begin(self, restart: int, run: int, within_epsilon: bool) -> None:
        """Choose where to start: restarts begin halfway to the best so far, or to the ball's surface if it counts."""
        if restart == 0:
            return
        threat, clean = self.attack.threat.select(self.index), self.start[self.index]
        generators = sample_generators(clean, self.attack.seed, self.attack.name, run, restart)
        known = torch.where(
            self.norms.isinf()[self.index], FIRST_START * farthest(threat, clean), self.norms[self.index]
        )
        radius = torch.minimum(threat.radius(clean).flatten(1).amax(1), known) if within_epsilon else known
        noise = random_on_sphere(
            clean, threat.norm, relative_radius(threat, clean), generators, threat.perturbable(clean)
        )
        low, high = threat.bounds(clean)
        self.point[self.index] = (clean + per_sample(radius / 2, clean) * noise).maximum(low).minimum(high)

    def sharpen(self, sharpness: float) -> None:
        """Let samples of which a wrong point is known go on with a sharper Dice, whose level is to be learnt anew."""
        ready = self.index[torch.isfinite(self.norms[self.index]) & (self.sharpness[self.index] != sharpness)]
        self.sharpness[ready] = sharpness
        self.level.forget(ready)

    def step(self) -> None:
        """One iteration of Algorithm 1 for all samples, those with the same loss together."""
        for sharpness in sorted(set(self.sharpness[self.index].tolist())):
            group = self.index[self.sharpness[self.index] == sharpness]
            labels = self.attack.criterion.labels
            aimed = self.towards is not None
            loss = TargetedDiceLogOdds(labels, sharpness) if aimed else DiceLogOdds(labels, sharpness)
            self._step(self.oracle.under(loss, beside=self.towards), group)

    def _step(self, oracle: Oracle, index: Tensor) -> None:
        """One iteration of Algorithm 1, and what it teaches about the level of the boundary."""
        clean = self.start[index]
        threat = self.attack.threat.select(index)
        low, high = threat.bounds(clean)
        point = oracle.rounded(self.point[index], index)
        answer = oracle.ascent(point, index)
        self._learn(index, point, answer.loss, answer.dice)
        normal = torch.where(threat.perturbable(clean), answer.gradient, torch.zeros_like(answer.gradient))
        gap = self.level.of(index) - answer.loss
        from_point = step_to_hyperplane(point, normal, gap, threat)
        back = (normal * (point - clean)).flatten(1).sum(1)
        from_clean = step_to_hyperplane(clean, normal, gap + back, threat)
        near, far = size(threat, from_point, clean), size(threat, from_clean, clean)
        bias = (near / (near + far).clamp_min(1e-12)).clamp(max=LARGEST_BIAS)
        # Until a wrong point is known, the way there matters, and not how short it is.
        bias = per_sample(torch.where(torch.isfinite(self.norms[index]), bias, torch.zeros_like(bias)), point)
        moved = (1 - bias) * (point + OVERSHOOT * from_point) + bias * (clean + OVERSHOOT * from_clean)
        # Further away than the closest wrong point there is nothing to be found.
        limit = torch.minimum(self.norms[index], farthest(threat, clean))
        moved = moved.nan_to_num(0.0, 1e6, -1e6)
        reach = size(threat, moved - clean, clean)
        moved = clean + per_sample((limit / reach.clamp_min(1e-12)).clamp(max=1.0), moved) * (moved - clean)
        moved = oracle.rounded(moved.maximum(low).minimum(high), index)
        loss, dice = oracle.score(moved, index)
        wrong = self._learn(index, moved, loss, dice)
        self.point[index] = torch.where(per_sample(wrong, moved), clean + BACKWARD * (moved - clean), moved)

    def _learn(self, index: Tensor, point: Tensor, loss: Tensor, dice: Tensor) -> Tensor:
        """Take in that ``point`` has this loss and Dice; returns which samples are wrong there."""
        threat, clean = self.attack.threat.select(index), self.start[index]
        credit(threat, self.best, self.images[index], point, dice, index)
        wrong = ~self.attack.criterion.is_correct(dice)
        norm = size(threat, point - clean, clean)
        closer = wrong & (norm < self.norms[index])
        self.norms[index[closer]] = norm[closer]
        self.closest[index[closer]] = point[closer]
        self.level.learn(index, loss, wrong)
        return wrong


class _Level:
    """For each sample, between which values s is at the boundary."""

    def __init__(self, threshold: float, like: Tensor) -> None:
        # Where soft and hard Dice are the same, this is s at the boundary.
        self.guess = math.log1p(-threshold) - math.log(max(threshold, 1e-3))
        self.right = torch.full((len(like),), -torch.inf).to(like)
        self.wrong = torch.full_like(self.right, torch.inf)
        self.rise = torch.full_like(self.right, FIRST_RISE)

    def of(self, index: Tensor) -> Tensor:
        """c: in the middle; while no wrong point is known the guess, or above the highest s of a right one."""
        right, wrong = self.right[index], self.wrong[index]
        beyond = torch.where(right < self.guess, torch.full_like(right, self.guess), right + self.rise[index])
        return torch.where(torch.isfinite(wrong), (right + wrong) / 2, beyond)

    def learn(self, index: Tensor, loss: Tensor, is_wrong: Tensor) -> None:
        """Take in s at a point of each sample. It differs from place to place: if two disagree the last one counts."""
        right, wrong, rise = self.right[index], self.wrong[index], self.rise[index]
        surprise = torch.where(is_wrong, loss <= right, (loss >= wrong) | (right >= self.guess) & wrong.isinf())
        self.right[index] = torch.where(is_wrong, torch.where(loss > right, right, loss - rise), right.maximum(loss))
        self.wrong[index] = torch.where(is_wrong, wrong.minimum(loss), torch.where(loss < wrong, wrong, loss + rise))
        self.rise[index] = torch.where(surprise, 2 * rise, torch.full_like(rise, FIRST_RISE))

    def forget(self, index: Tensor) -> None:
        """Start anew."""
        self.right[index], self.wrong[index], self.rise[index] = -torch.inf, torch.inf, FIRST_RISE


def credit(threat: ThreatModel, best: BestSoFar, images: Tensor, points: Tensor, dice: Tensor, index: Tensor) -> None:
    """Offer those ``points`` to ``best`` that lie within the threat model."""
    within = threat.contains(points, images, tolerance=0.0)
    best.update(index[within], points[within], dice[within])
