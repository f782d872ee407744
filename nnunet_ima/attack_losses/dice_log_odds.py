"""Log odds of the soft Dice: a Dice loss whose gradient does not fade however sure the network is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.attack_losses.voxels import true_class, without
from nnunet_ima.labels import Labels
from nnunet_ima.losses import Outputs, first

# A logit so far from the others that its probability, or what is missing to 1, is 0.
NO_PART = 1e4


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

    With targets [target, t], as :class:`~nnunet_ima.attack_losses.margin.TargetedDLR` takes them, it is about the truth
    and one other class at each voxel alone, or for regions about one region.

    Attributes:
        labels: how targets and logits are to be read.
        sharpness: the logits are multiplied by this; the larger, the closer the soft Dice is to the hard one.
    """

    labels: Labels
    sharpness: float = 1.0

    def __call__(self, outputs: Outputs, targets: Outputs) -> Tensor:
        """Loss (B,) of the full-resolution output; 0, without a gradient, where all voxels are ignored."""
        logits, target = self.sharpness * first(outputs).float(), first(targets)
        if not isinstance(targets, Tensor) and len(targets) > 1 and not targets[1].is_floating_point():
            logits = _only(logits, target, targets[1], self.labels)
        valid, truth = self.labels.valid(target), self.labels.one_hot(target, logits.shape[1])
        if self.labels.regions:
            background = functional.logsigmoid(-logits)
            right = functional.logsigmoid(torch.where(truth, logits, -logits))
            wrong = functional.logsigmoid(torch.where(truth, -logits, logits))
            inside = truth
        else:
            background = logits.log_softmax(1)[:, :1]
            right, wrong, inside = _of_foreground_classes(logits, target, self.labels)
        has_foreground = (inside & valid).flatten(1).any(1)
        hits = _log_sum(right, inside & valid) + math.log(2)
        misses = _log_sum(wrong, valid.expand_as(wrong))
        silence = _log_sum(background, valid.expand_as(background))
        odds = torch.where(has_foreground, misses - hits, misses - silence)
        return torch.where(valid.flatten(1).any(1), odds, torch.zeros_like(odds))


def _only(logits: Tensor, target: Tensor, towards: Tensor, labels: Labels) -> Tensor:
    """Logits at which no class but the truth and ``towards``, or no region but that, has any part in the Dice."""
    if labels.regions:
        silent = torch.where(labels.one_hot(target, logits.shape[1]), NO_PART, -NO_PART)
        return silent.to(logits).scatter(1, towards, logits.gather(1, towards))
    kept = torch.zeros_like(logits, dtype=torch.bool)
    kept = kept.scatter(1, true_class(target, labels), True).scatter(1, towards, True)
    return torch.where(kept, logits, torch.full_like(logits, -NO_PART))


def _of_foreground_classes(logits: Tensor, target: Tensor, labels: Labels) -> tuple[Tensor, Tensor, Tensor]:
    """Log probabilities of right and wrong (B, K − 1, *spatial) for each foreground class, and where the class is."""
    log_probability = logits.log_softmax(1)
    inside = labels.one_hot(target, logits.shape[1])[:, 1:]
    others = _log_complement(log_probability)[:, 1:]
    own = log_probability[:, 1:]
    return torch.where(inside, own, others), torch.where(inside, others, own), inside


def _log_complement(log_probability: Tensor) -> Tensor:
    """log(1 − p) of each class (B, K, *spatial), accurate where p is 1 to all digits."""
    winner = log_probability.argmax(1, keepdim=True)
    # 1 − p loses its digits where p is close to 1, which only the winner can be: there, the sum of the others.
    losers = torch.log1p(-log_probability.exp().clamp(max=0.5))
    return losers.scatter(1, winner, without(log_probability, winner).logsumexp(1, keepdim=True))


def _log_sum(logs: Tensor, where: Tensor) -> Tensor:
    """log Σ exp(``logs``) (B,) over the entries ``where``; a number far below any other where there are none."""
    kept = torch.where(where, logs, torch.full_like(logs, -2 * NO_PART))
    return kept.flatten(1).logsumexp(1)
