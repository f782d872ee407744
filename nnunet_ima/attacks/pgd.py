"""Projected gradient descent: Madry et al. 2018, https://arxiv.org/abs/1706.06083; Eq. 3 of the IMA paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.seeds import sample_generators
from nnunet_ima.threat import ThreatModel


@dataclass(frozen=True)
class PGD(Attack):
    """Steps of fixed length along the normalised gradient, projected back onto the ball and the range.

    Attributes:
        steps: gradient steps of each restart.
        restarts: random starts within the ball; the first restart starts at the clean image, or at ``start``.
        step_size: length of a step as a share of ε. It does not depend on ``steps``, so that more steps go on where
            fewer stopped and are never weaker. The papers' 4ε/K is ``step_size=4 / steps``.
    """

    name: ClassVar[str] = "pgd"
    steps: int = 40
    restarts: int = 1
    step_size: float = 0.1

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        for restart in range(self.restarts):
            active = self.worth_attacking(best)
            if not len(active):
                return
            self._restart(oracle, images[active], active, best, restart)

    def _restart(self, oracle: Oracle, images: Tensor, index: Tensor, best: BestSoFar, restart: int) -> None:
        threat = self.threat.select(index)
        perturbed = threat.project(images if self.start is None else self.start[index], images)
        if restart:
            generators = sample_generators(images, self.seed, self.name, restart)
            perturbed = threat.project(images + threat.draw_in_ball(images, generators), images)
        for step in range(self.steps):
            gradient = oracle.ascent(perturbed, index, progress=step / self.steps).gradient
            stays = self.unfinished(best.dice[index]).nonzero()[:, 0]
            if not len(stays):
                return
            threat, images, index = threat.select(stays), images[stays], index[stays]
            perturbed = ascend(threat, perturbed[stays], images, gradient[stays], self.step_size)
        oracle.dice(perturbed, index)


def ascend(threat: ThreatModel, perturbed: Tensor, images: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    """One projected step (Eq. 3): Π(perturbed + step_size · ε · h(gradient)).

    Voxels that may not change take no part in the direction: they would only shorten the step of the others.
    """
    gradient = torch.where(threat.perturbable(images), gradient, torch.zeros_like(gradient))
    step = step_size * threat.radius(images) * threat.steepest(gradient)
    return threat.project(perturbed + step, images)


def climb(oracle: Oracle, threat: ThreatModel, images: Tensor, start: Tensor, steps: int, step_size: float) -> Tensor:
    """``steps`` projected steps from ``start``, and nothing else: the inner attack of adversarial training.

    Unlike the attack :class:`PGD` it returns where it ends, not the point with the lowest Dice, and stops for nothing.

    Args:
        oracle: what it asks has the loss to be climbed; samples are those of ``images``, in order.
        threat: with one radius a sample.
        images: clean images (B, C, *spatial).
        start: (B, C, *spatial), within the threat model.
        steps: K.
        step_size: as a share of ε.
    """
    point, index = start, torch.arange(len(images), device=images.device)
    for _ in range(steps):
        point = ascend(threat, point, images, oracle.ascent(point, index).gradient, step_size)
    return point
