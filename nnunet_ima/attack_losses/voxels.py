"""What the losses of the literature ask of each voxel, for softmax classes and sigmoid regions alike.

Shapes: V is 1 for classes, and the number of regions R for regions, where each region is a question of its own with two
answers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.labels import Labels, likeliest_class


class Voxels(NamedTuple):
    """A network's answer at each voxel.

    Attributes:
        log_truth: log probability of the truth (B, V, *spatial).
        log_wrong: log probability of all other answers together (B, V, *spatial).
        margin: logit of the truth minus the highest other logit (B, V, *spatial); of a region, whose other answer has
            the logit 0, its logit with the sign of the truth.
        correct: whether the prediction is the truth (B, V, *spatial) of bool.
        valid: False where the voxel is to be ignored (B, 1, *spatial).
    """

    log_truth: Tensor
    log_wrong: Tensor
    margin: Tensor
    correct: Tensor
    valid: Tensor

    def mean(self, values: Tensor) -> Tensor:
        """Mean (B,) of ``values`` (B, V, *spatial) over what is not ignored; 0 where all is."""
        counted = torch.where(self.valid, values, torch.zeros_like(values)).flatten(1).sum(1)
        return counted / (values.shape[1] * self.valid.flatten(1).sum(1)).clamp_min(1)


def look_at(logits: Tensor, target: Tensor, labels: Labels) -> Voxels:
    """Read ``logits`` (B, K, *spatial) at full resolution against ``target`` as ``labels`` say; in single precision."""
    logits, valid = logits.float(), labels.valid(target)
    if labels.regions:
        truth = labels.one_hot(target, logits.shape[1])
        signed = torch.where(truth, logits, -logits)
        right, wrong = functional.logsigmoid(signed), functional.logsigmoid(-signed)
        return Voxels(right, wrong, signed, (logits > 0) == truth, valid)
    truth = true_class(target, labels)
    log_probability = logits.log_softmax(1)
    others = without(logits, truth)
    return Voxels(
        log_truth=log_probability.gather(1, truth),
        log_wrong=without(log_probability, truth).logsumexp(1, keepdim=True),
        margin=logits.gather(1, truth) - others.amax(1, keepdim=True),
        # As the prediction is made: among equals the first wins.
        correct=likeliest_class(logits) == truth,
        valid=valid,
    )


def true_class(target: Tensor, labels: Labels) -> Tensor:
    """Class (B, 1, *spatial) of each voxel, of int64; 0 where it is ignored."""
    return torch.where(labels.valid(target), target[:, :1], torch.zeros_like(target[:, :1])).long()


def without(values: Tensor, classes: Tensor) -> Tensor:
    """``values`` (B, K, *spatial) with those of ``classes`` (B, 1, *spatial) at minus infinity."""
    return values.scatter(1, classes, -torch.inf)
