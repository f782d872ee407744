"""Running averages of a network's predictions, kept in the cases' own coordinates (for TE).

A patch shows its case cropped, rotated, scaled and mirrored, each time in another way. An average over visits means
something only in one frame of reference, so predictions are brought back to the voxels of the case they were made for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from nnunet_ima.errors import UserError


@dataclass
class _Average:
    """Of one case: weighted sums (K, *shape) and weights (*shape), both in half precision."""

    sums: Tensor
    weights: Tensor
    changed: Tensor


class PredictionAverages:
    """p ← η p + (1 − η) q for each voxel of each case, read with the weight (1 − ηᵗ) of its t updates divided out.

    Half precision, on the CPU, two bytes a voxel for each class and one more; a case takes memory from its first
    update on.

    Args:
        momentum: η.
        shapes: of the preprocessed cases, (Z, Y, X) each.
        heads: K, outputs of the network.
    """

    def __init__(self, momentum: float, shapes: Mapping[str, Sequence[int]], heads: int) -> None:
        self.momentum, self.heads = momentum, heads
        self.shapes = {case: tuple(shape) for case, shape in shapes.items()}
        self._averages: dict[str, _Average] = {}

    def __len__(self) -> int:
        """Cases that have an average."""
        return len(self._averages)

    @property
    def bytes_needed(self) -> int:
        """Memory once every case was seen, and about what it adds to a checkpoint."""
        return sum(2 * (self.heads + 1) * int(torch.Size(shape).numel()) for shape in self.shapes.values())

    def update(self, case: str, coordinates: Tensor, prediction: Tensor) -> None:
        """Take a prediction into the average of the voxels it was made for.

        Each voxel of the patch counts for the nearest voxel of the case; several that meet there count as their mean.
        A prediction that is NaN or infinite does not count: an average would never get rid of it.

        Args:
            case: its name.
            coordinates: (3, *patch) in voxels of the case; NaN outside.
            prediction: probabilities (K, *patch).
        """
        finite = torch.isfinite(prediction).all(0, keepdim=True).cpu()
        box, voxels, known = self._box(case, torch.where(finite, coordinates.cpu(), torch.nan))
        if not len(voxels):
            return
        size = tuple(part.stop - part.start for part in box)
        mean, hits = self._splat(voxels, prediction.detach().float().cpu().reshape(self.heads, -1)[:, known], size)
        average = self._of(case)
        eta, hit = self.momentum, hits > 0
        sums, weights = average.sums[:, box[0], box[1], box[2]], average.weights[box]
        sums[:, hit] = (eta * sums[:, hit].float() + (1 - eta) * mean[:, hit]).half()
        weights[hit] = (eta * weights[hit].float() + (1 - eta)).half()
        average.changed[box] |= hit

    def read(self, case: str, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The average at the voxels of a patch, interpolated linearly.

        Returns:
            Probabilities (K, *patch), and (1, *patch) of bool: where there is an average.
        """
        patch = coordinates.shape[1:]
        box, voxels, known = self._box(case, coordinates)
        average = self._averages.get(case)
        if average is None or not len(voxels):
            return torch.zeros((self.heads, *patch)), torch.zeros((1, *patch), dtype=torch.bool)
        stored = torch.cat([average.sums[:, box[0], box[1], box[2]], average.weights[box][None]]).float()
        lower = torch.tensor([part.start for part in box], dtype=torch.float32)
        places = coordinates.cpu().reshape(3, -1)[:, known] - lower[:, None]
        found = torch.zeros(self.heads + 1, known.numel())
        found[:, known] = _interpolate(stored, places)
        weight = found[-1:].reshape(1, *patch)
        # At the rim of what was seen, interpolation with unseen voxels leaves sum and weight in proportion.
        has_average = weight > 1e-3
        probabilities = found[:-1].reshape(self.heads, *patch) / torch.where(has_average, weight, torch.ones(()))
        return probabilities, has_average

    def changes(self) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Sums, weights and changed voxels of every case that was updated since the last merge."""
        return {
            case: (average.sums, average.weights, average.changed)
            for case, average in self._averages.items()
            if bool(average.changed.any())
        }

    def merge(self, changes_by_rank: Sequence[Mapping[str, tuple[Tensor, Tensor, Tensor]]]) -> None:
        """Take over what all ranks, this one included, changed since the last merge: their mean, voxel by voxel."""
        for case in sorted({case for changes in changes_by_rank for case in changes}):
            parts = [changes[case] for changes in changes_by_rank if case in changes]
            average = self._of(case)
            count = torch.stack([changed for _, _, changed in parts]).sum(0)
            hit = count > 0
            for target, kind in ((average.sums, 0), (average.weights, 1)):
                total = torch.stack([part[kind].float() * part[2] for part in parts]).sum(0)
                target[..., hit] = (total[..., hit] / count[hit]).half()
            average.changed = torch.zeros_like(average.changed)

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything, as tensors: safe to load without running code."""
        return {case: {"sums": a.sums, "weights": a.weights} for case, a in self._averages.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` gave; its tensors are taken over, as two copies may not fit into memory.

        Raises:
            UserError: it belongs to other cases, or other preprocessing.
        """
        averages = {}
        for case, stored in state.items():
            shape = self.shapes.get(case)
            if shape is None or tuple(stored["sums"].shape) != (self.heads, *shape):
                raise UserError(
                    f"the averages in the checkpoint do not fit the case {case} as it is preprocessed now; start a new "
                    f"training, for instance with -pretrained_weights."
                )
            # nnU-Net reads a checkpoint onto the training's device; the averages stay on the CPU.
            sums, weights = (stored[kind].cpu() for kind in ("sums", "weights"))
            averages[case] = _Average(sums, weights, torch.zeros(shape, dtype=torch.bool))
        self._averages = averages

    def _of(self, case: str) -> _Average:
        if case not in self._averages:
            shape = self.shapes[case]
            self._averages[case] = _Average(
                torch.zeros((self.heads, *shape), dtype=torch.float16),
                torch.zeros(shape, dtype=torch.float16),
                torch.zeros(shape, dtype=torch.bool),
            )
        return self._averages[case]

    def _box(self, case: str, coordinates: Tensor) -> tuple[tuple[slice, ...], Tensor, Tensor]:
        """Box of the case that holds all known places, nearest voxels (n, 3) within it, known places (N,) of bool."""
        places = coordinates.cpu().reshape(3, -1)
        known = ~places.isnan().any(0)
        limits = torch.tensor(self.shapes[case])[:, None] - 1
        voxels = places[:, known].round().long().clamp_min(0).minimum(limits)
        if not voxels.shape[1]:
            return (), voxels.T, known
        # One voxel more on each side, for the interpolation.
        lower = (voxels.amin(1) - 1).clamp_min(0)
        upper = (voxels.amax(1) + 1).minimum(limits[:, 0])
        box = tuple(slice(int(low), int(high) + 1) for low, high in zip(lower, upper, strict=True))
        return box, (voxels - lower[:, None]).T, known

    @staticmethod
    def _splat(voxels: Tensor, values: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Means (K, *size) and counts (*size) of the values (K, n) that fall into each voxel."""
        flat = (voxels[:, 0] * size[1] + voxels[:, 1]) * size[2] + voxels[:, 2]
        hits = torch.bincount(flat, minlength=int(torch.Size(size).numel()))
        sums = torch.zeros(len(values), len(hits)).index_add_(1, flat, values)
        return (sums / hits.clamp_min(1)).reshape(-1, *size), hits.reshape(tuple(size))


def _interpolate(volume: Tensor, places: Tensor) -> Tensor:
    """Values (K, n) of ``volume`` (K, Z, Y, X) at ``places`` (3, n) in voxels; beyond the border, the border's."""
    size = torch.tensor(volume.shape[1:], dtype=torch.float32)[:, None]
    # grid_sample counts from −1 to 1 between the outer edges, last axis first.
    grid = ((2 * places + 1) / size - 1).flip(0).T.reshape(1, 1, 1, -1, 3)
    sampled = functional.grid_sample(volume[None], grid, padding_mode="border", align_corners=False)
    return sampled.reshape(len(volume), -1)
