"""What the figures say, in words."""

from __future__ import annotations

from collections.abc import Iterator

from nnunet_ima.evaluation.report.figures import NOISE, Setting, tvdi
from nnunet_ima.evaluation.results import UNTOUCHED, Results
from nnunet_ima.evaluation.statistics import Difference, Interval


def headline(setting: Setting) -> str:
    """The one sentence to remember of a setting."""
    level = setting.telling_level
    if level is None:
        return "No attack was run on all models at the same level, so nothing can be compared."
    key = setting.key(level)
    ranked = sorted(setting.runs, key=lambda run: -tvdi(run, key))
    best, worst = ranked[0], ranked[-1]
    at = f"{setting.norm_name} {level}"
    if len(ranked) == 1:
        return (
            f"At {at}, {key[0]} takes {best.title} from {percent(setting.interval(best, UNTOUCHED))} to "
            f"{percent(setting.interval(best, key))} Dice."
        )
    difference = setting.difference(best, worst, key)
    held = f"{percent(setting.interval(best, key))} Dice against {percent(setting.interval(worst, key))}"
    if difference is None:
        return f"At {at} under {key[0]}, {best.title} holds {held} of {worst.title}, on other samples."
    if not difference.interval.known:
        return (
            f"At {at} under {key[0]}, {best.title} holds {held} of {worst.title}; with so few samples nobody can say "
            f"whether that is chance."
        )
    if not difference.clear:
        return f"At {at} under {key[0]}, no model is clearly more robust: {best.title} holds {held} of {worst.title}."
    return (
        f"{best.title} is more robust than {worst.title}: at {at} under {key[0]} it holds {held}, "
        f"{points(difference)} more."
    )


def price(setting: Setting) -> str:
    """What the more robust model costs on clean scans."""
    level = setting.telling_level
    if level is None or len(setting.runs) == 1:
        return ""
    key = setting.key(level)
    ranked = sorted(setting.runs, key=lambda run: -tvdi(run, key))
    best, worst = ranked[0], ranked[-1]
    difference = setting.difference(worst, best, UNTOUCHED)
    clean = f"{percent(setting.interval(best, UNTOUCHED))} against {percent(setting.interval(worst, UNTOUCHED))}"
    if difference is None:
        return f"On clean scans they have {clean}."
    if not difference.clear:
        return f"On clean scans no difference can be told: {clean}."
    if difference.interval.value < 0:
        return f"It costs nothing on clean scans: {clean}."
    return f"It costs {points(difference)} of clean Dice: {clean}."


def about(setting: Setting, run: Results) -> str:
    """A model by itself."""
    level = setting.telling_level
    clean = f"{run.title}: {percent(setting.interval(run, UNTOUCHED))} Dice on clean scans"
    if level is None:
        return clean + "."
    key = setting.key(level)
    figures = run.figures(key) or {}
    sentence = (
        f"{clean}, {percent(setting.interval(run, key))} at {setting.norm_name} {level} under {key[0]}, where "
        f"{100 * figures['robust_share']:.0f} % of the samples are still segmented correctly"
    )
    noise = next((attack for attack in setting.attacks if attack.startswith(NOISE)), None)
    if noise is not None:
        sentence += f"; plain noise of the same size leaves {100 * tvdi(run, (noise, level)):.1f} %"
    return sentence + "."


def warnings(run: Results) -> Iterator[str]:
    """What a reader must know before believing a run's figures."""
    for item in run.summary["trust"]:
        if not item["passed"]:
            yield f"{run.title}: {item['sentence']}."
    if run.summary["trained_on_these_cases"]:
        yield f"{run.title} learned from some of these very cases; its figures flatter it."
    elif run.summary["started_from_unknown_weights"]:
        yield f"{run.title} started from other weights; whether those learned from these cases is not known."


def percent(interval: Interval) -> str:
    """``58.3 % (95 % interval 54.9 to 61.0)``."""
    text = f"{100 * interval.value:.1f} %"
    return f"{text} ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if interval.known else text


def points(difference: Difference) -> str:
    """``33.6 points (30.1 to 37.2)``."""
    interval = difference.interval
    text = f"{100 * abs(interval.value):.1f} points"
    ends = sorted((100 * abs(interval.low), 100 * abs(interval.high)))
    return f"{text} ({ends[0]:.1f} to {ends[1]:.1f})" if interval.known else text
