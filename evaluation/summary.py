"""Write what an evaluation found: summary.json, samples.csv, members.csv, cases.csv and table.md."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ima.evaluation.ensembles import attacked_by, figures_of_members, members_of
from nnunet_ima.evaluation.identity import digest, sealed
from nnunet_ima.evaluation.markdown import escaped
from nnunet_ima.evaluation.metrics import (
    SURFACE_TOLERANCE_MM,
    Array,
    CaseScore,
    adi,
    count_hd95,
    mean_case_dice,
    mean_hd95,
    mean_surface_dice,
    nan_mean,
    tvdi,
)
from nnunet_ima.evaluation.outcomes import CLAMP, CLEAN, KEPT, Outcome, unperturbed
from nnunet_ima.evaluation.survival import distance_text, end_to_end_figures, end_to_end_lines
from nnunet_ima.evaluation.trust import check
from nnunet_ima.files import write_text

SCHEMA = "nnunet_ima/evaluation/4"


def summarise(head: Mapping[str, Any], outcomes: Sequence[Outcome], smallest_chunk: int | None) -> dict[str, Any]:
    """The content of summary.json; figures are shares in [0, 1], distances in mm, None where undefined.

    Args:
        head: see :func:`~nnunet_ima.evaluation.description.describe_run`.
        outcomes: clean first.
        smallest_chunk: to what the samples in a pass had to be reduced for want of memory, None if they had not.
    """
    by_name = {outcome.attack: outcome for outcome in outcomes if outcome.level is None}
    attacked = [outcome for outcome in outcomes if outcome.level is not None]
    threshold = float(head["criterion"]["dice_threshold"])
    summary: dict[str, Any] = {"schema": SCHEMA, **head, "clean": _figures(by_name[CLEAN], threshold)}
    if smallest_chunk is not None:
        summary["samples_in_a_pass_reduced_to"] = smallest_chunk
    if CLAMP in by_name:
        summary["clamp_only"] = _figures(by_name[CLAMP], threshold)
    before = unperturbed(outcomes)
    summary["results"] = [
        {**_result(outcome, threshold), **end_to_end_figures(before, outcome)} for outcome in attacked
    ]
    found = [finding._asdict() for finding in by_name[CLEAN].findings]
    summary["trust"] = found + check(before, attacked)
    summary["trusted"] = all(item["passed"] for item in summary["trust"])
    plain: dict[str, Any] = _plain(summary)
    return plain


def write_all(folder: Path, outcomes: Sequence[Outcome], summary: Mapping[str, Any]) -> None:
    """Write all tables; summary.json comes last, so that it stands for a complete set, and seals itself and them."""
    regions = summary["labels"]
    tables = {"samples.csv": _samples_csv(outcomes, regions), "cases.csv": _cases_csv(outcomes, regions)}
    if any(members_of(outcome) for outcome in outcomes):
        tables["members.csv"] = _members_csv(outcomes, regions)
    if "end_to_end" in summary:
        tables["end_to_end.csv"] = _end_to_end_csv(outcomes, regions)
    for name, text in tables.items():
        write_text(folder / name, text)
    write_text(folder / "table.md", markdown_table(summary))
    complete = sealed({**summary, "tables": {name: digest(text) for name, text in tables.items()}})
    write_text(folder / "summary.json", json.dumps(complete, indent=2) + "\n")


def markdown_table(summary: Mapping[str, Any]) -> str:
    """The figures as a table for people, with what they mean above it."""
    model, protocol = summary["model"], summary["protocol"]
    lines = [
        escaped(f"# {model['trainer']} on {model['dataset']}, {model['configuration']}, fold {model['fold']}"),
        "",
        f"Protocol `{protocol['name']}`, norm {_norm_name(protocol['norm'])}; level in {protocol['unit']}; "
        f"a perturbed image stays in {protocol['range']}.",
        f"{summary['clean']['n_samples']} samples (slices or tiles with foreground), "
        f"{summary['clean']['n_cases']} whole cases, {_seeds(summary)}. Dice in %. Correct: Dice above "
        f"{100 * summary['criterion']['dice_threshold']:g} %.",
        "",
        "| attack | level | TVDI | ADI | correct samples | case Dice | HD95 (mm) | surface Dice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        _row("none (clean)", "0", summary["clean"]),
    ]
    if "clamp_only" in summary:
        lines.append(_row("none, clamped to [0, 1]", "0", summary["clamp_only"]))
    lines += [_row(result["attack"], result["level"], result) for result in summary["results"]]
    averages = average_tvdi(summary)
    if averages:
        lines += ["", "Mean TVDI over clean and all levels (Table 3's Avg):", ""]
        lines += [f"- {attack}: {_percent(value)}" for attack, value in averages.items()]
    lines += end_to_end_lines(summary, summary.get("clamp_only", summary["clean"]))
    lines += _ensembles(summary)
    if not summary["trusted"]:
        lines += ["", "**These figures are not to be trusted: a check failed.**"]
    if nothing_learned(summary):
        lines += ["", f"**{nothing_to_lose(summary)}**"]
    lines += ["", "Checks:", ""]
    lines += [f"- {'passed' if item['passed'] else 'FAILED'}: {item['sentence']}" for item in summary["trust"]]
    if summary["trained_on_these_cases"]:
        lines += ["", "The model was trained on these very cases, or some of them; the figures flatter it."]
    elif summary["started_from_unknown_weights"]:
        lines += ["", "The training started from other weights; whether those learned from these cases is not known."]
    elif summary.get("exported_from", {}).get("started_from_unknown", False) is None:
        lines += ["", "It was exported by a version that did not note whether its training started from other weights."]
    if "samples_in_a_pass_reduced_to" in summary:
        lines += [
            "",
            f"The memory was not enough; some passes held {summary['samples_in_a_pass_reduced_to']} samples, on which "
            f"the last digits of a result depend.",
        ]
    return "\n".join(lines) + "\n"


# In a table of several models, and below it.
UNLEARNED = "has not learned its task"
UNLEARNED_NOTE = (
    "**Of a model that has not learned its task no sample is correct without any attack, so that what attacks leave of "
    "it says nothing of robustness; train it longer, or see whether it fits these data.**"
)

UNTRUSTED = "not to be trusted"
UNTRUSTED_NOTE = (
    "**Where figures are not to be trusted, a check of the attack failed: what it left may not be robustness, but an "
    "attack that did not work; `table.md` in the folder of that evaluation says which check.**"
)


def nothing_learned(summary: Mapping[str, Any]) -> bool:
    """Whether without any attack not one sample is correct, nor TVDI above the same threshold: nothing can be lost.

    Not by the samples alone: where few were attacked, all may be hard ones of a model whose TVDI is good.

    Args:
        summary: ``clean`` (``n_samples``, ``robust_share``, ``tvdi``) and ``criterion`` of it are read.
    """
    clean = summary["clean"]
    none_correct = int(clean["n_samples"]) > 0 and clean["robust_share"] == 0
    return bool(none_correct and (clean["tvdi"] or 0.0) <= summary["criterion"]["dice_threshold"])


def nothing_to_lose(summary: Mapping[str, Any]) -> str:
    """What that means, in a sentence."""
    clean, threshold = summary["clean"], 100 * summary["criterion"]["dice_threshold"]
    return (
        f"Without any attack none of the {clean['n_samples']} attacked samples has a Dice above {threshold:g} %, and "
        f"TVDI is {_percent(clean['tvdi'])} %: this model has not learned its task, so that what attacks leave of it "
        f"says nothing of robustness; train it longer, or see whether it fits these data."
    )


def _ensembles(summary: Mapping[str, Any]) -> list[str]:
    """What each member of an ensemble reached on its own, and what the ensemble's TVDI is made of."""
    lines: list[str] = []
    for result in summary["results"]:
        if "by_attack" not in result:
            continue
        others = result["n_samples"] - result["tvdi_points"].get(KEPT, 0)
        lines += [
            "",
            f"Members of {result['attack']} at {result['level']}: ADI over the samples that each attacked; TVDI over "
            f"all, with the ensemble's image of the lowest Dice where a member was not asked any more",
            "",
        ]
        lines += [
            f"- {name}: ADI {_percent(part['adi'])}, TVDI {_percent(part['tvdi'])} ({part['attacked_samples']} samples)"
            for name, part in result["by_attack"].items()
        ]
        lines += [
            "",
            f"Of {result['n_samples']} samples, {others} count in the ensemble's TVDI with another of its points than "
            f"the one of the lowest Dice, as that makes the TVDI of all lower. All other figures are of the images of "
            f"the lowest Dice, whose TVDI is {_percent(result['tvdi_of_lowest_dice'])}.",
        ]
    return lines


def average_tvdi(summary: Mapping[str, Any]) -> dict[str, float]:
    """For each attack the mean TVDI over clean and all its levels, as the column Avg of Table 3."""
    values: dict[str, list[float]] = {}
    for result in summary["results"]:
        values.setdefault(result["attack"], [_number(summary["clean"]["tvdi"])]).append(_number(result["tvdi"]))
    return {attack: nan_mean(mine) for attack, mine in values.items()}


def _figures(outcome: Outcome, threshold: float) -> dict[str, Any]:
    dice = np.array([score.dice for score in outcome.samples])
    scores = list(outcome.cases.values())
    n_hd95, n_structures = count_hd95(scores)
    return {
        "tvdi": tvdi(np.array([point.counts for point in outcome.points])),
        "adi": adi(dice),
        "robust_share": float((dice > threshold).mean()),
        "case_dice": mean_case_dice(scores),
        "hd95": mean_hd95(scores),
        "n_hd95": n_hd95,
        "surface_dice": mean_surface_dice(scores),
        "n_structures": n_structures,
        "n_samples": len(dice),
        "n_cases": len(scores),
    }


def _result(outcome: Outcome, threshold: float) -> dict[str, Any]:
    assert outcome.level is not None
    return {
        "attack": outcome.attack,
        "level": outcome.level.text,
        "epsilon": outcome.level.value,
        "epsilon_z_scores": nan_mean([score.epsilon for score in outcome.samples]),
        **_figures(outcome, threshold),
        "tvdi_of_lowest_dice": tvdi(np.array([score.counts for score in outcome.samples])),
        "forward_passes_per_sample": nan_mean([float(score.passes) for score in outcome.samples]),
        "backward_passes_per_sample": nan_mean([float(score.backward_passes) for score in outcome.samples]),
        **figures_of_members(outcome, threshold),
    }


def _samples_csv(outcomes: Sequence[Outcome], regions: Sequence[str]) -> str:
    counts = _count_names(regions)
    header = ["attack", "level", "case", "tile", "dice", "clean_dice", "epsilon", "norm", "forward_passes", *counts]
    header += ["tvdi_point", *(f"tvdi_{name}" for name in counts)]
    rows = [
        [outcome.attack, outcome.level.text if outcome.level else "0", score.sample.case, score.sample.tile,
         f"{score.dice:.6f}", f"{score.clean_dice:.6f}", f"{score.epsilon:.6g}", f"{score.norm:.6g}", score.passes,
         *_whole(score.counts), point.name, *_whole(point.counts)]
        for outcome in outcomes
        for score, point in zip(outcome.samples, outcome.points, strict=True)
    ]  # fmt: skip
    return _csv(header, rows)


def _members_csv(outcomes: Sequence[Outcome], regions: Sequence[str]) -> str:
    header = ["attack", "level", "member", "case", "tile", "dice", *_count_names(regions)]
    rows = [
        [outcome.attack, outcome.level.text if outcome.level else "0", member, *sample, f"{part.dice:.6f}",
         *_whole(part.counts)]
        for outcome in outcomes
        for member in members_of(outcome)
        for sample, part in attacked_by(outcome, member)
    ]  # fmt: skip
    return _csv(header, rows)


def _cases_csv(outcomes: Sequence[Outcome], regions: Sequence[str]) -> str:
    rows = [
        [outcome.attack, outcome.level.text if outcome.level else "0", name, *_case_cells(score)]
        for outcome in outcomes
        for name, score in sorted(outcome.cases.items())
    ]
    return _csv(["attack", "level", "case", *_case_head(regions)], rows)


def _end_to_end_csv(outcomes: Sequence[Outcome], regions: Sequence[str]) -> str:
    more = ["found_by", "norm", "norm_carried_over", "forward_passes", "backward_passes"]
    rows = [
        [outcome.attack, outcome.level.text, name, *_case_cells(one.score), one.found_by,
         *(f"{norm:.6g}" for norm in (one.norm, one.carried_norm)),
         one.forward_passes, one.backward_passes]
        for outcome in outcomes
        if outcome.level is not None
        for name, one in sorted(outcome.end_to_end.items())
    ]  # fmt: skip
    return _csv(["attack", "level", "case", *_case_head(regions), *more], rows)


def _case_head(regions: Sequence[str]) -> list[str]:
    kinds = ("dice", "hd95_mm", f"surface_dice_{SURFACE_TOLERANCE_MM:g}mm")
    return [f"{kind}_{region}" for kind in kinds for region in regions]


def _case_cells(score: CaseScore) -> list[str]:
    values = (*score.dice, *score.hd95, *score.surface_dice)
    return ["" if math.isnan(value) else f"{value:.6f}" for value in values]


def _count_names(regions: Sequence[str]) -> list[str]:
    return [f"{kind}_{region}" for region in regions for kind in ("tp", "fp", "fn")]


def _whole(counts: Array) -> list[int]:
    return [int(count) for count in counts.flatten()]


def _csv(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _row(attack: str, level: str, figures: Mapping[str, Any]) -> str:
    shares = [_percent(figures[key]) for key in ("tvdi", "adi", "robust_share", "case_dice")]
    distance, surface = distance_text(figures), _percent(figures["surface_dice"])
    return f"| {attack} | {level} | {' | '.join(shares)} | {distance} | {surface} |"


def _percent(value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _seeds(summary: Mapping[str, Any]) -> str:
    samples = summary.get("samples_seed", summary["seed"])
    chosen = summary["max_samples"] is not None and samples != summary["seed"]
    return f"seed {summary['seed']}" + (f" (samples chosen with {samples})" if chosen else "")


def _norm_name(norm: str) -> str:
    return {"l2": "L2", "linf": "Linf"}[norm]


def _plain(value: Any) -> Any:
    """JSON has no NaN: undefined becomes None."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
