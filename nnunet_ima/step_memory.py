"""How much of a GPU's memory a training took, so that it is known whether there is room for CUDA graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch


@dataclass(frozen=True)
class StepMemory:
    """What PyTorch had reserved for a training's steps at most, in bytes.

    Attributes:
        gpu: on which; another one may need more.
        eager: in its first epoch, without CUDA graphs.
        most: in any epoch, graphs included.
    """

    gpu: str
    eager: int
    most: int

    @property
    def needed(self) -> int:
        """What a training with graphs may take: they hold on to no more than its steps needed without them."""
        return max(2 * self.eager, self.most)

    def after(self, reserved: int) -> StepMemory:
        """The same after another epoch."""
        return replace(self, most=max(self.most, reserved))

    def as_dict(self) -> dict[str, str | int]:
        """For a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, str | int]) -> StepMemory:
        """From a checkpoint."""
        return cls(str(saved["gpu"]), int(saved["eager"]), int(saved["most"]))


def name_of_gpu(device: torch.device) -> str:
    """Its name and memory: two of one name may have more or less of it."""
    found = torch.cuda.get_device_properties(device)
    return f"{found.name}, {found.total_memory} bytes"
