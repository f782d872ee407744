"""The margins E(i) of IMA: one estimated distance to the decision boundary for each training sample."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.lp import NORMS, Norm

SampleId = tuple[str, int]
"""A training sample: its case, and the number of its tile in nnU-Net's sliding-window grid over that case."""


class MarginTable:
    """One margin a sample, in [0, ε_train], and how often the sample was visited.

    A sample that was never drawn has margin Δε (Algorithm 1, input), clipped to ε_train. Under DDP each rank holds a
    table; :meth:`changes` and :meth:`merge` bring them together at the end of an epoch.

    Args:
        step: Δε, the expansion step, in the units of the images.
        maximum: ε_train.
        norm: in which the margins are measured.
    """

    def __init__(self, step: float, maximum: float, norm: Norm) -> None:
        self.step, self.maximum, self.norm = float(step), float(maximum), norm
        self._margins: dict[SampleId, float] = {}
        self._visits: dict[SampleId, int] = {}
        self._changes: dict[SampleId, list[float]] = {}

    def __len__(self) -> int:
        """Number of samples that were visited."""
        return len(self._margins)

    def margins(self, samples: Iterable[SampleId]) -> Tensor:
        """Margins (n,) of the samples."""
        initial = min(self.step, self.maximum)
        return torch.tensor([self._margins.get(sample, initial) for sample in samples], dtype=torch.float32)

    def visits(self, samples: Iterable[SampleId]) -> Tensor:
        """How often each sample's margin was estimated, (n,) of int64."""
        return torch.tensor([self._visits.get(sample, 0) for sample in samples], dtype=torch.long)

    def update(self, samples: Sequence[SampleId], margins: Tensor) -> None:
        """Set new margins (n,), clipped to [0, ε_train]; a sample that stands twice in a batch gets the mean."""
        if not bool(torch.isfinite(margins).all()):
            raise ValueError("a margin is NaN or infinite.")
        proposals: dict[SampleId, list[float]] = {}
        for sample, margin in zip(samples, margins.tolist(), strict=True):
            proposals.setdefault(sample, []).append(min(max(margin, 0.0), self.maximum))
        for sample, values in proposals.items():
            self._margins[sample] = sum(values) / len(values)
            self._visits[sample] = self._visits.get(sample, 0) + len(values)
            self._changes.setdefault(sample, []).extend(values)

    def all_margins(self) -> Tensor:
        """Margins of all visited samples, in no particular order."""
        return torch.tensor(list(self._margins.values()), dtype=torch.float32)

    def all_visits(self) -> Tensor:
        """Visits of all visited samples, in the same order as :meth:`all_margins`."""
        return torch.tensor(list(self._visits.values()), dtype=torch.long)

    def changes(self) -> dict[SampleId, tuple[float, int]]:
        """For each sample visited since the last merge, its newest margin and how often it was visited since."""
        return {sample: (self._margins[sample], len(values)) for sample, values in self._changes.items()}

    def merge(self, changes_by_rank: Sequence[Mapping[SampleId, tuple[float, int]]]) -> None:
        """Take over what all ranks, this one included, changed since the last merge.

        A sample that several ranks visited gets their newest margins' mean, weighted by visits. All ranks hold the
        same table afterwards.
        """
        for sample in self._changes:
            self._visits[sample] -= len(self._changes[sample])
        newest: dict[SampleId, list[tuple[float, int]]] = {}
        for changes in changes_by_rank:
            for sample, change in changes.items():
                newest.setdefault(sample, []).append(change)
        for sample in sorted(newest):
            total = sum(visits for _, visits in newest[sample])
            self._margins[sample] = sum(margin * visits for margin, visits in newest[sample]) / total
            self._visits[sample] = self._visits.get(sample, 0) + total
        self._changes = {}

    def state_dict(self) -> dict[str, object]:
        """Everything, as plain numbers, strings and tensors: safe to load without running code."""
        samples = sorted(self._margins)
        return {
            "norm": self.norm,
            "cases": [case for case, _ in samples],
            "tiles": torch.tensor([tile for _, tile in samples], dtype=torch.long),
            "margins": self.margins(samples),
            "visits": self.visits(samples),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Restore what :meth:`state_dict` gave; margins above a new, smaller ε_train are clipped to it.

        Raises:
            UserError: the state is damaged, or its margins were measured in another norm.
        """
        cases, tiles, margins, visits = (state.get(key) for key in ("cases", "tiles", "margins", "visits"))
        if (
            not isinstance(cases, list)
            or not all(
                isinstance(column, Tensor) and column.shape == (len(cases),) and bool(torch.isfinite(column).all())
                for column in (tiles, margins, visits)
            )
            or state.get("norm") not in NORMS
        ):
            raise UserError("the margins in the checkpoint are damaged; start from an earlier checkpoint.")
        assert isinstance(tiles, Tensor)
        assert isinstance(margins, Tensor)
        assert isinstance(visits, Tensor)
        if state["norm"] != self.norm:
            raise UserError(
                f"the margins in the checkpoint are {state['norm']} distances, but the settings ask for {self.norm}; "
                f"set norm back to {state['norm']} or start a new training."
            )
        samples = [(str(case), int(tile)) for case, tile in zip(cases, tiles.tolist(), strict=True)]
        self._margins = dict(zip(samples, margins.clamp(0.0, self.maximum).tolist(), strict=True))
        self._visits = dict(zip(samples, (int(v) for v in visits.tolist()), strict=True))
        self._changes = {}


def updated_margins(margins: Tensor, distance: Tensor, correct: Tensor, crossed: Tensor, step: float) -> Tensor:
    """Lines 13 to 17 of Algorithm 1, each (n,): expand where nothing crossed, shrink where the boundary was overshot.

    Args:
        margins: E.
        distance: ‖x − x̃‖.
        correct: whether the final perturbed sample is correct.
        crossed: β, whether a crossing was found on the way.
        step: Δε.
    """
    expanded = torch.where(correct & ~crossed, margins + step, margins)
    return torch.where(~correct & crossed, (distance + margins) / 2, expanded)
