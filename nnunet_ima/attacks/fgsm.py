"""Fast gradient sign method: Goodfellow, Shlens & Szegedy 2015, https://arxiv.org/abs/1412.6572."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.attacks.pgd import ascend


@dataclass(frozen=True)
class FGSM(Attack):
    """One step of length ε from the clean image: along the gradient's sign (Linf) or the gradient itself (L2)."""

    name: ClassVar[str] = "fgsm"

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        active = self.worth_attacking(best)
        if not len(active):
            return
        threat, clean = self.threat.select(active), images[active]
        start = threat.project(clean, clean)
        gradient = oracle.ascent(start, active).gradient
        oracle.dice(ascend(threat, start, clean, gradient, step_size=1.0), active)
