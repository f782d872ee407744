"""Losses that an attack may climb, by name: each one value a sample, from (outputs, targets), and each once cited."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nnunet_ima.attack_losses.cross_entropy import BalancedMaskedCrossEntropy, CrossEntropy, MaskedCrossEntropy
from nnunet_ima.attack_losses.dice_log_odds import DiceLogOdds, TargetedDiceLogOdds
from nnunet_ima.attack_losses.jensen_shannon import JensenShannon
from nnunet_ima.attack_losses.margin import DLR, LogitMargin, TargetedDLR, likely_others
from nnunet_ima.attack_losses.weighted import CosPGD, SegPGD
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, SegmentationLoss

LossFunction = Callable[[Outputs, Outputs], Tensor]

LOSSES: dict[str, Callable[[Labels], LossFunction]] = {
    "dice-ce": SegmentationLoss,
    "ce": CrossEntropy,
    "margin": LogitMargin,
    "dlr": DLR,
    "masked-ce": MaskedCrossEntropy,
    "balanced-ce": BalancedMaskedCrossEntropy,
    "js": JensenShannon,
    "segpgd": SegPGD,
    "cospgd": CosPGD,
    "dice-odds": DiceLogOdds,
}
"""What makes each loss, by its name as ``loss=``: called with the labels it gives the function."""

__all__ = [
    "DLR",
    "LOSSES",
    "BalancedMaskedCrossEntropy",
    "CosPGD",
    "CrossEntropy",
    "DiceLogOdds",
    "JensenShannon",
    "LogitMargin",
    "LossFunction",
    "MaskedCrossEntropy",
    "SegPGD",
    "TargetedDLR",
    "TargetedDiceLogOdds",
    "likely_others",
]
