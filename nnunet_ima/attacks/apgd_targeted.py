"""APGD-T: APGD towards one other class after the other. Croce & Hein 2020, https://arxiv.org/abs/2003.01690."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from nnunet_ima.attack_losses import TargetedDLR, likely_others
from nnunet_ima.attacks.apgd import APGD
from nnunet_ima.attacks.attack import Attack
from nnunet_ima.attacks.oracle import BestSoFar, Oracle
from nnunet_ima.labels import Labels


@dataclass(frozen=True)
class TargetedAPGD(Attack):
    """APGD on the targeted DLR loss, a run for each target, the likeliest other class first.

    In classification a target is a class for the whole image. Here it is one for each voxel: its k-th likeliest other
    class on the clean image, k = 1, 2, ... For regions it is one region after the other, which is to be wrong.

    Attributes:
        steps: of each run.
        targets: the most runs; no more than there are other classes.
        restarts: random starts of each run.
    """

    name: ClassVar[str] = "apgd-t"
    climbs: ClassVar[bool] = False
    steps: int = 100
    targets: int = 9
    restarts: int = 1

    @property
    def takes_windows(self) -> bool:
        """See :attr:`Attack.takes_windows`."""
        return True

    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """See :meth:`Attack.run`."""
        active = self.worth_attacking(best)
        if not len(active):
            return
        labels = self.criterion.labels
        ranking = rank_other_classes(oracle, self.threat.project(images, images), active, labels)
        apgd = APGD(
            self.threat, self.criterion, None, self.mode, self.seed, start=self.start, steps=self.steps,
            restarts=self.restarts,
        )  # fmt: skip
        for rank in range(min(self.targets, ranking.shape[1])):
            towards = oracle.under(TargetedDLR(labels), beside=ranking[:, rank : rank + 1])
            replace(apgd, seed=self.seed + rank).run(towards, images, best)


def rank_other_classes(oracle: Oracle, images: Tensor, index: Tensor, labels: Labels) -> Tensor:
    """Other classes of each voxel, the likeliest on ``images`` first, (B, K − 1, *spatial); 0 for other samples."""
    likely = likely_others(oracle.logits(images[index], index), oracle.target[index], labels)
    return likely.new_zeros((len(images), *likely.shape[1:])).index_copy(0, index, likely)
