"""Log odds of the soft Dice: a Dice loss whose gradient does not fade however sure the network is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.attack_losses.voxels import true_class, without
from nnunet_ima.labels import Labels, likeliest_class
from nnunet_ima.losses import Outputs, first


@dataclass(frozen=True)
class DiceLogOdds:
    """log((1 − D) / D) of the soft Dice D over all foreground classes (or regions) of a sample; ours.

    The odds of the Dice are 2 TP / (FP + FN), so with soft counts S(p) = Σ p over voxels and classes it is

        log(S(p wrong at foreground) + S(p of a foreground class where it is not)) − log(2 S(p right at foreground)),

    computed from log probabilities. Where all voxels are right with probabilities of 1 to all digits, and the soft Dice
    and its gradient are flat, it is still about linear in the logits. (Where some are wrong, and as sure, these hide
    the others.) For a single voxel it is the logit margin with a softened maximum: the decision function of
    classification, of which FAB needs a segmentation's counterpart.

    For a sample without foreground, whose Dice depends on false positives alone, it is the log odds of foreground.

    Attributes:
        labels: how targets and logits are to be read.
        sharpness: the logits are multiplied by this; the larger, the closer the soft Dice is to the hard one.
    """

    labels: Labels
    sharpness: float = 1.0

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output; 0, without a gradient, where all voxels are ignored."""
        logits, target = self.sharpness * first(outputs).float(), first(targets)
        valid, truth = self.labels.valid(target), self.labels.one_hot(target, logits.shape[1])
        return _of_regions(logits, truth, valid) if self.labels.regions else _of_classes(logits, truth, valid)


@dataclass(frozen=True)
class TargetedDiceLogOdds:
    """The same as if there were no class but the truth and one other at each voxel, or no region but one.

    ``targets`` are [target, t], as :class:`~nnunet_ima.attack_losses.margin.TargetedDLR` takes them; of regions t is
    the same at every voxel.

    Attributes:
        labels, sharpness: as for :class:`DiceLogOdds`.
    """

    labels: Labels
    sharpness: float = 1.0

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output; 0, without a gradient, where all voxels are ignored."""
        if isinstance(targets, Tensor):
            raise ValueError("a targeted loss needs the targets and, beside them, a class for each voxel.")
        logits, (target, towards) = self.sharpness * first(outputs).float(), targets
        valid, truth = self.labels.valid(target), self.labels.one_hot(target, logits.shape[1])
        if self.labels.regions:
            return _of_regions(logits.gather(1, towards), truth.gather(1, towards), valid)
        kept = torch.zeros_like(truth).scatter(1, true_class(target, self.labels), True).scatter(1, towards, True)
        return _of_classes(torch.where(kept, logits, torch.full_like(logits, -torch.inf)), truth, valid)


def _of_regions(logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    right = functional.logsigmoid(torch.where(truth, logits, -logits))
    wrong = functional.logsigmoid(torch.where(truth, -logits, logits))
    return _log_odds(right, wrong, truth, functional.logsigmoid(-logits), valid)


def _of_classes(logits: Tensor, truth: Tensor, valid: Tensor) -> Tensor:
    log_probability = logits.log_softmax(1)
    own, others, inside = log_probability[:, 1:], _log_complement(log_probability)[:, 1:], truth[:, 1:]
    right, wrong = torch.where(inside, own, others), torch.where(inside, others, own)
    return _log_odds(right, wrong, inside, log_probability[:, :1], valid)


def _log_odds(right: Tensor, wrong: Tensor, inside: Tensor, background: Tensor, valid: Tensor) -> Tensor:
    """From log probabilities of right and wrong (B, F, *spatial), where foreground is, and those of background."""
    hits = _log_sum(right, inside & valid) + math.log(2)
    misses = _log_sum(wrong, valid.expand_as(wrong))
    silence = _log_sum(background, valid.expand_as(background))
    has_foreground = (inside & valid).flatten(1).any(1)
    odds = torch.where(has_foreground, misses - hits, misses - silence)
    return torch.where(valid.flatten(1).any(1), odds, torch.zeros_like(odds))


def _log_complement(log_probability: Tensor) -> Tensor:
    """log(1 − p) of each class (B, K, *spatial), accurate where p is 1 to all digits."""
    winner = likeliest_class(log_probability)
    # 1 − p loses its digits where p is close to 1, which only the winner can be: there, the sum of the others.
    losers = torch.log1p(-log_probability.exp().clamp(max=0.5))
    return losers.scatter(1, winner, without(log_probability, winner).logsumexp(1, keepdim=True))


def _log_sum(logs: Tensor, where: Tensor) -> Tensor:
    """log Σ exp(``logs``) (B,) over the entries ``where``; 0 where there are none."""
    # An entry of minus infinity adds nothing, and where all are the gradient would be NaN.
    where = where & torch.isfinite(logs)
    any_there = where.flatten(1).any(1)
    there = where | ~any_there.reshape(-1, *[1] * (where.ndim - 1))
    finite = torch.where(torch.isfinite(logs), logs, torch.zeros_like(logs))
    kept = torch.where(there, finite, torch.full_like(logs, -torch.inf)).flatten(1).logsumexp(1)
    return torch.where(any_there, kept, torch.zeros_like(kept))
