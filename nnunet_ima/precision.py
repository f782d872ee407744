"""Mixed precision: where nnU-Net's training uses it."""

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
