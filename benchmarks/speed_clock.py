"""Seconds by part of a training step, and medians of ratios with their intervals."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from scipy.stats import quantile_test

from nnunet_ima.attacks.oracle import Oracle

ATTACK_PASSES, ATTACK_REST = "attack passes", "attack, between passes"
TRAINING_PASSES, BOOKKEEPING = "training passes and update", "bookkeeping"
PARTS = (ATTACK_PASSES, ATTACK_REST, TRAINING_PASSES, BOOKKEEPING)

# Methods of the trainers, and the part that they are; whatever they call that stands here counts for itself.
_METHODS = {
    "train_step": TRAINING_PASSES,
    "adversarial_step": BOOKKEEPING,
    "forward": TRAINING_PASSES,
    "nnunet_loss": TRAINING_PASSES,
    "_generate": ATTACK_REST,
    "generate": ATTACK_REST,
    "perturb": ATTACK_REST,
}


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, with all that it leaves the GPU to do."""
    synchronise(device)
    begun = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - begun


@contextmanager
def cudnn_chooses(by_timing: bool) -> Iterator[None]:
    """Let cuDNN choose its kernels by timing them, as ``nnUNetv2_train`` does, or always the same, as an evaluation."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    cudnn.benchmark, cudnn.deterministic = by_timing, not by_timing
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = before


class Clock:
    """Adds up seconds by part; a part that runs within another one counts for itself alone."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs within is ``name``."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        synchronise(self.device)
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    def timed(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same call, whose seconds are those of ``name``."""

        @wraps(call)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return call(*args, **kwargs)

        return measured


@contextmanager
def watched(trainer: Any, clock: Clock, asking: Sequence[tuple[type[Any], str]] = ()) -> Iterator[None]:
    """Have ``clock`` add up the parts of a trainer's steps.

    Args:
        trainer: any of ours, or nnU-Net's.
        clock: of the trainer's device.
        asking: classes and their methods that are attack passes, beside those of the oracle.
    """
    with ExitStack() as patches:
        for owner, name in ((Oracle, "ascent"), (Oracle, "dice"), *asking):
            patches.enter_context(patch.object(owner, name, clock.timed(getattr(owner, name), ATTACK_PASSES)))
        for name, part in _METHODS.items():
            if hasattr(trainer, name):
                patches.enter_context(patch.object(trainer, name, clock.timed(getattr(trainer, name), part)))
        yield


def summary(ratios: Sequence[float]) -> dict[str, float | None]:
    """Median, and its 95 % interval from the order of the values; None where there are too few for one."""
    interval = quantile_test(ratios, q=0, p=0.5).confidence_interval(0.95)
    low, high = (None if math.isnan(end) else round(float(end), 3) for end in (interval.low, interval.high))
    return {"median": round(median(ratios), 3), "low": low, "high": high}
