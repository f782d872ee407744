"""What the numbers mean: the range a perturbed image must stay in, and the unit of a level.

``sound`` (default): the range is the case's own, per channel; Linf levels are shares of that range. For every claim.
``paper``: z-scored images are clamped to [0, 1], as the program behind the final paper's Table 3 does; Linf levels are
z-scores. For comparing with that table only, and always shown with what the clamp alone does.
L2 levels are z-scores over the patch in both. Where nnU-Net normalises in another way, they are units of the scan as it
is normalised, and so are the Linf levels of ``paper``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

import torch
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.lp import Norm
from nnunet_ima.threat import ThreatModel

ProtocolName = Literal["sound", "paper"]
PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)


@dataclass(frozen=True)
class Level:
    """A noise level as the user wrote it (``2/255``), and its value."""

    text: str
    value: float


@dataclass(frozen=True)
class Protocol:
    """A protocol for one norm."""

    name: ProtocolName
    norm: Norm

    def range_in(self, scale: str) -> str:
        """The range of a perturbed image, in words; ``scale`` is the unit of the network's input."""
        return f"[0, 1] on {scale}" if self.name == "paper" else "the case's own intensity range, per channel"

    def unit_in(self, scale: str) -> str:
        """The unit of a level, in words; ``scale`` is the unit of the network's input."""
        if self.norm == "l2":
            return f"{scale}, L2 norm over the patch"
        return scale if self.name == "paper" else "share of the case's intensity range, per channel"

    def threat(self, level: Level, images: Tensor, low: Tensor, high: Tensor, fixed: Tensor) -> ThreatModel:
        """Threat model for a batch of tiles.

        Args:
            level: ε in the protocol's unit.
            images: (B, C, *patch).
            low, high: the cases' own range, (B, C).
            fixed: (B, C, *patch) of bool: voxels that are no image (padding, one-hot channels, the background of
                scans that are normalised without it). Under ``sound`` they stay as they are: no perturbation of a scan
                can reach them. The authors' program perturbs padding.
        """
        spread = [*low.shape, *[1] * (images.ndim - 2)]
        if self.name == "paper":
            no_image = fixed.flatten(2).all(2).reshape(spread)
            zero, one = torch.zeros_like(images), torch.ones_like(images)
            return ThreatModel(
                self.norm, level.value, torch.where(no_image, images, zero), torch.where(no_image, images, one)
            )
        epsilon = level.value * (high - low) if self.norm == "linf" else level.value
        return ThreatModel(
            self.norm,
            epsilon,
            torch.where(fixed, images, low.reshape(spread)),
            torch.where(fixed, images, high.reshape(spread)),
        )

    def clamp(self, images: Tensor) -> Tensor:
        """What the protocol does to an image without any noise."""
        return images.clamp(0.0, 1.0) if self.name == "paper" else images


def read_levels(texts: Sequence[str], norm: Norm) -> list[Level]:
    """Levels in their order; one that is written twice, as ``5 5.0``, is one, as written first: a mean is over both.

    Raises:
        UserError: as :func:`parse_level`.
    """
    found: dict[float, Level] = {}
    for text in texts:
        level = parse_level(text, norm)
        found.setdefault(level.value, level)
    return list(found.values())


def parse_level(text: str, norm: Norm) -> Level:
    """Read ``5``, ``0.5`` or ``2/255``.

    Raises:
        UserError: it is no number, not above 0, infinite, or as an Linf level above 1.
    """
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        raise UserError(f"The level {text!r} is no number; write it as 5, 0.5 or 2/255.") from None
    if not math.isfinite(value) or value <= 0:
        raise UserError(f"The level {text!r} is not allowed; it must be finite and above 0 (clean is always reported).")
    if norm == "linf" and value > 1:
        raise UserError(
            f"The Linf level {text!r} is above 1, the whole intensity range; write it as a share, as 2/255."
        )
    return Level(text, value)
