"""Hard Dice of each sample, and the criterion that calls a segmentation correct (final paper, 3.5.2)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from nnunet_ima.labels import Labels

Reduction = Literal["mean", "max", "min"]
REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


class Confusion(NamedTuple):
    """Voxel counts of each sample and foreground class or region, each (B, F) of int64."""

    true_positives: Tensor
    false_positives: Tensor
    false_negatives: Tensor


def confusion(logits: Tensor, target: Tensor, labels: Labels) -> Confusion:
    """Count voxels of ``logits`` (B, K, *spatial) against ``target``; ignored voxels do not count."""
    predicted, truth, valid = (
        labels.predicted_foreground(logits),
        labels.foreground(target, logits.shape[1]),
        labels.valid(target),
    )
    predicted, truth = (predicted & valid).flatten(2), truth.flatten(2)
    return Confusion((predicted & truth).sum(2), (predicted & ~truth).sum(2), (~predicted & truth).sum(2))


def class_dice(counts: Confusion) -> Tensor:
    """Dice (B, F) of each class, in [0, 1]; NaN for a class that neither the target nor the prediction holds."""
    double_hits = 2.0 * counts.true_positives
    return double_hits / (double_hits + counts.false_positives + counts.false_negatives)


def sample_dice(counts: Confusion, reduction: Reduction = "mean") -> Tensor:
    """Dice (B,) of each sample over the classes that occur in the target or the prediction.

    1 for a sample in which nothing is to be found and nothing was found.
    """
    dice = class_dice(counts)
    occurs = ~dice.isnan()
    if reduction == "mean":
        reduced = torch.where(occurs, dice, 0).sum(1) / occurs.sum(1)
    elif reduction == "max":
        reduced = torch.where(occurs, dice, -torch.inf).amax(1)
    else:
        reduced = torch.where(occurs, dice, torch.inf).amin(1)
    return torch.where(occurs.any(1), reduced, torch.ones_like(reduced))


@dataclass(frozen=True)
class DiceCriterion:
    """A segmentation is correct when its Dice is above a threshold (0.6 in the paper).

    Attributes:
        threshold: in [0, 1).
        reduction: how the classes of a sample are put together: ``mean`` (default), ``max`` (what the authors' program
            used) or ``min``.
        labels: how targets and logits are to be read.
    """

    threshold: float = 0.6
    reduction: Reduction = "mean"
    labels: Labels = field(default_factory=Labels)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"the Dice threshold is {self.threshold}; it must be at least 0 and under 1.")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"the Dice reduction is {self.reduction!r}; it must be one of {', '.join(REDUCTIONS)}.")

    def dice(self, logits: Tensor, target: Tensor) -> Tensor:
        """Dice (B,) in [0, 1] of ``logits`` (B, K, *spatial), full resolution, against ``target``."""
        return sample_dice(confusion(logits, target, self.labels), self.reduction)

    def check(self, logits: Tensor, target: Tensor) -> None:
        """Refuse targets that do not belong to what the network gives.

        Raises:
            ValueError: there is one class only, or a label or a region that the network does not know.
        """
        heads, labels = logits.shape[1], self.labels
        if labels.regions:
            if target.shape[1] < heads + (labels.ignore_label is not None):
                raise ValueError(f"the network gives {heads} regions, but the targets have {target.shape[1]} channels.")
            return
        if heads == 1:
            raise ValueError("the network gives one class; it needs background and one more, or Labels(regions=True).")
        known = target[:, :1][labels.valid(target)]
        if known.numel() and not 0 <= float(known.min()) <= float(known.max()) < heads:
            raise ValueError(
                f"the targets hold labels from {float(known.min()):g} to {float(known.max()):g}, but the network gives "
                f"{heads} classes, 0 to {heads - 1}; is one of them an ignore label?"
            )

    def is_correct(self, dice: Tensor) -> Tensor:
        """True where a Dice counts as correct."""
        return dice > self.threshold

    def has_foreground(self, target: Tensor, heads: int) -> Tensor:
        """True (B,) where the target of a sample holds any foreground that is not ignored."""
        return self.labels.foreground(target, heads).flatten(1).any(1)
