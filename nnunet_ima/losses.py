"""nnU-Net's training loss with one value a sample, so that each sample can be attacked on its own.

nnU-Net trains with −Dice + cross entropy (softmax classes) or −Dice + binary cross entropy (sigmoid regions). Its
``batch_dice`` (the default in 2D) pools Dice over the batch, which cannot be split; these functions are its loss with
``batch_dice`` off, sample by sample. Tested against ``nnunetv2.training.loss``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.labels import Labels

# nnU-Net's own smoothing term of the soft Dice (nnUNetTrainer._build_loss).
SMOOTH = 1e-5

Outputs = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class SegmentationLoss:
    """−Dice + (binary) cross entropy of each sample, with deep-supervision weights.

    Attributes:
        labels: classes or regions, ignore label.
        weights: weight of each output of a network with deep supervision, full resolution first; they add up to 1 in
            nnU-Net. None for a network with a single output.
    """

    labels: Labels = field(default_factory=Labels)
    weights: tuple[float, ...] | None = None

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of logits (B, K, *spatial) against targets, or of the lists of them that deep supervision makes.

        A list of outputs with a single target is judged by its first output alone, the full-resolution one.
        """
        if isinstance(outputs, Tensor) or isinstance(targets, Tensor):
            return sample_loss(first(outputs), first(targets), self.labels)
        weights = self.weights or (1 / len(outputs),) * len(outputs)
        if len(weights) != len(outputs) or len(outputs) != len(targets):
            raise ValueError(
                f"deep supervision: {len(outputs)} outputs, {len(targets)} targets and {len(weights)} weights differ."
            )
        terms = [w * sample_loss(o, t, self.labels) for w, o, t in zip(weights, outputs, targets, strict=True) if w]
        return torch.stack(terms).sum(0)


def sample_loss(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """−Dice + (binary) cross entropy (B,) of one output, computed in single precision whatever the logits' type."""
    logits = logits.float()
    return cross_entropy(logits, target, labels) - soft_dice(logits, target, labels)


def soft_dice(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """Soft Dice (B,), the mean over foreground classes or regions; as nnU-Net's MemoryEfficientSoftDiceLoss."""
    valid = labels.valid(target)
    truth = labels.foreground(target, logits.shape[1]) & valid
    probability = logits.sigmoid() if labels.regions else logits.softmax(1)[:, 1:]
    probability = probability * valid
    overlap = (probability * truth).flatten(2).sum(2)
    total = probability.flatten(2).sum(2) + truth.flatten(2).sum(2)
    return ((2 * overlap + SMOOTH) / (total + SMOOTH)).mean(1)


def cross_entropy(logits: Tensor, target: Tensor, labels: Labels) -> Tensor:
    """Cross entropy (B,), the mean over the voxels that are not ignored (and over regions); 0 if all are ignored."""
    valid = labels.valid(target)
    if labels.regions:
        truth = target[:, : logits.shape[1]].to(logits.dtype)
        voxelwise = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        # nnU-Net divides the sum over regions by the voxel count alone where there is an ignore label.
        scale = 1 if labels.ignore_label is not None else logits.shape[1]
    else:
        truth = torch.where(valid, target[:, :1], torch.zeros_like(target[:, :1]))[:, 0].long()
        voxelwise = functional.cross_entropy(logits, truth, reduction="none")[:, None]
        scale = 1
    return (voxelwise * valid).flatten(1).sum(1) / (scale * valid.flatten(1).sum(1)).clamp_min(1)


def deep_supervision_weights(outputs: int) -> tuple[float, ...]:
    """nnU-Net's weights of ``outputs`` resolutions: 1, 1/2, 1/4, ..., the lowest 0, scaled to add up to 1."""
    if outputs == 1:
        return (1.0,)
    raw = [0.5**i for i in range(outputs - 1)] + [0.0]
    return tuple(w / sum(raw) for w in raw)


def first(outputs: Outputs) -> Tensor:
    """The full-resolution tensor of a network's output or of a list of targets."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]
