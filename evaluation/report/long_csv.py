"""All figures of a report as one table for other programs: a row a figure, each number in a cell of its own."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from nnunet_ima.evaluation.metrics import class_scores, nan_mean
from nnunet_ima.evaluation.report.figures import Setting, failed_checks
from nnunet_ima.evaluation.report.published import level_value, paper_task, published_attack, published_for
from nnunet_ima.evaluation.results import CLAMPED, UNTOUCHED, Key, Results
from nnunet_ima.evaluation.statistics import Difference, holm

# Names in summary.json, and here, where the unit is part of a name.
_AS_THERE = (
    "tvdi_of_lowest_dice", "adi", "robust_share", "forward_passes_per_sample", "backward_passes_per_sample",
)  # fmt: skip
OF_SAMPLES = {name: name for name in _AS_THERE}
OF_CASES = {"case_dice": "case_dice", "surface_dice": "surface_dice_1mm"}
END_TO_END = {
    "samples_dice": "samples_dice", "case_dice": "case_dice_end_to_end",
    "survives_carried_over": "survives_carried_over", "survives_end_to_end": "survives_end_to_end",
    "surface_dice": "surface_dice_1mm_end_to_end",
}  # fmt: skip
OF_A_CASE = {"dice": "case_dice", "hd95_mm": "hd95_mm", "surface_dice_1mm": "surface_dice_1mm"}
NAN = float("nan")


@dataclass(frozen=True)
class Figure:
    """A row: what a figure is of, and the figure; nothing stands in what does not apply, or is not known.

    Attributes:
        dataset, protocol, norm, patch: of the setting, as ``normalisation`` is; figures of others are not comparable.
        model: its name in the report, or the method's in the paper.
        against: of a difference: which other model's figure was taken off.
        attack, level: as the run has them; ``clean`` or ``clamp-only`` and 0 without attack.
        epsilon: the level as a number.
        case, label: of a single case, of a class; its name.
        metric: what the value is. Dice and shares are from 0 to 1, distances in mm.
        value: the figure.
        low, high: its 95 % interval.
        p, p_holm: of a difference: of the paired test, and corrected for the pairs of models of this level and metric.
        n: how many samples, cases or structures it is of.
        source: ``here``, or where it was published.
        trusted: ``no`` if a check says that the model's figures are not to be trusted; of published ones nothing.
        normalisation: of the setting's scans; nothing if no run tells.
    """

    dataset: str
    protocol: str
    norm: str
    patch: str
    model: str
    against: str = ""
    attack: str = ""
    level: str = ""
    epsilon: float = NAN
    case: str = ""
    label: str = ""
    metric: str = ""
    value: float = NAN
    low: float = NAN
    high: float = NAN
    p: float = NAN
    p_holm: float = NAN
    n: int | None = None
    source: str = "here"
    trusted: str = ""
    normalisation: str = ""


HEAD = [field.name for field in fields(Figure)]


def as_csv(settings: Iterable[Setting]) -> str:
    """All figures of these settings, with one head."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(HEAD)
    figures = (figure for setting in settings for figure in figures_of(setting))
    rows = (tuple(_cell(getattr(figure, name)) for name in HEAD) for figure in figures)
    # What was published belongs to several settings of one data set.
    writer.writerows(dict.fromkeys(rows))
    return stream.getvalue()


def figures_of(setting: Setting) -> Iterator[Figure]:
    """Of all conditions of each run; then differences between models, and what was published."""
    for run in setting.runs:
        yield from _of_run(setting, run)
    yield from _differences(setting)
    yield from _published(setting)


def _of_run(setting: Setting, run: Results) -> Iterator[Figure]:
    conditions: list[tuple[Key, Mapping[str, Any]]] = [(UNTOUCHED, run.summary["clean"])]
    if "clamp_only" in run.summary:
        conditions.append((CLAMPED, run.summary["clamp_only"]))
    conditions += [((str(item["attack"]), str(item["level"])), item) for item in run.attacked]
    for key, found in conditions:
        about = _about(setting, run, key, float(found.get("epsilon", 0.0)))
        interval, samples, cases = setting.interval(run, key), int(found["n_samples"]), int(found["n_cases"])
        yield Figure(**about, metric="tvdi", value=interval.value, low=interval.low, high=interval.high, n=samples)
        for names, number in ((OF_SAMPLES, samples), (OF_CASES, cases)):
            for name, metric in names.items():
                if found.get(name) is not None:
                    yield Figure(**about, metric=metric, value=float(found[name]), n=number)
        yield from _distance(about, found, "hd95_mm")
        for name, metric in END_TO_END.items():
            whole = found.get("end_to_end", {})
            if whole.get(name) is not None:
                yield Figure(**about, metric=metric, value=float(whole[name]), n=int(whole["n_cases"]))
        yield from _distance(about, found.get("end_to_end", {}), "hd95_mm_end_to_end")
        yield from _classes(setting, run, key, about)
        yield from _cases(setting, run, key, about)
    for attack in setting.attacks:
        about = _about(setting, run, (attack, ""), NAN)
        value, low, high = setting.mean_over_levels(run, attack)
        yield Figure(**about, metric="tvdi_mean_of_clean_and_levels", value=value, low=low, high=high)


def _distance(about: Mapping[str, Any], found: Mapping[str, Any], metric: str) -> Iterator[Figure]:
    """The mean HD95 and of how many structures it is, as far as the run tells."""
    if found.get("hd95") is not None:
        yield Figure(**about, metric=metric, value=float(found["hd95"]), n=found.get("n_hd95"))


def _classes(setting: Setting, run: Results, key: Key, about: Mapping[str, Any]) -> Iterator[Figure]:
    counts = run.samples[key].counts.sum(0)
    dice = class_scores(counts[:, 0], counts[:, 1], counts[:, 2])
    for name, value in zip(_names(setting), dice, strict=True):
        yield Figure(**about, label=name, metric="tvdi", value=float(value), n=len(run.samples[key].cases))


def _cases(setting: Setting, run: Results, key: Key, about: Mapping[str, Any]) -> Iterator[Figure]:
    """Of each case: its samples' Dice pooled, and nnU-Net's and the distances of the whole case."""
    names, counts = run.samples[key].by_case()
    pooled = class_scores(counts[..., 0], counts[..., 1], counts[..., 2])
    for case, row in zip(names, pooled, strict=True):
        yield from _of_case(setting, about, case, "samples_dice_of_case", row.tolist())
    for case, scores in run.cases.get(key, {}).items():
        for kind, metric in OF_A_CASE.items():
            yield from _of_case(setting, about, case, metric, scores[kind])


def _of_case(
    setting: Setting, about: Mapping[str, Any], case: str, metric: str, values: Sequence[float]
) -> Iterator[Figure]:
    for name, value in zip(_names(setting), values, strict=True):
        yield Figure(**about, case=case, label=name, metric=metric, value=value)
    known = sum(value == value for value in values)
    yield Figure(**about, case=case, metric=f"{metric}_mean_of_classes", value=nan_mean(list(values)), n=known)


def _differences(setting: Setting) -> Iterator[Figure]:
    if len(setting.compared) < 2 or not setting.comparable or not setting.attacks:
        return
    for level, value in ((None, 0.0), *setting.levels):
        for metric, difference in (("tvdi", setting.difference), ("adi", setting.adi_difference)):
            found = [difference(run, other, level) for run, other in setting.pairs]
            yield from _pairs(setting, f"{metric}_difference", found, level, value)
    means = [setting.mean_difference(run, other) for run, other in setting.pairs]
    yield from _pairs(setting, "tvdi_difference_of_means_over_levels", means, "", NAN)


def _pairs(
    setting: Setting, metric: str, found: Sequence[Difference | None], level: str | None, epsilon: float
) -> Iterator[Figure]:
    corrected = holm([NAN if one is None else one.p for one in found])
    for (run, other), one, p in zip(setting.pairs, found, corrected, strict=True):
        if one is not None:
            key = UNTOUCHED if level is None else ("worst of each model", level)
            yield Figure(
                **_about(setting, run, key, epsilon), against=other.title, metric=metric, value=one.interval.value,
                low=one.interval.low, high=one.interval.high, p=one.p, p_holm=p,
            )  # fmt: skip


def _published(setting: Setting) -> Iterator[Figure]:
    """Of the attacks for which the report shows them."""
    task = paper_task(setting.dataset)
    if task is None:
        return
    attacks = [published_attack(setting.protocol, str(item["attack"])) for run in setting.runs for item in run.attacked]
    for attack in dict.fromkeys(filter(None, attacks)):
        for row in published_for(setting.runs[0].summary, attack):
            about: dict[str, Any] = {
                "dataset": task.dataset, "protocol": setting.protocol, "norm": setting.norm, "patch": "",
                "model": row.method, "source": row.source, "metric": "tvdi",
            }  # fmt: skip
            if row.clean is not None:
                yield Figure(**about, attack=UNTOUCHED[0], level=UNTOUCHED[1], epsilon=0.0, value=row.clean / 100)
            for level, value in row.levels.items():
                if value is not None:
                    yield Figure(**about, attack=attack, level=level, epsilon=level_value(level), value=value / 100)


def _about(setting: Setting, run: Results, key: Key, epsilon: float) -> dict[str, Any]:
    return {
        "dataset": setting.dataset, "protocol": setting.protocol, "norm": setting.norm, "patch": setting.patch,
        "model": run.title, "attack": key[0], "level": key[1], "epsilon": epsilon,
        "trusted": "no" if failed_checks(run) else "yes", "normalisation": setting.normalisation,
    }  # fmt: skip


def _names(setting: Setting) -> list[str]:
    return [str(name) for name in setting.runs[0].summary["classes"]]


def _cell(value: str | float | None) -> str | float:
    """Nothing where there is no number: an empty cell is a missing one to every reader."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else value
