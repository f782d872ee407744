"""Runs put side by side: which model holds at which level, how sure that is, and what it costs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, cached_property
from itertools import combinations, pairwise
from typing import Any

import numpy as np

from nnunet_ima.evaluation.metrics import Array, class_scores, nan_mean
from nnunet_ima.evaluation.normalisation import in_words, scale_of
from nnunet_ima.evaluation.protocols import Protocol, ProtocolName
from nnunet_ima.evaluation.report.attacks_run import other_definition, same_attack
from nnunet_ima.evaluation.report.charts import COLOURS
from nnunet_ima.evaluation.results import CLAMPED, UNTOUCHED, Key, Results
from nnunet_ima.evaluation.statistics import (
    CONFIDENCE,
    FEWEST,
    Difference,
    Interval,
    adi_difference,
    dice_sums,
    holm,
    permutations_for,
    smallest_p,
    tvdi_difference,
    tvdi_interval,
    units,
)
from nnunet_ima.evaluation.summary import nothing_learned
from nnunet_ima.lp import Norm
from nnunet_ima.units import Z_SCORES

# Noise says how a model fares by chance; what an attacker can do is said by the others.
NOISE = "white-noise"
# Smaller differences than half a point of Dice do not matter, however sure they are.
SMALLEST = 0.005


class Order(Enum):
    """How two models compare over all levels."""

    BETTER = "more robust"
    UNCLEAR = "not clearly different"
    MIXED = "better at one level and worse at another"
    UNPAIRED = "attacked on other samples"


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs on the same data in the same protocol and norm, one a model.

    Attributes:
        scale: the unit of what the networks see, in words.
        normalisation: how it came about, in words; empty if none of the runs tells.
        apart: whether there are runs that differ from these in it alone.
    """

    dataset: str
    protocol: str
    norm: str
    patch: str
    unit: str
    range: str
    runs: list[Results]
    scale: str
    normalisation: str
    apart: bool

    @property
    def norm_name(self) -> str:
        """L2 or Linf."""
        return {"l2": "L2", "linf": "Linf"}[self.norm]

    @property
    def name(self) -> str:
        """For headings."""
        apart = f", {self.normalisation}" if self.apart else ""
        return f"{self.dataset}, {self.norm_name}, protocol {self.protocol}, patch {self.patch}{apart}"

    @property
    def start(self) -> Key:
        """What attacks begin with: untouched samples; under ``paper`` clamped ones, which costs Dice by itself."""
        return CLAMPED if self.protocol == "paper" else UNTOUCHED

    @property
    def start_name(self) -> str:
        """In words."""
        return "clamped scans without noise" if self.protocol == "paper" else "clean scans"

    @property
    def attacked_samples(self) -> str:
        """How many samples of how many cases; of runs that differ, of each."""
        found = []
        for table in (run.samples[UNTOUCHED] for run in self.runs):
            cases = len(set(table.cases.tolist()))
            found.append(f"{len(table.cases)} samples of {cases} case{'s' if cases > 1 else ''}")
        each = "; ".join(f"{run.title}: {text}" for run, text in zip(self.runs, found, strict=True))
        return f"{found[0] if _same_samples(self.runs) else each}, each sample of {self.patch} voxels"

    @property
    def few_cases(self) -> bool:
        """Whether there are so few that samples stand in for them, which resemble each other."""
        return any(
            units(run.samples[UNTOUCHED].cases, run.samples[UNTOUCHED].counts)[0] != "cases" for run in self.runs
        )

    @property
    def evenly(self) -> str:
        """What the L2 levels are if every voxel of a patch changes by the same; empty for Linf."""
        if self.norm != "l2" or not self.levels:
            return ""
        voxels = math.prod(int(size) for size in self.patch.split(" × "))
        levels = " / ".join(text for text, _ in self.levels)
        each = " / ".join(f"{value / math.sqrt(voxels):.2g}" for _, value in self.levels)
        unit = "standard deviations of the intensities" if self.scale == Z_SCORES else self.scale
        return (
            f"Spread evenly over one channel, {self.norm_name} {levels} is {each} {unit} in each of a sample's "
            f"{voxels:,} voxels."
        )

    @cached_property
    def levels(self) -> list[tuple[str, float]]:
        """As text and value, ascending; those of every model, compared as numbers and written as the first run has."""
        shared = set.intersection(*(set(_levels(run)) for run in self.runs))
        return sorted(((text, value) for value, text in _levels(self.runs[0]).items() if value in shared),
                      key=lambda level: level[1])  # fmt: skip

    @cached_property
    def attacks(self) -> list[str]:
        """That were run on every model at all of these levels, as the first run has them."""
        first = dict.fromkeys(str(item["attack"]) for item in self.runs[0].attacked)
        return [attack for attack in first if self.levels and all(self._has(run, attack) for run in self.runs)]

    @cached_property
    def only_named_alike(self) -> list[tuple[str, Results, list[str]]]:
        """Attacks that are not the first run's of that name: their names, whose, and how they differ from it."""
        names = {run: dict.fromkeys(str(item["attack"]) for item in run.attacked) for run in self.runs}
        first, *others = self.runs
        found = (
            (text, run, other_definition(run, text, first, attack))
            for run in others
            for text in names[run]
            for attack in names[first]
            if same_attack(text, attack)
        )
        return [one for one in found if one[2]]

    @cached_property
    def of_unknown_unit(self) -> list[Results]:
        """The runs of which it is not known that a level is the same to them as to the others, normalised as they are.

        None if all are of the same plans.
        """
        plans = {(one.summary["model"].get("plans.json"), one.summary["model"]["configuration"]) for one in self.runs}
        if len(plans) == 1 and None not in next(iter(plans)):
            return []
        return [run for run in self.runs if normalisation(run, self.runs) is None]

    @cached_property
    def compared(self) -> list[Results]:
        """The models that are compared: those that have learned their task, and whose figures can be trusted.

        Of others an attack can take nothing, or what it left is not real.
        """
        return [run for run in self.runs if not nothing_learned(run.summary) and not failed_checks(run)]

    @property
    def noise_only(self) -> bool:
        """Whether plain noise is all that the models have in common, which says nothing of an attacker."""
        return bool(self.attacks) and all(attack.startswith(NOISE) for attack in self.attacks)

    @property
    def worst_words(self) -> str:
        """Under what :meth:`worst` is, for the notes of charts and tables."""
        return "white noise, which is no attacker" if self.noise_only else "the attack that is worst for the model"

    def key(self, run: Results, attack: str, level: str) -> Key:
        """The condition of a run that is this attack at this level, as that run writes them.

        Raises:
            KeyError: the run has none.
        """
        found = self._find(run, attack, level)
        if found is None:
            raise KeyError(f"{run.folder} has no {attack} at {level}")
        return found

    @cached_property
    def comparable(self) -> bool:
        """Whether all runs that are compared attacked the same samples, so that it can be done case by case."""
        return _same_samples(self.compared)

    def worst(self, run: Results, level: str) -> Key:
        """The condition at a level under which a run has the lowest TVDI, of the attacks that all models had."""
        return min((self.key(run, attack, level) for attack in self.searches), key=lambda key: tvdi(run, key))

    @property
    def searches(self) -> list[str]:
        """The attacks without plain noise; if that is all there is, noise."""
        return [attack for attack in self.attacks if not attack.startswith(NOISE)] or self.attacks

    @cached_property
    def telling_level(self) -> str | None:
        """Where the best model is furthest ahead of the one it is shown against, which is not behind it there.

        Of a single model the smallest level. None without attacks.
        """
        if not self.attacks:
            return None
        if self.shown is None:
            return self.levels[0][0]
        best, other = self.ranked[0], self.shown

        def ahead(level: str) -> float:
            return tvdi(best, self.worst(best, level)) - tvdi(other, self.worst(other, level))

        return max((text for text, _ in self.levels), key=ahead)

    @cached_property
    def ranked(self) -> list[Results]:
        """The compared models, from the highest mean TVDI over the attacked levels to the lowest."""
        return sorted(self.compared, key=lambda run: -self.robust_mean(run))

    @cached_property
    def beaten(self) -> list[Results]:
        """The models than which the best one is more robust, in their order."""
        return [other for other in self.ranked[1:] if self.order(self.ranked[0], other) is Order.BETTER]

    @cached_property
    def shown(self) -> Results | None:
        """The model that the best one is shown against: the best that it beats, or else the second; None without."""
        return next(iter([*self.beaten, *self.ranked[1:]]), None) if self.attacks else None

    def order(self, run: Results, other: Results) -> Order:
        """Is ``run``, of the higher mean over levels, more robust than ``other``?

        That is asked once, of the mean; of no single level may the whole interval say the opposite. With more than two
        models p is corrected for the number of pairs.
        """
        mean = self.corrected_mean_difference(run, other)
        if mean is None:
            return Order.UNPAIRED
        levels = [self.difference(run, other, text) for text, _ in self.levels]
        if any(one is not None and one.interval.high < 0 for one in levels):
            return Order.MIXED
        return Order.BETTER if mean.clear and mean.interval.value >= SMALLEST else Order.UNCLEAR

    def robust_mean(self, run: Results) -> float:
        """Mean TVDI over the attacked levels, each under the run's worst attack."""
        return nan_mean([tvdi(run, self.worst(run, text)) for text, _ in self.levels])

    def mean_interval(self, run: Results) -> Interval:
        """Of the same mean."""
        return _mean_interval(run, [self.worst(run, text) for text, _ in self.levels])

    @cached_property
    def unit_resampled(self) -> str:
        """What the intervals come from, with a warning where that is samples."""
        if not self.few_cases:
            return "cases"
        return (
            f"samples (there are fewer than {FEWEST} cases; samples of one case resemble each other, so these "
            f"intervals are too narrow)"
        )

    @property
    def p_note(self) -> str:
        """What is to be known of p: how small it can be at all, or that it is too small; empty if neither matters."""
        if self.few_cases:
            return " Samples of one case resemble each other, so p is too small."
        table = self.compared[0].samples[UNTOUCHED]
        cases = len(units(table.cases, table.counts)[1])
        least = smallest_p(cases, self._permutations)
        corrected = len(self.pairs) * least
        never = corrected >= 1 - CONFIDENCE
        if least <= 0.001 and not never:
            return ""
        said = f" With {cases} cases no p can be below {least:.3f}"
        if len(self.pairs) > 1:
            said += " before that correction"
        if never:
            said += f", nor below {corrected:.3f} after it, so no model can be called more robust than another"
        return f"{said}."

    @property
    def _permutations(self) -> int:
        return permutations_for(len(self.pairs))

    @property
    def correction(self) -> str:
        """How p is corrected for the number of models; empty for two, where there is but one pair."""
        return f"Holm's correction for {len(self.pairs)} pairs of models" if len(self.pairs) > 1 else ""

    @cached_property
    def choice_note(self) -> str:
        """What the TVDI of an ensemble is of, and what resampling does to that; empty if none was run."""
        if not any("by_attack" in item for run in self.runs for item in run.attacked):
            return ""
        return (
            " The TVDI of an ensemble (autoattack) is the lowest that was found by taking the image of one of its "
            "members for each sample; that choice was made once, on all samples of a run, and resampling keeps it."
        )

    @cache  # noqa: B019 (settings live as long as the report)
    def interval(self, run: Results, key: Key) -> Interval:
        """Of a run's TVDI."""
        return tvdi_interval(units(run.samples[key].cases, run.samples[key].counts)[1])

    @property
    def pairs(self) -> list[tuple[Results, Results]]:
        """All pairs of compared models, each once: the one that was given later, and the other."""
        return [(later, first) for first, later in combinations(self.compared, 2)]

    def difference(self, run: Results, other: Results, level: str | None) -> Difference | None:
        """A run's TVDI minus another's, each under its own worst attack of a level, or without attack.

        None if they are not of the same samples.
        """
        keys = [UNTOUCHED if level is None else self.worst(one, level) for one in (run, other)]
        return self._difference(run, keys[0], other, keys[1])

    @cache  # noqa: B019 (settings live as long as the report)
    def _difference(self, run: Results, key: Key, other: Results, their_key: Key) -> Difference | None:
        if not self.comparable:
            return None
        if self.runs.index(run) < self.runs.index(other):  # resampled once a pair
            return _opposite(self._difference(other, their_key, run, key))
        one, two = run.samples[key], other.samples[their_key]
        ours, theirs = units(one.cases, one.counts)[1], units(two.cases, two.counts)[1]
        return tvdi_difference(ours, theirs, permutations=self._permutations)

    def adi_difference(self, run: Results, other: Results, level: str | None) -> Difference | None:
        """The same of ADI, the mean of the samples' own Dice, on the images of lowest Dice."""
        if not self.comparable:
            return None
        tables = [one.samples[UNTOUCHED if level is None else self.worst(one, level)] for one in (run, other)]
        ours, theirs = (dice_sums(table.cases, table.dice) for table in tables)
        return adi_difference(ours, theirs, permutations=self._permutations)

    @cache  # noqa: B019 (settings live as long as the report)
    def mean_difference(self, run: Results, other: Results) -> Difference | None:
        """Of the mean TVDI over the attacked levels: one question, however many levels there are."""
        if not self.comparable or not self.attacks:
            return None
        if self.runs.index(run) < self.runs.index(other):
            return _opposite(self.mean_difference(other, run))
        one, two = (
            np.stack([units(table.cases, table.counts)[1] for table in tables])
            for tables in (
                [model.samples[self.worst(model, text)] for text, _ in self.levels] for model in (run, other)
            )
        )
        return tvdi_difference(one, two, permutations=self._permutations)

    def corrected_mean_difference(self, run: Results, other: Results) -> Difference | None:
        """The same, with p corrected for the number of pairs of models that are compared (Holm)."""
        found = self.mean_difference(run, other)
        if found is None:
            return None
        whole = [self.mean_difference(*pair) for pair in self.pairs]
        corrected = holm([float("nan") if one is None else one.p for one in whole])
        pair = next(number for number, pair in enumerate(self.pairs) if set(pair) == {run, other})
        return found._replace(p=corrected[pair])

    def whole_cases(self, level: str) -> bool:
        """Whether all runs have nnU-Net's scores of whole cases, clean and at a level: one kind of Dice for all."""
        return all(run.cases.get(key) for run in self.runs for key in (UNTOUCHED, self.worst(run, level)))

    def class_dice(self, run: Results, key: Key, whole: bool) -> Array:
        """Dice of each case and class (cases, F), NaN where a class neither is nor was found.

        Args:
            whole: nnU-Net's, of the whole case; else that of the case's samples as TVDI pools them.
        """
        if whole:
            return np.array([scores["dice"] for scores in run.cases[key].values()], float)
        counts = run.samples[key].by_case()[1]
        return class_scores(counts[..., 0], counts[..., 1], counts[..., 2])

    @cache  # noqa: B019 (settings live as long as the report)
    def mean_over_levels(self, run: Results, attack: str) -> Interval:
        """Of the mean TVDI over clean and all levels: Table 3's Avg."""
        return _mean_interval(run, [UNTOUCHED, *(self.key(run, attack, level) for level, _ in self.levels)])

    def _has(self, run: Results, attack: str) -> bool:
        return all(self._find(run, attack, level) is not None for level, _ in self.levels)

    def _find(self, run: Results, attack: str, level: str) -> Key | None:
        value = next(value for text, value in self.levels if text == level)
        here = ((str(item["attack"]), str(item["level"])) for item in run.attacked if float(item["epsilon"]) == value)
        return next((key for key in here if self._is_same(run, key[0], attack)), None)

    def _is_same(self, run: Results, text: str, attack: str) -> bool:
        """Whether an attack of a run is one of the first run, by its name and by what stands behind it, where noted."""
        return same_attack(text, attack) and not other_definition(run, text, self.runs[0], attack)


def settings_of(runs: Sequence[Results]) -> list[Setting]:
    """Runs grouped by data, classes, protocol, norm, patch and normalisation, in the order in which they were given.

    A level means another thing for another patch, over all of which the L2 norm is taken, and for scans that are
    normalised otherwise. Runs that do not tell how they are stand with the first that do.
    """
    groups: dict[tuple[str, ProtocolName, Norm, str, tuple[str, ...]], list[Results]] = {}
    for run in runs:
        about, protocol = run.summary, run.summary["protocol"]
        patch = " × ".join(str(size) for size in about["patch_size"])
        key = (about["model"]["dataset"], protocol["name"], protocol["norm"], patch, tuple(about["classes"]))
        groups.setdefault(key, []).append(run)
    made = []
    for (dataset, name, norm, patch, _), together in groups.items():
        protocol, parts = Protocol(name, norm), _by_normalisation(together)
        for mine in parts:
            noted = next(filter(None, (normalisation(run, together) for run in mine)), None)
            scale = scale_of(noted)
            made.append(Setting(
                dataset, name, norm, patch, protocol.unit_in(scale), protocol.range_in(scale), mine, scale,
                in_words(noted) if noted else "", len(parts) > 1,
            ))  # fmt: skip
    return made


def normalisation(run: Results, others: Sequence[Results]) -> Mapping[str, Any] | None:
    """How a run's scans were normalised: as it tells itself, or one of the same plans; None if neither does."""

    def plan(one: Results) -> tuple[str | None, str]:
        return one.summary["model"].get("plans.json"), one.summary["model"]["configuration"]

    same = [run, *(other for other in others if plan(run)[0] is not None and plan(other) == plan(run))]
    return next(filter(None, (one.summary.get("normalisation") for one in same)), None)


def _by_normalisation(runs: Sequence[Results]) -> list[list[Results]]:
    noted = [normalisation(run, runs) for run in runs]
    texts = [None if one is None else json.dumps(one, sort_keys=True) for one in noted]
    first = next(filter(None, texts), "")
    groups: dict[str, list[Results]] = {}
    for run, text in zip(runs, texts, strict=True):
        groups.setdefault(first if text is None else text, []).append(run)
    return list(groups.values())


def _mean_interval(run: Results, keys: Sequence[Key]) -> Interval:
    """Of the mean TVDI over conditions, each of the same cases in a resample."""
    tables = [run.samples[key] for key in keys]
    return tvdi_interval(np.stack([units(table.cases, table.counts)[1] for table in tables]))


def _same_samples(runs: Sequence[Results]) -> bool:
    tables = [run.samples[UNTOUCHED] for run in runs]
    return all(
        np.array_equal(one.cases, other.cases)
        and np.array_equal(one.tiles, other.tiles)
        and np.array_equal(one.counts[:, :, [0, 2]].sum(2), other.counts[:, :, [0, 2]].sum(2))
        for one, other in pairwise(tables)
    )


def _opposite(difference: Difference | None) -> Difference | None:
    return None if difference is None else difference.opposite


def failed_checks(run: Results) -> list[str]:
    """Names of the checks that say that a run's figures are not to be trusted."""
    return [str(item["name"]) for item in run.summary["trust"] if not item["passed"]]


def colours_of(runs: Sequence[Results]) -> dict[str, str]:
    """A colour for each title."""
    titles = list(dict.fromkeys(run.title for run in runs))
    return {title: COLOURS[number % len(COLOURS)] for number, title in enumerate(titles)}


def tvdi(run: Results, key: Key) -> float:
    """Of a condition, in [0, 1]; NaN if it was not run."""
    figures = run.figures(key)
    return float("nan") if figures is None or figures["tvdi"] is None else float(figures["tvdi"])


def _levels(run: Results) -> dict[float, str]:
    """By value, the text that comes first."""
    found: dict[float, str] = {}
    for item in run.attacked:
        found.setdefault(float(item["epsilon"]), str(item["level"]))
    return found
