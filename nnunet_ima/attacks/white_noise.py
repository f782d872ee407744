"""White noise: no attack, but the noise that any scanner makes; the worst of many draws (final paper, 3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.lp import draw_uniform
from nnunet_ima.seeds import sample_generators


@dataclass(frozen=True)
class WhiteNoise(Attack):
    """Uniform noise, each voxel on its own; ``draws`` times, the worst kept.

    Linf: uniform in [−ε, ε]. L2: uniform noise scaled to norm ε.
    """

    name: ClassVar[str] = "white-noise"
    climbs: ClassVar[bool] = False
    draws: int = 100

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        generators = sample_generators(images, self.seed, self.name)
        radius, where = self.threat.radius(images), self.threat.perturbable(images)
        for _ in range(self.draws):
            noise = (2 * draw_uniform(images, generators) - 1) * where
            if self.threat.norm == "l2":
                noise = self.threat.steepest(noise)
            active = self.worth_attacking(best)
            if not len(active):
                return
            noisy = self.threat.project(images + noise * radius, images)
            oracle.dice(noisy[active], active)
