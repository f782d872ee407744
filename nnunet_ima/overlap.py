"""Tiles of a volume that may overlap: cut out, and added back; each is the other's gradient.

Indexing would do the same, but autograd would then fill a whole volume with zeros for each single tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Place = tuple[slice, ...]
"""Where a tile lies: slices of the volume's spatial axes, of the same sizes for all tiles."""


def cut_tiles(volume: Tensor, places: Sequence[Place]) -> Tensor:
    """The tiles (T, C, *tile) of ``volume`` (C, *spatial) at ``places``, of which there is at least one."""
    tiles: Tensor = _Cut.apply(volume, places)
    return tiles


def add_tiles(tiles: Tensor, places: Sequence[Place], shape: Sequence[int]) -> Tensor:
    """A volume (C, *shape) of zeros to which each of ``tiles`` (T, C, *tile) is added at its place."""
    volume: Tensor = _Add.apply(tiles, places, tuple(shape))
    return volume


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, volume: Tensor, places: Sequence[Place]) -> Tensor:
        ctx.places, ctx.shape = places, volume.shape[1:]
        return torch.stack([volume[_all_channels(place)] for place in places])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return add_tiles(gradient, ctx.places, ctx.shape), None


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tiles: Tensor, places: Sequence[Place], shape: tuple[int, ...]) -> Tensor:
        ctx.places = places
        volume = tiles.new_zeros((tiles.shape[1], *shape))
        for place, tile in zip(places, tiles, strict=True):
            volume[_all_channels(place)] += tile
        return volume

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return cut_tiles(gradient, ctx.places), None, None


def _all_channels(place: Place) -> Place:
    return (slice(None), *place)
