"""Cross entropy, and its masked forms in SEA, which leave alone what is wrong already.

SEA: Croce, Singh & Hein, https://arxiv.org/abs/2306.12941, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nnunet_ima.attack_losses.voxels import look_at
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, cross_entropy, first


@dataclass(frozen=True)
class CrossEntropy:
    """The mean over voxels of −log p(truth); for regions of the binary cross entropy."""

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        return cross_entropy(first(outputs).float(), first(targets), self.labels)


@dataclass(frozen=True)
class MaskedCrossEntropy:
    """−log p(truth) where the prediction is correct, 0 elsewhere; the mean over all voxels.

    It falls when a voxel turns wrong. SEA's program therefore lets APGD compare steps by the plain cross entropy, and
    takes only the gradient from this; here APGD compares by this loss itself (so, too, for the balanced one and JS).
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        voxels = look_at(first(outputs), first(targets), self.labels)
        return voxels.mean(-voxels.log_truth * voxels.correct)


@dataclass(frozen=True)
class BalancedMaskedCrossEntropy:
    """Masked cross entropy in which every class of a sample's target counts the same, however few voxels it has.

    SEA weights classes by their frequency in a training set; here it is that of the sample, so that an attack needs
    nothing but the sample. For regions, inside and outside of each region count the same.
    """

    labels: Labels

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output."""
        logits, target = first(outputs), first(targets)
        voxels = look_at(logits, target, self.labels)
        return voxels.mean(-voxels.log_truth * voxels.correct * class_weights(logits, target, self.labels))


def class_weights(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """Weight (B, V, *spatial) of each voxel, mean 1 over those not ignored: the same sum for each class that occurs."""
    groups = labels.one_hot(target, logits.shape[1]) & labels.valid(target)
    # (B, V, classes, *spatial)
    groups = torch.stack([groups, ~groups & labels.valid(target)], 2) if labels.regions else groups[:, None]
    sizes = groups.flatten(3).sum(3)  # (B, V, classes)
    occurring = (sizes > 0).sum(2, keepdim=True)
    total = sizes.sum(2, keepdim=True)
    weight = total / (occurring * sizes).clamp_min(1)
    return (groups * weight.reshape(*weight.shape, *[1] * (logits.ndim - 2))).sum(2)
