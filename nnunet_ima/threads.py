"""How many threads a network runs on."""

from __future__ import annotations

import os

import torch


def use_threads_as_told(device: torch.device) -> None:
    """Let ``OMP_NUM_THREADS`` count on a CPU, where nnU-Net takes every core whatever it says.

    Small networks may lose by it: threads wait for each other after every layer, and as soon as another process wants a
    core, for the one that has none (docs/training.md, "On a CPU").
    """
    # The variable may hold a list, one number for each level of nesting.
    told = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if device.type == "cpu" and told.isdecimal() and int(told) > 0:
        torch.set_num_threads(int(told))
