"""On what a run was made. No number depends on it by intent, but last digits and hours may."""

from __future__ import annotations

from typing import Any

import torch


def hardware(device: torch.device) -> dict[str, Any]:
    """Threads that torch computes with, and the GPU's name where there is one."""
    gpu = {"gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    return {"threads": torch.get_num_threads(), **gpu}
