"""Mixed precision: where nnU-Net's training uses it; and what single precision means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context in which a network runs."""


def training_autocast(device: torch.device) -> Autocast:
    """As nnU-Net trains: mixed precision on CUDA, in the type that PyTorch is set to (fp16 if nobody set another)."""
    if device.type == "cuda":
        return lambda: torch.autocast("cuda", enabled=True)
    return nullcontext


def single_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which nothing is cast, whatever the caller's own context does."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def use_exact_convolutions() -> None:
    """Make single precision single on GPUs, too.

    There PyTorch lets convolutions round their inputs to TF32, which has no more bits than fp16. It changes nothing for
    passes in mixed precision.
    """
    torch.backends.cudnn.allow_tf32 = False
