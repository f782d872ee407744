"""How much of what an attack takes from samples is lost by whole cases too, carried over and end to end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from nnunet_ima.evaluation.metrics import (
    class_scores,
    count_hd95,
    mean_case_dice,
    mean_hd95,
    mean_over_classes,
    mean_surface_dice,
    nan_mean,
)
from nnunet_ima.evaluation.outcomes import Outcome

# A share of less than a point of Dice says nothing.
SMALLEST_EFFECT = 0.01


def end_to_end_figures(unperturbed: Outcome, attacked: Outcome) -> dict[str, Any]:
    """What the attack through the sliding window did; empty if there was none.

    The shares that survive are (C₀ − C) / (S₀ − S): C is nnU-Net's case Dice; S is the Dice of the samples of each case
    together, averaged as case Dice is; 0 means without attack (under the protocol ``paper`` clamped). Both are of the
    cases that hold samples. NaN where the attack takes less than one point from the samples.

    Args:
        unperturbed: the clean outcome; under the ``paper`` protocol the clamped one.
        attacked: that of an attack.
    """
    found = attacked.end_to_end
    if not found:
        return {}
    scores = [one.score for one in found.values()]
    with_samples = {score.sample.case for score in attacked.samples} & found.keys()
    samples_before, samples_after = (_dice_of_samples(one, with_samples) for one in (unperturbed, attacked))
    before, carried, own = (
        mean_case_dice([cases[name] for name in sorted(with_samples)])
        for cases in (unperturbed.cases, attacked.cases, {name: one.score for name, one in found.items()})
    )
    effect = samples_before - samples_after
    n_hd95, n_structures = count_hd95(scores)
    return {
        "end_to_end": {
            "case_dice": mean_case_dice(scores),
            "hd95": mean_hd95(scores),
            "n_hd95": n_hd95,
            "surface_dice": mean_surface_dice(scores),
            "n_structures": n_structures,
            "n_cases": len(scores),
            "samples_dice_unperturbed": samples_before,
            "samples_dice": samples_after,
            "survives_carried_over": _share(before - carried, effect),
            "survives_end_to_end": _share(before - own, effect),
            "found_by": dict(sorted(Counter(one.found_by for one in found.values()).items())),
            "largest_norm_in_a_window": max(one.norm for one in found.values()),
            "largest_norm_in_a_window_carried_over": max(one.carried_norm for one in found.values()),
            "forward_passes_per_case": nan_mean([float(one.forward_passes) for one in found.values()]),
            "backward_passes_per_case": nan_mean([float(one.backward_passes) for one in found.values()]),
        }
    }


def end_to_end_lines(summary: Mapping[str, Any], unperturbed: Mapping[str, Any]) -> list[str]:
    """A section of table.md; empty if whole cases were not attacked."""
    attacked = [result for result in summary["results"] if "end_to_end" in result]
    if not attacked:
        return []
    about = summary["end_to_end"]
    knows = "and its mirroring" if about["mirroring_known_to_the_attack"] else "not through its mirroring"
    how = knows if about["mirrored_axes"] else "this model is not mirrored"
    lines = [
        "",
        f"Whole cases attacked through nnU-Net's sliding window ({how}), on the tiles and levels of the samples. "
        f"Survives: the share of the Dice lost by the samples of a case that the case loses too.",
        "",
        "| attack | level | samples' Dice | case Dice, carried over | end to end | survives, carried over | end to end "
        "| HD95 (mm) | surface Dice |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first = attacked[0]["end_to_end"]
    lines.append(
        f"| none | 0 | {_percent(first['samples_dice_unperturbed'])} | {_percent(unperturbed['case_dice'])} "
        f"| {_percent(unperturbed['case_dice'])} | – | – | {distance_text(unperturbed)} "
        f"| {_percent(unperturbed['surface_dice'])} |"
    )
    for result in attacked:
        one = result["end_to_end"]
        shares = (one["samples_dice"], result["case_dice"], one["case_dice"])
        survive = (one["survives_carried_over"], one["survives_end_to_end"])
        cells = [*map(_percent, shares), *map(_percent, survive), distance_text(one), _percent(one["surface_dice"])]
        lines.append(f"| {result['attack']} | {result['level']} | {' | '.join(cells)} |")
    return lines


def _dice_of_samples(outcome: Outcome, cases: set[str]) -> float:
    rows = []
    for name in sorted(cases):
        counts = np.sum([score.counts for score in outcome.samples if score.sample.case == name], 0)
        rows.append(class_scores(counts[:, 0], counts[:, 1], counts[:, 2]).tolist())
    return mean_over_classes(rows)


def _share(of_cases: float, of_samples: float) -> float:
    return of_cases / of_samples if of_samples >= SMALLEST_EFFECT else float("nan")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def distance_text(figures: Mapping[str, Any]) -> str:
    """The mean HD95 in mm, with how many of the structures have one."""
    value = "–" if figures["hd95"] is None else f"{figures['hd95']:.1f}"
    return f"{value} ({figures['n_hd95']} of {figures['n_structures']})" if figures["n_structures"] else value
