"""TE's averages one patch and one case at a time, each step spelled out: what the fast ones are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class SlowAverages:
    """Sums (K, Z, Y, X) and weights (Z, Y, X) of each case, in half precision."""

    def __init__(self, momentum: float, shapes: Mapping[str, Sequence[int]], heads: int) -> None:
        self.momentum = momentum
        self.sums = {case: torch.zeros((heads, *shape), dtype=torch.float16) for case, shape in shapes.items()}
        self.weights = {case: torch.zeros(tuple(shape), dtype=torch.float16) for case, shape in shapes.items()}

    def update(self, case: str, coordinates: Tensor, prediction: Tensor) -> None:
        """One voxel of the patch after the other: (3, *patch), (K, *patch)."""
        sums, weights = self.sums[case], self.weights[case]
        seen: dict[tuple[int, ...], list[Tensor]] = {}
        for place, value in zip(coordinates.flatten(1).T, prediction.flatten(1).T, strict=True):
            if not place.isnan().any() and torch.isfinite(value).all():
                voxel = [min(max(round(float(p)), 0), n - 1) for p, n in zip(place, weights.shape, strict=True)]
                seen.setdefault(tuple(voxel), []).append(value)
        for (z, y, x), values in seen.items():
            eta, mean = self.momentum, torch.stack(values).mean(0)
            sums[:, z, y, x] = (eta * sums[:, z, y, x].float() + (1 - eta) * mean).half()
            weights[z, y, x] = (eta * weights[z, y, x].float() + (1 - eta)).half()

    def read(self, case: str, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """PyTorch's own interpolation: sums (K, *patch) and weight (1, *patch), 0 where a coordinate is NaN."""
        volume = torch.cat([self.sums[case], self.weights[case][None]]).float()
        size = torch.tensor(volume.shape[1:]).reshape(3, 1)
        known = ~coordinates.isnan().any(0)
        # grid_sample counts from −1 to 1 between the outer edges, last axis first.
        grid = ((2 * coordinates.nan_to_num().flatten(1) + 1) / size - 1).flip(0).T.reshape(1, 1, 1, -1, 3)
        found = torch.nn.functional.grid_sample(volume[None], grid, padding_mode="border", align_corners=False)
        found = found.reshape(len(volume), *coordinates.shape[1:]) * known
        return found[:-1], found[-1:]
