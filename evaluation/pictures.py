"""The two pictures of an evaluation: Dice against noise level, and the samples that lost most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.outcomes import Outcome
from nnunet_ima.files import atomic_path

LINE_STYLES = ("-", "--", ":", "-.")
# Names of cases, classes and attacks stand as they are: a dollar sign in one begins no formula.
STYLE: list[str | dict[str, bool]] = ["default", {"text.parse_math": False}]
TRUTH, BEFORE, AFTER = "#2ca02c", "#1f77b4", "#d62728"


def draw_dice_against_level(summary: Mapping[str, Any], file: Path) -> None:
    """TVDI of each attack over the levels, from the clean value at 0; with the clamp alone as a dashed line."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(figsize=(7, 4.5), dpi=130, layout="constrained")
        ticks = {0.0: "0"}
        for attack in dict.fromkeys(result["attack"] for result in summary["results"]):
            mine = [result for result in summary["results"] if result["attack"] == attack]
            points = sorted((r["epsilon"], 100 * r["tvdi"]) for r in mine)
            ticks |= {result["epsilon"]: result["level"] for result in mine}
            axes.plot(
                [0.0, *(x for x, _ in points)],
                [100 * summary["clean"]["tvdi"], *(y for _, y in points)],
                marker="o",
                label=attack,
            )
        if "clamp_only" in summary:
            axes.axhline(
                100 * summary["clamp_only"]["tvdi"], color="grey", linestyle="--", label="clamp only, no noise"
            )
        axes.axhline(100 * summary["criterion"]["dice_threshold"], color="grey", linestyle=":", linewidth=1)
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_ylim(0, 100)
        axes.set_xlabel(f"noise level ({summary['protocol']['unit']})")
        axes.set_ylabel("TVDI (%)")
        model = summary["model"]
        axes.set_title(
            f"{model['trainer']}, {model['dataset']} {model['configuration']}, {summary['protocol']['name']}"
        )
        axes.grid(alpha=0.3)
        axes.legend()
        _save(figure, file)


def draw_worst(outcome: Outcome, classes: Sequence[str], unit: str, file: Path) -> None:
    """The samples of ``outcome`` that lost most Dice: image, perturbed image, perturbation, contours of ``classes``.

    ``unit`` is that of the network's input, in words.
    """
    examples = outcome.worst
    with plt.style.context(STYLE):
        figure, rows = plt.subplots(
            len(examples), 5, figsize=(13, 2.9 * len(examples) + 0.8), dpi=110, squeeze=False, layout="constrained"
        )
        for axes, example in zip(rows, examples, strict=True):
            _draw_example(axes, example, unit)
        level = f" at {outcome.level.text}" if outcome.level else ""
        figure.suptitle(f"Samples that lost most Dice under {outcome.attack}{level}")
        handles = [Line2D([], [], color=c, label=t) for c, t in
                   ((TRUTH, "reference"), (BEFORE, "prediction before"), (AFTER, "prediction after"))]  # fmt: skip
        handles += [Line2D([], [], color="grey", linestyle=style, label=name)
                    for name, style in zip(classes, cycle(LINE_STYLES), strict=False)]  # fmt: skip
        figure.legend(handles=handles, loc="outside lower center", ncols=6, frameon=False)
        _save(figure, file)


def _draw_example(axes: Sequence[Axes], example: Example, unit: str) -> None:
    image, perturbed = example.image, example.perturbed
    truth, before, after = example.target, example.before, example.after
    difference = perturbed - image
    largest = max(float(np.abs(difference).max()), 1e-12)
    for one, pixels in zip(axes, (image, perturbed, difference, image, perturbed), strict=True):
        if pixels is difference:
            shown = one.imshow(pixels, cmap="RdBu_r", vmin=-largest, vmax=largest)
            plt.colorbar(shown, ax=one, fraction=0.046, label=unit)
        else:
            one.imshow(pixels, cmap="gray", vmin=float(image.min()), vmax=float(image.max()))
        one.set_xticks([])
        one.set_yticks([])
    _contours(axes[3], truth, TRUTH)
    _contours(axes[3], before, BEFORE)
    _contours(axes[4], truth, TRUTH)
    _contours(axes[4], after, AFTER)
    axes[0].set_title("image", fontsize=9)
    axes[0].set_ylabel(example.title, fontsize=8)
    axes[1].set_title("perturbed", fontsize=9)
    axes[2].set_title("perturbation", fontsize=9)
    axes[3].set_title(f"before: Dice {100 * example.dice_before:.0f} %", fontsize=9)
    axes[4].set_title(f"after: Dice {100 * example.dice_after:.0f} %", fontsize=9)


def _contours(axes: Axes, masks: np.ndarray[Any, Any], colour: str) -> None:
    for mask, style in zip(masks, cycle(LINE_STYLES), strict=False):
        if mask.any() and not mask.all():
            axes.contour(mask.astype(float), levels=[0.5], colors=colour, linewidths=1.2, linestyles=style)


def _save(figure: Any, file: Path) -> None:
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)
