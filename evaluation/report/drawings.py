"""The charts of a setting: what they show, from its figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

import numpy as np
from markupsafe import Markup

from nnunet_ima.evaluation.metrics import Array
from nnunet_ima.evaluation.report.charts import Axis, Point, Series, axis_around, chart, percent_axis
from nnunet_ima.evaluation.report.figures import NOISE, Setting
from nnunet_ima.evaluation.report.sentences import not_compared, percent
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results

# More box plots side by side could not be told apart.
MOST_BOXES = 24


@dataclass(frozen=True)
class Drawing:
    """A chart and what it says."""

    title: str
    picture: Markup
    caption: str


def drawings_of(setting: Setting, colours: Mapping[str, str]) -> list[Drawing]:
    """Those that make sense for a setting."""
    made = [
        _dice_against_level(setting, colours),
        _clean_against_robust(setting, colours),
        _cases(setting, colours),
        *_classes(setting, colours),
        _sizes(setting, colours),
        _margins(setting, colours),
    ]
    return [drawing for drawing in made if drawing is not None]


def _dice_against_level(setting: Setting, colours: Mapping[str, str]) -> Drawing | None:
    if setting.telling_level is None:
        return None
    ticks = {0.0: "0", **{value: text for text, value in setting.levels}}
    noise = None if setting.noise_only else next((one for one in setting.attacks if one.startswith(NOISE)), None)
    series = []
    for run in setting.runs:
        colour = colours[run.title]
        attacked = [_point(setting, run, 0.0, setting.start)]
        attacked += [_point(setting, run, value, setting.worst(run, text)) for text, value in setting.levels]
        series.append(Series(run.title, colour, attacked))
        if noise is not None:
            points = [_point(setting, run, 0.0, setting.start)]
            points += [_point(setting, run, value, setting.key(run, noise, text)) for text, value in setting.levels]
            plain = [Point(point.x, point.y, title=point.title) for point in points]
            series.append(Series(f"{run.title}, noise only", colour, plain, dashed=True, opacity=0.6))
    x = Axis(f"level: {setting.norm_name}, {setting.unit}", 0.0, 1.03 * max(ticks), ticks)
    return Drawing(
        "Dice against level",
        chart(f"Dice against level: {setting.name}", x, percent_axis("Dice (TVDI, %)"), series),
        f"Solid: of each level {setting.worst_words}; the band is the 95 % interval. "
        + ("Dashed: plain noise of the same size. " if noise is not None else "")
        + ("" if setting.noise_only else "A model that holds stays high on the solid line. ")
        + f"At 0: {setting.start_name}. {not_compared(setting)}".rstrip(),
    )


def _clean_against_robust(setting: Setting, colours: Mapping[str, str]) -> Drawing | None:
    if setting.telling_level is None or setting.noise_only or len(setting.runs) < 2:
        return None
    series = []
    for run in setting.runs:
        robust, clean = setting.mean_interval(run), setting.interval(run, UNTOUCHED)
        point = Point(
            100 * clean.value, 100 * robust.value, 100 * robust.low, 100 * robust.high,
            f"{run.title}: clean {percent(clean)}, attacked {percent(robust)}", 100 * clean.low, 100 * clean.high,
        )  # fmt: skip
        series.append(Series(run.title, colours[run.title], [point], cloud=True))
    return Drawing(
        "Clean against robust",
        chart(
            f"Clean against robust Dice: {setting.name}",
            percent_axis("Dice on clean scans (TVDI, %)"),
            percent_axis("mean Dice over attacked levels (%)"),
            series,
        ),
        f"The best place is the upper right corner: good on clean scans, and good under attack. Lines: 95 % intervals. "
        f"{not_compared(setting)}".rstrip(),
    )


def _cases(setting: Setting, colours: Mapping[str, str]) -> Drawing | None:
    level = setting.telling_level
    if level is None:
        return None
    series, ticks = [], {}
    # The legend names the models: their names would run into each other under the axis.
    attacked = f"{setting.norm_name} {level}" if len(setting.runs) < 5 else level
    whole = setting.whole_cases(level)
    spread = np.random.default_rng(0)
    for number, run in enumerate(setting.runs):
        for shift, where, name in ((0.25, UNTOUCHED, "clean"), (0.75, setting.worst(run, level), attacked)):
            x = number + shift
            ticks[x] = name
            points = [
                Point(x + float(spread.uniform(-0.13, 0.13)), 100 * dice, title=f"{case}: {100 * dice:.1f}")
                for case, dice in run.case_dice(where, whole).items()
            ]
            label = run.title if where == UNTOUCHED else ""
            series.append(Series(label, colours[run.title], points, cloud=True))
            middle = float(np.nanmedian([point.y for point in points]))
            line = [Point(x - 0.2, middle), Point(x + 0.2, middle)]
            series.append(Series("", colours[run.title], line, title=f"{run.title}, {name}: median {middle:.1f}"))
    return Drawing(
        "Case by case",
        chart(f"Dice of each case: {setting.name}", Axis("", 0.0, float(len(setting.runs)), ticks),
              percent_axis("Dice of a case (%)" if whole else "Dice of a case's samples (%)"), series),
        f"A dot is a case ({_kind_of_dice(whole)}), the line their median; clean, and at {setting.norm_name} {level} "
        f"under {setting.worst_words}.",
    )  # fmt: skip


def _classes(setting: Setting, colours: Mapping[str, str]) -> list[Drawing]:
    """How the Dice of each class is spread over the cases; as many classes in a chart as can be told apart."""
    level = setting.telling_level
    if level is None:
        return []
    names = [str(name) for name in setting.runs[0].summary["classes"]]
    each = max(1, MOST_BOXES // (2 * len(setting.runs)))
    numbers = list(range(len(names)))
    parts = [numbers[start : start + each] for start in range(0, len(numbers), each)]
    return [_boxes(setting, colours, level, {number: names[number] for number in part}) for part in parts]


def _boxes(setting: Setting, colours: Mapping[str, str], level: str, classes: Mapping[int, str]) -> Drawing:
    """Box plots of these classes (their numbers and names); one a model and condition."""
    whole, series = setting.whole_cases(level), []
    width = 0.8 / (2 * len(setting.runs))
    for place, (number, name) in enumerate(classes.items()):
        for model, run in enumerate(setting.runs):
            for shift, key, condition in ((0, UNTOUCHED, "clean"), (1, setting.worst(run, level), "attacked")):
                middle = place + 0.1 + (2 * model + shift + 0.5) * width
                dice = setting.class_dice(run, key, whole)[:, number]
                title = f"{run.title}, {name}, {condition}"
                series += _box(middle, 0.38 * width, 100 * dice[~np.isnan(dice)], colours[run.title], title, shift == 0)
    # For the legend: what has no points is not drawn.
    series += [Series(run.title, colours[run.title], []) for run in setting.runs]
    shown = ", ".join(classes.values()) if len(classes) < len(setting.runs[0].summary["classes"]) else ""
    title = "By class" + (f": {shown}" if shown else "")
    ticks = {place + 0.5: _shortened(name, len(classes)) for place, name in enumerate(classes.values())}
    return Drawing(
        title,
        chart(f"Dice of each class, case by case{', ' + shown if shown else ''}: {setting.name}",
              Axis("", 0.0, float(len(classes)), ticks),
              percent_axis("Dice of a class in a case (%)" if whole else "Dice in a case's samples (%)"), series),
        f"A box holds the middle half of the cases, the line in it is their median, and the whiskers end at the lowest "
        f"and highest case ({_kind_of_dice(whole)}). Of each pair of boxes the left one, dashed, is clean, the right "
        f"one at {setting.norm_name} {level} under {setting.worst_words}.",
    )  # fmt: skip


def _box(x: float, half: float, values: Array, colour: str, title: str, dashed: bool) -> list[Series]:
    """Box and whiskers at ``x``; nothing without values."""
    if not len(values):
        return []
    low, lower, median, upper, high = (float(value) for value in np.quantile(values, (0, 0.25, 0.5, 0.75, 1)))
    text = f"{title}: median {median:.1f}, quartiles {lower:.1f} and {upper:.1f}, {low:.1f} to {high:.1f}"
    corners = ((x - half, lower), (x + half, lower), (x + half, upper), (x - half, upper), (x - half, lower))
    lines = (corners, ((x - half, median), (x + half, median)), ((x, low), (x, lower)), ((x, upper), (x, high)))
    return [Series("", colour, [Point(*end) for end in line], dashed=dashed, title=text) for line in lines]


def _shortened(name: str, classes: int) -> str:
    """A name that does not run into the next one."""
    longest = max(4, 80 // classes)
    return name if len(name) <= longest else f"{name[: longest - 1]}…"


def _kind_of_dice(whole: bool) -> str:
    return "nnU-Net's Dice of the whole case" if whole else "its attacked samples pooled, not nnU-Net's case Dice"


def _sizes(setting: Setting, colours: Mapping[str, str]) -> Drawing | None:
    level = setting.telling_level
    if level is None:
        return None
    series = []
    for run in setting.runs:
        table = run.samples[setting.worst(run, level)]
        points = [
            Point(float(size), 100 * dice, title=f"{case}, tile {tile}: {100 * dice:.0f} (clean {100 * clean:.0f})")
            for size, dice, clean, case, tile in zip(
                table.sizes, table.dice, run.samples[UNTOUCHED].dice, table.cases, table.tiles, strict=True
            )
        ]
        series.append(Series(run.title, colours[run.title], points, cloud=True))
    sizes = [point.x for one in series for point in one.points]
    return Drawing(
        "Size of the structure",
        chart(f"Size against robustness: {setting.name}",
              axis_around("foreground of the sample (voxels)", sizes, logarithmic=True),
              percent_axis(f"Dice of a sample under {'noise' if setting.noise_only else 'attack'} (%)"), series),
        f"A dot is a sample at {setting.norm_name} {level} under {setting.worst_words}. Where dots "
        f"fall to the left, small structures are the fragile ones.",
    )  # fmt: skip


def _margins(setting: Setting, colours: Mapping[str, str]) -> Drawing | None:
    series, ends = [], []
    for run in setting.runs:
        curves = run.summary["margins_by_epoch"]
        if not {"margin_10", "margin_50", "margin_90"} <= curves.keys():
            continue
        curves = {name: [float("nan") if value is None else value for value in curve] for name, curve in curves.items()}
        together = zip(curves["margin_50"], curves["margin_10"], curves["margin_90"], strict=False)
        points = [Point(epoch, *values, title=f"{values[0]:.2f}") for epoch, values in enumerate(together)]
        series.append(Series(f"{run.title}: median", colours[run.title], points))
        ends.append(_last_quarter(run.title, [point.y for point in points]))
    points = [point for one in series for point in one.points]
    if len(points) < 2:
        return None
    return Drawing(
        "Margins in training",
        chart(f"Margins by epoch: {setting.name}",
              axis_around("epoch", [point.x for point in points]),
              axis_around("margin (training's own unit)", [point.high for point in points]), series),
        f"How far training samples were perturbed, by epoch: median and the middle 80 %; none may pass the "
        f"training's own bound. Curves that still rise say that the training had not settled. "
        f"{' '.join(filter(None, ends))}",
    )  # fmt: skip


def _last_quarter(title: str, medians: list[float]) -> str:
    """From where to where the median went at the end; empty of a training too short to have an end."""
    before = len(medians) - 1 - max(1, len(medians) // 4)
    if before < 0 or not (isfinite(medians[before]) and isfinite(medians[-1])):
        return ""
    return f"{title}: the median went from {medians[before]:.2f} to {medians[-1]:.2f} in the last quarter."


def _point(setting: Setting, run: Results, x: float, key: Key) -> Point:
    interval = setting.interval(run, key)
    text = f"{percent(interval)}, {key[0]}"
    return Point(x, 100 * interval.value, 100 * interval.low, 100 * interval.high, text)
