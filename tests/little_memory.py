"""A network for which the memory is only enough for few samples at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nnunet_ima.evaluation import models


def make_memory_little(monkeypatch: pytest.MonkeyPatch, most: int, only_gradients: bool = False) -> list[int]:
    """Let networks that are loaded from now on run out of memory for more than ``most`` samples.

    Args:
        monkeypatch: of the test.
        most: samples that go through at once.
        only_gradients: passes without a gradient take any number.

    Returns:
        How many samples were tried, pass by pass; it grows.
    """
    sizes: list[int] = []
    build = models._build_network

    def refuse(_: Any, inputs: tuple[torch.Tensor]) -> None:
        # A meta network only tells of shapes.
        if inputs[0].device.type != "meta" and (torch.is_grad_enabled() or not only_gradients):
            sizes.append(len(inputs[0]))
            if len(inputs[0]) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    def little(*arguments: Any) -> Any:
        network = build(*arguments)
        network.register_forward_pre_hook(refuse)
        return network

    monkeypatch.setattr(models, "_build_network", little)
    return sizes
