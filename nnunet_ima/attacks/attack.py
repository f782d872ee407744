"""The call that all attacks share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor, nn

from nnunet_ima.attacks.oracle import BestSoFar, LossFunction, Oracle, undisturbed
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.losses import Outputs, SegmentationLoss, first
from nnunet_ima.precision import Autocast
from nnunet_ima.threat import ThreatModel


@dataclass(frozen=True)
class AttackResult:
    """What an attack found for each sample of a batch.

    Attributes:
        images: perturbed images (B, C, *spatial), within the threat model.
        dice: their Dice (B,); never above that of the unperturbed (but clamped) image.
        clean_dice: Dice (B,) of the unperturbed image, clamped to the range.
        forward_passes, backward_passes: how often the network ran for each sample, (B,) of int64.
    """

    images: Tensor
    dice: Tensor
    clean_dice: Tensor
    forward_passes: Tensor
    backward_passes: Tensor


@dataclass(frozen=True)
class Attack(ABC):
    """An attack with its budget; call it with a network, images and targets.

    Attributes:
        threat: what the attacker may do.
        criterion: how targets are read and Dice is computed.
        loss: what is ascended, one value a sample; None for nnU-Net's Dice + cross entropy.
        seed: of the random numbers; a sample's depend on this and on its image alone.
        chunk: images per pass through the network, see :class:`~nnunet_ima.attacks.oracle.Oracle`.
        autocast: makes the context in which the network runs (mixed precision).
    """

    name: ClassVar[str]

    threat: ThreatModel
    criterion: DiceCriterion = field(default_factory=DiceCriterion)
    loss: LossFunction | None = None
    seed: int = 0
    chunk: int | None = None
    autocast: Autocast = nullcontext

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1, or None for no chunks.")
        shared = {field.name for field in fields(Attack)}
        for budget in fields(self):
            value = getattr(self, budget.name)
            if budget.name not in shared and isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"{self.name}: {budget.name} is {value}; it must be a number not below 0.")

    def __call__(self, network: nn.Module, images: Tensor, targets: Outputs) -> AttackResult:
        """Attack ``images`` (B, C, *spatial) of ``network`` with ``targets`` (B, 1 or R, *spatial).

        The network comes back in the mode, and with the gradients, that it came in; no global random state changes.

        Raises:
            ValueError: images and targets do not fit together, or an image holds NaN or infinity.
        """
        check_batch(images, targets)
        images = images.detach()
        start = self.threat.project(images, images)
        best = BestSoFar(start)
        with undisturbed(network):
            oracle = Oracle(
                network=network,
                targets=targets,
                loss=self.loss or SegmentationLoss(self.criterion.labels),
                criterion=self.criterion,
                chunk=self.chunk,
                autocast=self.autocast,
                best=best,
            )
            clean_dice = oracle.dice(start, torch.arange(len(images), device=images.device))
            self.run(oracle, images, best)
        return AttackResult(best.images, best.dice, clean_dice, oracle.forward_passes, oracle.backward_passes)

    @abstractmethod
    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """Search; whatever is asked of ``oracle`` is offered to ``best``, which holds the clean images at the start."""

    def worth_attacking(self, best: BestSoFar) -> Tensor:
        """Index of the samples that can still lose Dice; the others cost no further pass."""
        return (best.dice > 0).nonzero()[:, 0]


def check_batch(images: Tensor, targets: Outputs) -> None:
    """Refuse what cannot be attacked."""
    target = first(targets)
    if images.ndim not in (4, 5):
        raise ValueError(f"images have shape {tuple(images.shape)}; (B, C, H, W) or (B, C, D, H, W) is needed.")
    if target.shape[0] != images.shape[0] or target.shape[2:] != images.shape[2:]:
        raise ValueError(f"targets have shape {tuple(target.shape)}, which does not fit images {tuple(images.shape)}.")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("an image holds NaN or infinite intensities and cannot be attacked.")
