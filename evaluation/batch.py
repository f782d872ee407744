"""Samples side by side, as an attack takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nnunet_ima.evaluation.cases import Case, Sample, ValidationCases
from nnunet_ima.evaluation.protocols import Level, Protocol
from nnunet_ima.threat import ThreatModel


def load_batch(
    cases: ValidationCases, batch: Sequence[Sample], protocol: Protocol, level: Level | None, device: torch.device
) -> tuple[Tensor, Tensor, ThreatModel]:
    """Images (B, C, *patch), targets (B, 1 or R, *patch) and what an attacker may do to them at a level."""
    loaded = [(cases.load(sample.case), sample.place) for sample in batch]

    def stack(pick: Callable[[Case], Tensor]) -> Tensor:
        return torch.stack([cases.patch(pick(case), place) for case, place in loaded]).to(device)

    images, targets, fixed = stack(lambda c: c.image), stack(lambda c: c.target), stack(lambda c: c.fixed)
    low, high = (torch.stack([getattr(case, end) for case, _ in loaded]).to(device) for end in ("low", "high"))
    return images, targets, protocol.threat(level or Level("0", 0.0), images, low, high, fixed)
