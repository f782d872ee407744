"""The call that all attacks share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from nnunet_ima.attack_losses import LOSSES, LossFunction
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import BestSoFar, Oracle, Watch, undisturbed
from nnunet_ima.attacks.rounding import InwardRounding
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.losses import Outputs, first
from nnunet_ima.precision import Autocast
from nnunet_ima.threat import ThreatModel

Mode = Literal["dice", "threshold"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class AttackResult:
    """What an attack found for each sample of a batch.

    Attributes:
        images: perturbed images (B, C, *spatial), within the threat model.
        dice: their Dice (B,); never above that of the unperturbed (but clamped) image.
        clean_dice: Dice (B,) of the unperturbed image, clamped to the range.
        forward_passes, backward_passes: how often the network ran for each sample, (B,) of int64.
        queries: (B,), the images of each sample that the network was asked about: its forward passes.
    """

    images: Tensor
    dice: Tensor
    clean_dice: Tensor
    forward_passes: Tensor
    backward_passes: Tensor

    @property
    def queries(self) -> Tensor:
        """See above."""
        return self.forward_passes


@dataclass(frozen=True)
class Attack(ABC):
    """An attack with its budget; call it with a network, images and targets.

    Attributes:
        threat: what the attacker may do.
        criterion: how targets are read and Dice is computed.
        loss: what is ascended, one value a sample, or its name in :data:`~nnunet_ima.attack_losses.LOSSES`; None for
            what the attack is defined with, or else nnU-Net's Dice + cross entropy.
        mode: ``dice`` goes for the lowest Dice, and is done with a sample at 0. ``threshold`` is content when a sample
            is no longer correct, as AutoAttack is in classification.
        seed: of the random numbers; a sample's depend on this and on its image alone.
        chunk: images per pass through the network, see :class:`~nnunet_ima.attacks.oracle.Oracle`.
        autocast: makes the context in which the network runs (mixed precision).
        graphs: on CUDA, answers by replay; see :class:`~nnunet_ima.attacks.graphs.CudaGraphs`. It outlives the attack,
            so that the next batch finds everything captured.
        start: (B, C, *spatial), where PGD and APGD begin their first run instead of where they do by themselves; other
            attacks have no use for it.
        watch: is told after each pass how many each sample has taken, see :data:`~nnunet_ima.attacks.oracle.Watch`.
    """

    name: ClassVar[str]
    default_loss: ClassVar[str] = "dice-ce"
    climbs: ClassVar[bool] = True
    """Whether it has a loss of its choice to climb."""
    choices: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Settings that are words, and what they may be."""

    threat: ThreatModel
    criterion: DiceCriterion = field(default_factory=DiceCriterion)
    loss: LossFunction | str | None = None
    mode: Mode = "dice"
    seed: int = 0
    chunk: int | None = None
    autocast: Autocast = nullcontext
    graphs: CudaGraphs | None = field(default=None, compare=False, repr=False)
    start: Tensor | None = field(default=None, compare=False, repr=False)
    watch: Watch | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}; it must be at least 1, or None for no chunks.")
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}; it must be one of {', '.join(MODES)}.")
        if isinstance(self.loss, str) and self.loss not in LOSSES:
            raise ValueError(f"there is no loss {self.loss!r}; there are {', '.join(LOSSES)}.")
        for setting, allowed in self.choices.items():
            if getattr(self, setting) not in allowed:
                raise ValueError(
                    f"{self.name}: {setting} is {getattr(self, setting)!r}; it must be one of {', '.join(allowed)}."
                )
        if self.loss is not None and not self.climbs:
            raise ValueError(f"{self.name} has a loss of its own; leave loss at None.")
        shared = {field.name for field in fields(Attack)}
        for budget in fields(self):
            value = getattr(self, budget.name)
            if budget.name in shared or not isinstance(budget.default, (int, float)):
                continue
            wanted = int if isinstance(budget.default, int) else (int, float)
            if not isinstance(value, wanted) or not 0 <= value < math.inf:
                kind = "whole number" if wanted is int else "number"
                raise ValueError(f"{self.name}: {budget.name} is {value}; it must be a {kind} not below 0.")

    def __call__(self, network: nn.Module, images: Tensor, targets: Outputs) -> AttackResult:
        """Attack ``images`` (B, C, *spatial) of ``network`` with ``targets`` (B, 1 or R, *spatial).

        The network comes back in the mode, and with the gradients, that it came in; no global random state changes.

        Raises:
            ValueError: images and targets do not fit together, an image holds NaN or infinity, or
                ``torch.inference_mode()`` is on.
        """
        with self.session(network, images, targets) as (oracle, best):
            clean_dice = best.dice.clone()
            self.run(oracle, images.detach().to(best.images), best)
        # Exact: in half precision every image that was asked about is a rounded one.
        found = best.images.to(images.dtype)
        return AttackResult(found, best.dice, clean_dice, oracle.forward_passes, oracle.backward_passes)

    @contextmanager
    def session(self, network: nn.Module, images: Tensor, targets: Outputs) -> Iterator[tuple[Oracle, BestSoFar]]:
        """What a run needs, with the clean images (clamped to the range) as the best so far; then it is put away.

        Raises:
            ValueError: as :meth:`__call__`.
        """
        check_batch(images, targets)
        # The search needs more digits than half precision has.
        half = images.dtype not in (torch.float32, torch.float64)
        searched = images.detach().float() if half else images.detach()
        rounding = InwardRounding(self.threat, searched, images.dtype) if half else None
        start = self.threat.project(searched, searched)
        best = BestSoFar(start)
        with undisturbed(network):
            oracle = Oracle(
                network=_InDtype(network, images.dtype) if half else network,
                targets=targets,
                loss=self.loss_function(),
                criterion=self.criterion,
                chunk=self.chunk,
                autocast=self.autocast,
                best=best,
                repeats=self.repeats,
                graphs=self.graphs,
                rounding=rounding,
                watch=self.watch,
            )
            oracle.dice(start, torch.arange(len(images), device=images.device))
            yield oracle, best

    @abstractmethod
    def run(self, oracle: Oracle, images: Tensor, best: BestSoFar) -> None:
        """Search; whatever is asked of ``oracle`` is offered to ``best``, which holds the clean images at the start."""

    @property
    def repeats(self) -> int:
        """Passes over which each answer of the network is averaged; one, if it draws no random numbers."""
        return 1

    @property
    def takes_windows(self) -> bool:
        """Whether all it knows of the ball comes from the threat model, so that this may be a ``WindowThreat``."""
        return False

    def loss_function(self) -> LossFunction:
        """What is ascended."""
        if self.loss is None or isinstance(self.loss, str):
            return LOSSES[self.loss or self.default_loss](self.criterion.labels)
        return self.loss

    def worth_attacking(self, best: BestSoFar) -> Tensor:
        """Index of the samples from which something can still be gained; the others cost no further pass."""
        return self.unfinished(best.dice).nonzero()[:, 0]

    def unfinished(self, dice: Tensor) -> Tensor:
        """True where a Dice is not yet what the attack is content with."""
        return self.criterion.is_correct(dice) if self.mode == "threshold" else dice > 0


class _InDtype(nn.Module):
    """A network that is asked in another precision than the attack searches in."""

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, images: Tensor) -> Outputs:
        answer: Outputs = self.network(images.to(self.dtype))
        return answer


def check_batch(images: Tensor, targets: Outputs) -> None:
    """Refuse what cannot be attacked."""
    target = first(targets)
    if torch.is_inference_mode_enabled():
        raise ValueError("an attack needs gradients, which torch.inference_mode() forbids; attack outside of it.")
    if images.ndim not in (4, 5):
        raise ValueError(f"images have shape {tuple(images.shape)}; (B, C, H, W) or (B, C, D, H, W) is needed.")
    if not images.is_floating_point():
        raise ValueError(f"images are of type {images.dtype}; floating point is needed.")
    if target.shape[0] != images.shape[0] or target.shape[2:] != images.shape[2:]:
        raise ValueError(f"targets have shape {tuple(target.shape)}, which does not fit images {tuple(images.shape)}.")
    if not bool(torch.isfinite(images).all()):
        raise ValueError("an image holds NaN or infinite intensities and cannot be attacked.")
