"""Iterative FGSM, also called the basic iterative method: Kurakin et al. 2017, https://arxiv.org/abs/1607.02533."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.pgd import PGD


@dataclass(frozen=True)
class IFGSM(Attack):
    """``steps`` steps of length ε / ``steps`` from the clean image: it just reaches the surface of the ball."""

    name: ClassVar[str] = "ifgsm"
    steps: int = 10

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        pgd = PGD(self.threat, self.criterion, mode=self.mode, steps=self.steps, step_size=1 / max(1, self.steps))
        pgd.run(oracle, images, best)
