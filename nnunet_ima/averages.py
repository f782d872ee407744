"""Running averages of a network's predictions, kept in the cases' own coordinates (for TE).

A patch shows its case cropped, rotated, scaled and mirrored, each time in another way. An average over visits means
something only in one frame of reference, so predictions are brought back to the voxels of the case they were made for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.patch_places import Places, means_by_voxel, places_of

CPU = torch.device("cpu")


def voxels_of(shapes: Mapping[str, Sequence[int]]) -> int:
    """Voxels of all cases."""
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def checkpoint_bytes(shapes: Mapping[str, Sequence[int]], heads: int) -> int:
    """What the averages add to a checkpoint once every case was seen: two bytes a voxel for each class and one more."""
    return 2 * (heads + 1) * voxels_of(shapes)


def memory_bytes(shapes: Mapping[str, Sequence[int]], heads: int) -> int:
    """Memory that the averages take once every case was seen: one byte a voxel more, for what has changed."""
    return checkpoint_bytes(shapes, heads) + voxels_of(shapes)


class PredictionAverages:
    """p ← η p + (1 − η) q for each voxel of each case, read with the weight (1 − ηᵗ) of its t updates divided out.

    Half precision. On the CPU a case takes memory from its first update on; another device's is taken at once.

    Args:
        momentum: η.
        shapes: of the preprocessed cases, (Z, Y, X) each.
        heads: K, outputs of the network.
        device: where they lie.
    """

    def __init__(
        self, momentum: float, shapes: Mapping[str, Sequence[int]], heads: int, device: torch.device = CPU
    ) -> None:
        self.momentum, self.heads, self.device = momentum, heads, device
        self.shapes = {case: tuple(shape) for case, shape in shapes.items()}
        sizes = [torch.Size(shape).numel() for shape in self.shapes.values()]
        ends = np.cumsum(sizes).tolist()
        self._rows = {case: slice(end - size, end) for case, size, end in zip(self.shapes, sizes, ends, strict=True)}
        self._numbers = {case: number for number, case in enumerate(self.shapes)}
        self._all_shapes = torch.tensor(list(self.shapes.values()), device=device)
        self._offsets = torch.tensor([rows.start for rows in self._rows.values()], device=device)
        # A row for each voxel of all cases, one case after the other: K weighted sums, and the weight.
        self._store = _zeros((sum(sizes), heads + 1), torch.float16, device)
        # Since the last merge.
        self._changed = _zeros((sum(sizes),), torch.bool, device)
        # Cases that have an average.
        self._seen = torch.zeros(len(sizes), dtype=torch.bool, device=device)

    def __len__(self) -> int:
        """Cases that have an average."""
        return int(self._seen.sum())

    def update_and_read(self, cases: Sequence[str], coordinates: Tensor, predictions: Tensor) -> tuple[Tensor, Tensor]:
        """Patch by patch: take its prediction into the average of its case, then read this at the patch's voxels.

        Patches of different cases have nothing to do with each other, and are done at once: first the first patch of
        every case, then the second of those that have one, and so on.

        Args:
            cases: of each patch.
            coordinates: (B, 3, *patch) in voxels of the case; NaN outside.
            predictions: probabilities (B, K, *patch).

        Returns:
            Probabilities (B, K, *patch), and (B, 1, *patch) of bool: where there is an average; where the averages lie.
        """
        order, rounds = _rounds(cases)
        to_rounds = torch.tensor(order, device=self.device)
        numbers = self._number([cases[i] for i in order])
        places = self._places(numbers, coordinates.to(self.device).index_select(0, to_rounds))
        values = predictions.detach().to(self.device).flatten(2).index_select(0, to_rounds)
        patches, rows, means = means_by_voxel(places, values, len(self._store))
        self._seen.index_fill_(0, numbers.index_select(0, patches), True)
        # Asked for once: in each round the program would have to wait for the device.
        limits = torch.tensor(rounds, device=self.device)
        written, read = torch.stack([torch.searchsorted(p, limits) for p in (patches, places.patches)]).tolist()
        found = []
        for (start, end), part in zip(pairwise(written), pairwise(read), strict=True):
            self._take_in(rows[start:end], means[start:end])
            found.append(places.read(self._store, *part))
        probabilities, has_average = self._divided(places, torch.cat(found, 1), coordinates)
        back = to_rounds.argsort()
        return probabilities.index_select(0, back), has_average.index_select(0, back)

    def update(self, case: str, coordinates: Tensor, prediction: Tensor) -> None:
        """Take a prediction into the average of the voxels it was made for.

        Each voxel of the patch counts for the nearest voxel of the case; several that meet there count as their mean.
        A prediction that is NaN or infinite does not count: an average would never get rid of it.

        Args:
            case: its name.
            coordinates: (3, *patch) in voxels of the case; NaN outside.
            prediction: probabilities (K, *patch).
        """
        self.update_and_read([case], coordinates[None], prediction[None])

    def read(self, case: str, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The average at the voxels of a patch, interpolated linearly.

        Returns:
            Probabilities (K, *patch), and (1, *patch) of bool: where there is an average.
        """
        places = self._places(self._number([case]), coordinates[None].to(self.device))
        found = places.read(self._store, 0, len(places.at))
        probabilities, has_average = self._divided(places, found, coordinates[None])
        return probabilities[0], has_average[0]

    def changes(self, cases: Collection[str] | None = None) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Sums, weights and changed voxels of every case that was updated since the last merge, on the CPU.

        Args:
            cases: to look at; None for all.
        """
        changes = {}
        for case in self._cases_seen() if cases is None else set(self._cases_seen()) & set(cases):
            sums, weights = self._parts(case)
            changed = self._of(case, self._changed)
            if bool(changed.any()):
                # Sums and weights share their memory, which would be sent twice.
                changes[case] = (sums.contiguous(), weights.contiguous(), changed)
        return changes

    def merge(self, changes_by_rank: Sequence[Mapping[str, tuple[Tensor, Tensor, Tensor]]]) -> None:
        """Take over what all ranks, this one included, changed since the last merge: their mean, voxel by voxel."""
        for case in sorted({case for changes in changes_by_rank for case in changes}):
            parts = [changes[case] for changes in changes_by_rank if case in changes]
            count = torch.stack([changed for _, _, changed in parts]).sum(0)
            merged = []
            for kind, mine in enumerate(self._parts(case)):
                total = torch.stack([part[kind].float() * part[2] for part in parts]).sum(0)
                merged.append(torch.where(count > 0, (total / count.clamp_min(1)).half(), mine))
            self._put(case, *merged)
            self._changed[self._rows[case]] = False

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Everything, as tensors on the CPU: safe to load without running code.

        Of each case that has an average: ``sums`` (K, Z, Y, X), weighted, and ``weights`` (Z, Y, X), in half precision.
        """
        return {case: dict(zip(("sums", "weights"), self._parts(case), strict=True)) for case in self._cases_seen()}

    def load_state_dict(self, state: MutableMapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what :meth:`state_dict` gave, and empty it on the way, as two copies may not fit into memory.

        Raises:
            UserError: it belongs to other cases, or other preprocessing.
        """
        for case, stored in state.items():
            shape = self.shapes.get(case)
            if shape is None or tuple(stored["sums"].shape) != (self.heads, *shape):
                raise UserError(
                    f"the averages in the checkpoint do not fit the case {case} as it is preprocessed now; start a new "
                    f"training, for instance with -pretrained_weights."
                )
        for case in set(self._cases_seen()) - set(state):
            self._store[self._rows[case]] = 0
        self._seen[:] = False
        self._changed[:] = False
        for case in list(state):
            stored = state.pop(case)
            self._put(case, stored["sums"], stored["weights"])

    def _places(self, numbers: Tensor, coordinates: Tensor) -> Places:
        """Of patches with coordinates (B, 3, *patch) in the cases with these numbers."""
        return places_of(coordinates.flatten(2), self._all_shapes[numbers], self._offsets[numbers])

    def _number(self, cases: Sequence[str]) -> Tensor:
        return torch.tensor([self._numbers[case] for case in cases], device=self.device)

    def _take_in(self, rows: Tensor, means: Tensor) -> None:
        """One update of the voxels in ``rows`` (n,), none of them twice, with ``means`` (n, K)."""
        eta, stored = self.momentum, self._store.index_select(0, rows).float()
        stored = eta * stored + (1 - eta) * torch.cat([means, torch.ones_like(means[:, :1])], 1)
        self._store.index_copy_(0, rows, stored.half())
        self._changed.index_fill_(0, rows, True)

    def _divided(self, places: Places, found: Tensor, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (B, K, *patch) and where there are any (B, 1, *patch), from sums and weights (K + 1, n)."""
        count, _, *patch = coordinates.shape
        everywhere = found.new_zeros((self.heads + 1, count * math.prod(patch))).index_copy_(1, places.at, found)
        everywhere = everywhere.reshape(-1, count, *patch).transpose(0, 1)
        sums, weight = everywhere[:, :-1], everywhere[:, -1:]
        # At the rim of what was seen, interpolation with unseen voxels leaves sum and weight in proportion.
        has_average = weight > 1e-3
        return sums / torch.where(has_average, weight, 1), has_average

    def _cases_seen(self) -> list[str]:
        return [case for case, seen in zip(self.shapes, self._seen.tolist(), strict=True) if seen]

    def _of(self, case: str, store: Tensor) -> Tensor:
        """(Z, Y, X, ...) of one case, on the CPU, in memory of its own: a view would be saved with all other cases."""
        rows = store[self._rows[case]]
        part = torch.from_numpy(rows.numpy()) if self.device.type == "cpu" else rows.cpu()
        return part.reshape(*self.shapes[case], *part.shape[1:])

    def _parts(self, case: str) -> tuple[Tensor, Tensor]:
        """Sums (K, Z, Y, X) and weights (Z, Y, X), on the CPU."""
        rows = self._of(case, self._store)
        return rows[..., :-1].movedim(-1, 0), rows[..., -1]

    def _put(self, case: str, sums: Tensor, weights: Tensor) -> None:
        """Replace the average of a case."""
        rows = torch.cat([sums, weights[None].to(sums)]).flatten(1).T
        self._store[self._rows[case]] = rows.to(self.device)
        self._seen[self._numbers[case]] = True


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # NumPy's take memory page by page, when they are written to first; PyTorch's write to all of it.
    return torch.from_numpy(np.zeros(shape, torch.empty((), dtype=dtype).numpy().dtype))


def _rounds(cases: Sequence[str]) -> tuple[list[int], list[int]]:
    """The patches' numbers by round, and where among them each begins and the last ends; in none a case comes twice."""
    before: Counter[str] = Counter()
    rounds = []
    for case in cases:
        rounds.append(before[case])
        before[case] += 1
    order = sorted(range(len(cases)), key=rounds.__getitem__)
    return order, [0, *accumulate(count for _, count in sorted(Counter(rounds).items()))]
