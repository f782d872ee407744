"""How a target and a network's output are to be read: classes or regions, with or without an ignore label."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# What nnU-Net's preprocessing writes into a segmentation where the scan is zero and nothing is labelled, and its
# loaders where they pad; later transforms make background of it.
OUTSIDE = -1


@dataclass(frozen=True)
class Labels:
    """nnU-Net's two kinds of target.

    Attributes:
        regions: False for classes: logits (B, K, *spatial) through softmax, class 0 is background, target
            (B, 1, *spatial) holds the class. True for regions: logits (B, R, *spatial) through a sigmoid each, all of
            them foreground, target (B, R, *spatial) of 0 and 1, with one more channel for the ignored voxels if there
            is an ignore label.
        ignore_label: the class that marks voxels nobody annotated; None if there is none. With regions only whether it
            is None matters.
    """

    regions: bool = False
    ignore_label: int | None = None

    def valid(self, target: Tensor) -> Tensor:
        """(B, 1, *spatial) of bool: False where the voxel is to be ignored."""
        if self.ignore_label is None:
            return torch.ones_like(target[:, :1], dtype=torch.bool)
        if self.regions:
            return ~target[:, -1:].bool()
        return target[:, :1] != self.ignore_label

    def one_hot(self, target: Tensor, heads: int) -> Tensor:
        """Target as (B, heads, *spatial) of bool; an ignored voxel belongs to class 0, or to no region."""
        if self.regions:
            return target[:, :heads].bool() & self.valid(target)
        classes = torch.where(self.valid(target), target[:, :1], torch.zeros_like(target[:, :1])).long()
        shape = (classes.shape[0], heads, *classes.shape[2:])
        return torch.zeros(shape, dtype=torch.bool, device=target.device).scatter_(1, classes, True)

    def foreground(self, target: Tensor, heads: int) -> Tensor:
        """Foreground of the target as (B, F, *spatial) of bool, F = heads for regions, heads − 1 for classes."""
        return self._without_background(self.one_hot(target, heads))

    def predicted_foreground(self, logits: Tensor) -> Tensor:
        """Foreground of the prediction as (B, F, *spatial) of bool: argmax over classes, p > 0.5 for a region."""
        if self.regions:
            return logits > 0
        winner = likeliest_class(logits)
        return self._without_background(torch.zeros_like(logits, dtype=torch.bool).scatter_(1, winner, True))

    def _without_background(self, one_hot: Tensor) -> Tensor:
        return one_hot if self.regions else one_hot[:, 1:]


def likeliest_class(logits: Tensor) -> Tensor:
    """Class (B, 1, *spatial) with the highest of ``logits`` (B, K, *spatial); among equals the first, as with argmax.

    On a CPU PyTorch's ``argmax`` takes seven times as long as ``max``, a tenth of a pass of a small network.
    """
    return logits.detach().max(1, keepdim=True).indices
