"""Samples to be shown: a slice before and after, with reference and both predictions."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nnunet_ima.evaluation.checked_file import read_checked, write_checked

Picture = np.ndarray[tuple[int, ...], np.dtype[Any]]
_ARRAYS = ("image", "perturbed", "target", "before", "after")


@dataclass(frozen=True)
class Example:
    """A slice of a sample, of a volume the one with most foreground; its first channel.

    Attributes:
        case, tile: which sample.
        dice_before, dice_after: of the whole sample.
        image, perturbed: (H, W) of float32, as the network sees them.
        target, before, after: (F, H, W) of bool, foreground of the reference and of both predictions.
    """

    case: str
    tile: int
    dice_before: float
    dice_after: float
    image: Picture
    perturbed: Picture
    target: Picture
    before: Picture
    after: Picture

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.case}, tile {self.tile}"


def make_example(
    case: str, tile: int, dice: tuple[float, float], image: Tensor, perturbed: Tensor, *masks: Tensor
) -> Example:
    """From whole samples: images (C, *patch), masks (F, *patch) of reference, prediction before and after."""
    target = masks[0]
    where = int(target.sum((0, 2, 3)).argmax()) if target.ndim == 4 else None

    def shown(volume: Tensor) -> Picture:
        pixels: Picture = (volume if where is None else volume[:, where]).cpu().numpy().copy()
        return pixels

    return Example(case, tile, *dice, shown(image)[0], shown(perturbed)[0], *(shown(mask) for mask in masks))


def save_example(example: Example, file: Path) -> None:
    """Write it, whole or not at all."""
    arrays = {name: getattr(example, name) for name in _ARRAYS}
    stream = io.BytesIO()
    np.savez_compressed(stream, dice=np.array([example.dice_before, example.dice_after]), **arrays)
    write_checked(file, stream.getvalue())


def load_example(file: Path, case: str, tile: int) -> Example | None:
    """None if it is not there, or damaged."""
    stored = read_checked(file)
    if stored is None:
        return None
    with np.load(io.BytesIO(stored), allow_pickle=False) as content:
        before, after = content["dice"].tolist()
        return Example(case, tile, before, after, *(content[name] for name in _ARRAYS))
