"""Logit margin, and its scale-invariant forms DLR and targeted DLR.

Croce & Hein 2020, https://arxiv.org/abs/2003.01690, Eq. 6 and 7; there for one image, here the mean over voxels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_ima.attack_losses.voxels import look_at, true_class, without
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, first

# The paper's program adds it to the denominator, against 0/0.
TINY = 1e-12
CLASSES_OF_DLR = 3


@dataclass(frozen=True)
class LogitMargin:
    """max over other classes of z_c, minus z_y: the mean over voxels; for a region, its logit with the wrong sign."""

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        voxels = look_at(first(outputs), first(targets), self.labels)
        return voxels.mean(-voxels.margin)


@dataclass(frozen=True)
class DLR:
    """Difference of logits ratio, (max_{c≠y} z_c − z_y) / (z_π1 − z_π3), π sorting the logits from the highest.

    With fewer than three logits, and for regions, there is no third one: it is the logit margin. A voxel whose three
    highest logits are nearly equal outweighs all others; in classification, with one of them, that does not matter.
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        logits = first(outputs).float()
        voxels = look_at(logits, first(targets), self.labels)
        if self.labels.regions or logits.shape[1] < CLASSES_OF_DLR:
            return voxels.mean(-voxels.margin)
        highest = logits.topk(3, 1).values
        return voxels.mean(-voxels.margin / (highest[:, :1] - highest[:, 2:] + TINY))


@dataclass(frozen=True)
class TargetedDLR:
    """(z_t − z_y) / (z_π1 − (z_π3 + z_π4) / 2): towards one other class t at each voxel.

    With three logits z_π3 stands for both; with two, and for regions, the difference stands alone. For regions the
    target is a region, which is pushed to the wrong side, and no other.

    ``targets`` are [target, t]: t (B, 1, *spatial) of int64, a class (or the number of a region) for each voxel.
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        if isinstance(targets, Tensor):
            raise ValueError("a targeted loss needs the targets and, beside them, a class for each voxel.")
        logits, (target, towards) = first(outputs).float(), targets
        voxels = look_at(logits, target, self.labels)
        if self.labels.regions:
            return voxels.mean(-voxels.margin.gather(1, towards))
        difference = logits.gather(1, towards) - logits.gather(1, true_class(target, self.labels))
        if logits.shape[1] < CLASSES_OF_DLR:
            return voxels.mean(difference)
        highest = logits.topk(min(4, logits.shape[1]), 1).values
        return voxels.mean(difference / (highest[:, :1] - highest[:, 2:].mean(1, keepdim=True) + TINY))


def likely_others(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """Other classes than the truth, the likeliest first, (B, K − 1, *spatial) of int64; for regions, 0 to R − 1."""
    if labels.regions:
        order = torch.arange(logits.shape[1], device=logits.device)
        shape = (1, -1, *[1] * (logits.ndim - 2))
        return order.reshape(shape).expand(logits.shape)
    return without(logits.float(), true_class(target, labels)).argsort(dim=1, descending=True, stable=True)[:, :-1]
