"""Which part of a case a patch shows: the tile of nnU-Net's sliding-window grid whose centre is nearest.

In 2D with patches as large as slices a tile is a slice, as in the paper; in 3D it is the natural extension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

# nnU-Net's own overlap at inference.
TILE_STEP_SIZE = 0.5


def tile_grid(shape: Sequence[int], patch_size: Sequence[int]) -> list[list[int]]:
    """First voxels of the tiles along each of the three axes of a case.

    Args:
        shape: of the preprocessed case, three axes, in voxels.
        patch_size: of the network: three axes, or two for a 2D network, whose tiles are single slices.

    Returns:
        For each axis the tiles' lower corners, in voxels of the unpadded case (negative where nnU-Net pads).
    """
    slices = len(shape) - len(patch_size)
    padded = [max(size, tile) for size, tile in zip(shape[slices:], patch_size, strict=True)]
    steps = compute_steps_for_sliding_window(tuple(padded), tuple(patch_size), TILE_STEP_SIZE)
    # nnU-Net pads evenly, the odd voxel at the upper end (acvl_utils.pad_nd_image).
    below = [(large - size) // 2 for large, size in zip(padded, shape[slices:], strict=True)]
    in_plane = [[int(step) - pad for step in axis] for axis, pad in zip(steps, below, strict=True)]
    return [list(range(size)) for size in shape[:slices]] + in_plane


def count_tiles(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Number of tiles of a case."""
    return int(np.prod([len(axis) for axis in tile_grid(shape, patch_size)]))


def nearest_tile(
    shape: Sequence[int], patch_size: Sequence[int], lower: Sequence[float], upper: Sequence[float]
) -> int:
    """Number of the tile whose centre is nearest to that of the box [lower, upper), all in voxels of the case.

    Tiles are numbered in the order in which nnU-Net's predictor visits them, the last axis fastest.
    """
    grid = tile_grid(shape, patch_size)
    sizes = [1] * (len(shape) - len(patch_size)) + list(patch_size)
    nearest = [
        int(np.argmin([abs((corner + size / 2) - (lo + hi) / 2) for corner in axis]))
        for axis, size, lo, hi in zip(grid, sizes, lower, upper, strict=True)
    ]
    return int(np.ravel_multi_index(nearest, [len(axis) for axis in grid]))
