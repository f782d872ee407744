"""Mixed precision: where nnU-Net's training uses it, where attacks may; and what single precision means."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch

Autocast = Callable[[], AbstractContextManager[object]]
"""Makes the context in which a network runs."""


def training_autocast(device: torch.device) -> Autocast:
    """As nnU-Net trains: mixed precision on CUDA, in the type that PyTorch is set to (fp16 if nobody set another)."""
    if device.type == "cuda":
        return lambda: torch.autocast("cuda", enabled=True)
    return nullcontext


def faster_autocast(device: torch.device) -> Autocast:
    """The precision that makes passes of a training's attacks faster, should they find as much in it.

    On CUDA that of the training. On a CPU with units for bfloat16 matrices (Intel's AMX) bfloat16: there a pass takes
    37 to 87 % of the time, the less the more samples are in it (docs/speed.md). Else single precision, ``nullcontext``:
    without such units bfloat16 may be slower.
    """
    if device.type == "cpu" and _has_amx():
        return partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    return training_autocast(device)


def precision_of(autocast: Autocast, device: torch.device) -> str:
    """The type that matrices are multiplied in, such as ``bfloat16``."""
    if autocast is nullcontext:
        return "float32"
    with autocast():
        return str(torch.get_autocast_dtype(device.type)).removeprefix("torch.")


def _has_amx() -> bool:
    # PyTorch has no public function for it; one without this private one says no.
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())


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
