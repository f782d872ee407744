"""Where the voxels of patches lie among those of all cases: for writing to the nearest, and reading between them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Of those voxels of B patches, patch by patch, that show a place of their case: n of B · N.

    The cases' voxels are the rows of a store, case after case, each in C order.

    Attributes:
        at: (n,) which of the B · N.
        patches: (n,) of which patch.
        nearest: (n,) row of the voxel it is nearest to.
        low: (n,) row of the one with the lowest coordinates of the eight voxels around it.
        steps: three of (n,), from there to the row of the next voxel along each axis; 0 where the case ends.
        shares: three of (n,), how far along each axis it is on the way to that voxel, from 0 to 1.
    """

    at: Tensor
    patches: Tensor
    nearest: Tensor
    low: Tensor
    steps: tuple[Tensor, ...]
    shares: tuple[Tensor, ...]

    def read(self, store: Tensor, start: int, end: int) -> Tensor:
        """Of the voxels from ``start`` to ``end``, interpolate the rows of ``store`` (rows, R): (R, end − start)."""
        part = slice(start, end)
        found = torch.zeros((store.shape[1], end - start), device=store.device)
        for corner in product((False, True), repeat=3):
            row, weight = self.low[part], torch.ones((), device=store.device)
            for next_one, step, share in zip(corner, self.steps, self.shares, strict=True):
                row = row + step[part] if next_one else row
                weight = weight * (share[part] if next_one else 1 - share[part])
            found.addcmul_(store.index_select(0, row).float().T, weight)
        return found


def places_of(coordinates: Tensor, shapes: Tensor, offsets: Tensor) -> Places:
    """Look up patches; beyond a case's border, its border.

    Args:
        coordinates: (B, 3, N) in voxels of the case; NaN outside.
        shapes: (B, 3) of each patch's case.
        offsets: (B,) the case's first row.
    """
    known = ~coordinates.isnan().any(1)
    at = known.flatten().nonzero()[:, 0]
    numbers = torch.arange(len(coordinates), device=at.device)
    patches = numbers.repeat_interleave(known.sum(1), output_size=len(at))
    strides = (shapes[:, 1] * shapes[:, 2], shapes[:, 2], torch.ones_like(shapes[:, 2]))
    nearest = low = offsets.index_select(0, patches)
    steps, shares = [], []
    for axis in range(3):
        stride = strides[axis].index_select(0, patches)
        highest = (shapes[:, axis] - 1).to(coordinates.dtype).index_select(0, patches)
        place = coordinates[:, axis].flatten().index_select(0, at).clamp_min(0).minimum(highest)
        lowest = place.floor()
        nearest = nearest + place.round().long() * stride
        low = low + lowest.long() * stride
        steps.append((lowest < highest) * stride)
        shares.append(place - lowest)
    return Places(at, patches, nearest, low, tuple(steps), tuple(shares))


def means_by_voxel(places: Places, values: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each patch's mean value at every voxel that any of its own voxels is nearest to.

    A value that is NaN or infinite does not count.

    Args:
        places: of B patches.
        values: (B, K, N).
        rows: of the store.

    Returns:
        For each patch and voxel it meets, patch by patch: the patch's number (n,), the voxel's row (n,), the mean
        (n, K).
    """
    taken = values.mT.flatten(0, 1).index_select(0, places.at).float()
    finite = torch.isfinite(taken).all(1).nonzero()[:, 0]
    bits = rows.bit_length()
    keys = (places.patches << bits | places.nearest).index_select(0, finite)
    keys, inverse, counts = torch.unique(keys, return_inverse=True, return_counts=True)
    sums = torch.zeros((len(keys), values.shape[1]), device=values.device)
    sums.index_add_(0, inverse, taken.index_select(0, finite))
    return keys >> bits, keys & (1 << bits) - 1, sums / counts[:, None]
