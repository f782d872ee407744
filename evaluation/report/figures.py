"""Runs put side by side: which model holds at which level, how sure that is, and what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nnunet_ima.evaluation.metrics import nan_mean
from nnunet_ima.evaluation.report.charts import COLOURS
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results
from nnunet_ima.evaluation.statistics import FEWEST, Difference, Interval, tvdi_difference, tvdi_interval, units

# Noise says how a model fares by chance; what an attacker can do is said by the others.
NOISE = "white-noise"


@dataclass(frozen=True)
class Setting:
    """Runs on the same data in the same protocol and norm, one a model."""

    dataset: str
    protocol: str
    norm: str
    unit: str
    range: str
    runs: list[Results]

    @property
    def norm_name(self) -> str:
        """L2 or Linf."""
        return {"l2": "L2", "linf": "Linf"}[self.norm]

    @property
    def name(self) -> str:
        """For headings."""
        return f"{self.dataset}, {self.norm_name}, protocol {self.protocol}"

    @cached_property
    def attacks(self) -> list[str]:
        """That were run on every model."""
        first = list(dict.fromkeys(str(item["attack"]) for item in self.runs[0].attacked))
        return [attack for attack in first if all(self._has(run, attack) for run in self.runs)]

    @cached_property
    def levels(self) -> list[tuple[str, float]]:
        """As text and value, ascending; of every model."""
        found = {str(item["level"]): float(item["epsilon"]) for item in self.runs[0].attacked}
        return sorted(
            ((text, value) for text, value in found.items() if all(text in _levels(run) for run in self.runs)),
            key=lambda level: level[1],
        )

    @cached_property
    def comparable(self) -> bool:
        """Whether all runs attacked the same samples, so that models can be compared case by case."""
        tables = [run.samples[UNTOUCHED] for run in self.runs]
        first = tables[0]
        return all(np.array_equal(one.cases, first.cases) and np.array_equal(one.tiles, first.tiles) for one in tables)

    def strongest(self, level: str, runs: Sequence[Results] | None = None) -> str:
        """The attack under which these runs (default: all) have the lowest mean TVDI at a level."""
        real = [attack for attack in self.attacks if not attack.startswith(NOISE)] or self.attacks

        def total(attack: str) -> float:
            found = [run.figures((attack, level)) for run in runs or self.runs]
            return sum(float(figures["tvdi"]) for figures in found if figures is not None)

        return min(real, key=total)

    def key(self, level: str) -> Key:
        """The condition that stands for a level: its strongest attack."""
        return (self.strongest(level), level)

    @cached_property
    def telling_level(self) -> str | None:
        """Where the models differ most; of a single one the smallest level. None without attacks."""
        if not self.attacks or not self.levels:
            return None

        def spread(level: str) -> float:
            values = [tvdi(run, self.key(level)) for run in self.runs]
            return max(values) - min(values)

        return self.levels[0][0] if len(self.runs) == 1 else max((text for text, _ in self.levels), key=spread)

    @cached_property
    def unit_resampled(self) -> str:
        """What the intervals come from, with a warning where that is samples."""
        found = {units(run.samples[UNTOUCHED].cases, run.samples[UNTOUCHED].counts)[0] for run in self.runs}
        if found == {"cases"}:
            return "cases"
        return (
            f"samples (there are fewer than {FEWEST} cases; samples of one case resemble each other, so these "
            f"intervals are too narrow)"
        )

    def interval(self, run: Results, key: Key) -> Interval:
        """Of a run's TVDI."""
        return tvdi_interval(units(run.samples[key].cases, run.samples[key].counts)[1])

    def difference(self, run: Results, other: Results, key: Key) -> Difference | None:
        """A run's TVDI minus another's; None if they are not of the same samples."""
        if not self.comparable:
            return None
        one, two = (units(table.cases, table.counts)[1] for table in (run.samples[key], other.samples[key]))
        return tvdi_difference(one, two)

    def mean_over_levels(self, run: Results, attack: str) -> float:
        """Mean TVDI over clean and all levels: Table 3's Avg."""
        return nan_mean([tvdi(run, UNTOUCHED), *(tvdi(run, (attack, level)) for level, _ in self.levels)])

    def _has(self, run: Results, attack: str) -> bool:
        return all(run.figures((attack, level)) is not None for level, _ in self.levels)


def settings_of(runs: Sequence[Results]) -> list[Setting]:
    """Runs grouped by data, protocol and norm, in the order in which they were given."""
    groups: dict[tuple[str, str, str], list[Results]] = {}
    for run in runs:
        protocol = run.summary["protocol"]
        groups.setdefault((run.summary["model"]["dataset"], protocol["name"], protocol["norm"]), []).append(run)
    return [
        Setting(*key, mine[0].summary["protocol"]["unit"], mine[0].summary["protocol"]["range"], mine)
        for key, mine in groups.items()
    ]


def colours_of(runs: Sequence[Results]) -> dict[str, str]:
    """A colour for each title."""
    titles = list(dict.fromkeys(run.title for run in runs))
    return {title: COLOURS[number % len(COLOURS)] for number, title in enumerate(titles)}


def tvdi(run: Results, key: Key) -> float:
    """Of a condition, in [0, 1]; NaN if it was not run."""
    figures = run.figures(key)
    return float("nan") if figures is None or figures["tvdi"] is None else float(figures["tvdi"])


def _levels(run: Results) -> set[str]:
    return {str(item["level"]) for item in run.attacked}
