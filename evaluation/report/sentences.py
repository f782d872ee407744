"""What the figures say, in words; nothing is called more robust that is surely less so at any level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nnunet_ima.evaluation.report.figures import NOISE, Order, Setting, failed_checks, tvdi
from nnunet_ima.evaluation.results import UNTOUCHED, Results
from nnunet_ima.evaluation.statistics import Difference, Interval
from nnunet_ima.evaluation.summary import nothing_learned, nothing_to_lose


def headline(setting: Setting) -> str:
    """What to remember of a setting, and which models nothing is made of."""
    return " ".join(filter(None, (_claim(setting), not_compared(setting))))


def not_compared(setting: Setting) -> str:
    """Which models are left out of every comparison, and why; empty if none is.

    Those that have not learned their task, and those whose figures a check says are not to be trusted.
    """
    said = list(filter(None, (_unlearned(setting), _untrusted(setting))))
    if not said:
        return ""
    left = {0: "; no model is left", 1: "; no second model is left"}.get(len(setting.compared), "")
    return f"{'. '.join(said)}{left if len(setting.runs) > 1 else ''}."


def _unlearned(setting: Setting) -> str:
    titles = [run.title for run in setting.runs if nothing_learned(run.summary)]
    if not titles:
        return ""
    one = len(titles) == 1
    who = f"{_and(titles)} {'has not learned its' if one else 'have not learned their'} task"
    if len(setting.runs) == 1:
        return f"{who}, so this says nothing of robustness"
    return f"{who} and {'is' if one else 'are'} not compared"


def _untrusted(setting: Setting) -> str:
    failed = {run.title: failed_checks(run) for run in setting.runs if failed_checks(run)}
    if not failed:
        return ""
    who = _and(
        [f"{title} (failed check{'s' if len(names) > 1 else ''}: {_and(names)})" for title, names in failed.items()]
    )
    said = f"The figures of {who} are not to be trusted"
    if len(setting.runs) == 1:
        return said
    return f"{said}, so {'it is' if len(failed) == 1 else 'they are'} not compared"


def _claim(setting: Setting) -> str:
    """What the compared models withstand; empty where there are several models of which none has learned its task."""
    level = setting.telling_level
    if level is None:
        went = "; ".join(f"{run.title} had {_conditions(setting, run.attacked)}" for run in setting.runs)
        return (
            f"No attack was run on all models at the same levels, so nothing can be compared: {went}."
            f"{_only_named_alike(setting)}"
        )
    if not setting.compared:
        return _alone(setting, setting.runs[0], level) if len(setting.runs) == 1 else ""
    best, shown = setting.ranked[0], setting.shown
    if setting.noise_only and len(setting.runs) > 1:
        return _noise_only(setting, level)
    if shown is None:
        return _alone(setting, best, level)
    beaten = setting.beaten
    if not beaten:
        return _no_winner(setting, best, shown, level)
    difference = setting.difference(best, shown, level)
    assert difference is not None
    here = "On these few cases, " if setting.few_cases else ""
    sentence = (
        f"{here}{best.title} is more robust than {_and(other.title for other in beaten)}: "
        f"at {setting.norm_name} {level}, {_under(setting)}, it holds "
        f"{percent(setting.interval(best, setting.worst(best, level)))} Dice "
        f"against {percent(setting.interval(shown, setting.worst(shown, level)))}"
    )
    if len(beaten) > 1:
        sentence += f" of {shown.title}"
    sentence += f", {points(difference)} more."
    rest = [other.title for other in setting.ranked[1:] if other not in beaten]
    return sentence + (f" Against {_and(rest)} the order is not clear." if rest else "")


def left_out(setting: Setting) -> str:
    """What only some of the models went through, so that nothing is made of it; empty if all went through the same."""
    if len(setting.runs) < 2:
        return ""
    shared = [(attack, text) for attack in setting.attacks for text, _ in setting.levels]
    parts = []
    for run in setting.runs:
        compared = {setting.key(run, *condition) for condition in shared}
        rest = [item for item in run.attacked if (str(item["attack"]), str(item["level"])) not in compared]
        if rest:
            parts.append(f"{run.title}: {_conditions(setting, rest)}")
    if not parts:
        return ""
    said = f"Not all models had these, so they are left out of every comparison: {'; '.join(parts)}."
    return said + _only_named_alike(setting)


def _only_named_alike(setting: Setting) -> str:
    """Which attacks are others than the first model's, though they have one name, and how; empty if none is."""
    return "".join(
        f" The attack {text} of {run.title} is not that of {setting.runs[0].title} ({'; '.join(different)})."
        for text, run, different in setting.only_named_alike
    )


def evidence(setting: Setting) -> str:
    """How sure the headline is: the one question that was asked, of the mean over levels; empty if it names none."""
    other = setting.shown
    if other is None or setting.noise_only:
        return ""
    best = setting.ranked[0]
    mean = setting.corrected_mean_difference(best, other)
    if mean is None or not mean.interval.known:
        return ""
    levels = f"{setting.norm_name} {_and(text for text, _ in setting.levels)}"
    over = f"On average over {levels}" if len(setting.levels) > 1 else f"At {levels}"
    sentence = f"{over}, {best.title} holds {points(mean)} more than {other.title}"
    if setting.few_cases:
        return f"{sentence}; there are too few cases to say whether that would be so on others."
    after = f" after {setting.correction}" if setting.correction else ""
    return f"{sentence} (p {probability(mean.p)}{after}).{setting.p_note}"


def price(setting: Setting) -> str:
    """What the more robust model costs on clean scans; empty if none is."""
    if setting.noise_only or not setting.beaten:
        return ""
    best = setting.ranked[0]
    reference = max(setting.beaten, key=lambda run: tvdi(run, UNTOUCHED))
    difference = setting.difference(reference, best, None)
    clean = (
        f"{percent(setting.interval(best, UNTOUCHED))} against {percent(setting.interval(reference, UNTOUCHED))} of "
        f"{reference.title}"
    )
    if difference is None or not difference.clear:
        sentence = f"On clean scans no difference in pooled Dice (TVDI) can be told: {clean}."
    elif difference.interval.value < 0:
        sentence = f"It costs nothing on clean scans: {clean}."
    else:
        sentence = f"It costs {points(difference)} of clean Dice: {clean}."
    return sentence + _price_of_a_sample(setting, best, reference)


def about(setting: Setting, run: Results) -> str:
    """A model by itself."""
    mark = " These figures are not to be trusted: a check failed." if failed_checks(run) else ""
    return _about(setting, run) + mark


def _about(setting: Setting, run: Results) -> str:
    level = setting.telling_level
    clean = f"{run.title}: {percent(setting.interval(run, UNTOUCHED))} Dice on clean scans"
    if setting.start != UNTOUCHED:
        clean += f", {percent(setting.interval(run, setting.start))} on {setting.start_name}"
    if level is None:
        return clean + "."
    key = setting.worst(run, level)
    figures, started = run.figures(key) or {}, run.figures(setting.start) or {}
    threshold = 100 * float(run.summary["criterion"]["dice_threshold"])
    sentence = (
        f"{clean}, {percent(setting.interval(run, key))} at {setting.norm_name} {level} under {key[0]}, where "
        f"{100 * figures['robust_share']:.1f} % of the samples still have a Dice above {threshold:g} % "
        f"({100 * started['robust_share']:.1f} % on {setting.start_name})"
    )
    noise = next((attack for attack in setting.attacks if attack.startswith(NOISE)), None)
    if noise is not None and not setting.noise_only:
        left = tvdi(run, setting.key(run, noise, level))
        sentence += f"; plain noise of the same size leaves {100 * left:.1f} %"
    return sentence + "." + _end_to_end(figures)


def warnings(run: Results) -> Iterator[str]:
    """What a reader must know before believing a run's figures."""
    if nothing_learned(run.summary):
        yield f"{run.title}: {_lower(nothing_to_lose(run.summary))}"
    for item in run.summary["trust"]:
        if not item["passed"]:
            yield f"{run.title}: {item['sentence']}."
    if run.summary["trained_on_these_cases"]:
        yield f"{run.title} learned from some of these very cases; its figures flatter it."
    elif run.summary["started_from_unknown_weights"]:
        yield f"{run.title} started from other weights; whether those learned from these cases is not known."


def unit_warning(setting: Setting) -> Iterator[str]:
    """Whose levels may be in other units than those of the models that they stand beside."""
    for run in setting.of_unknown_unit if len(setting.runs) > 1 else ():
        yield (
            f"{run.title}: the run does not tell how its scans were normalised, so it is not known whether its levels "
            f"are in the same unit as those of the other models."
        )


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def percent(interval: Interval) -> str:
    """``58.3 % (54.9 to 61.0)``."""
    text = f"{100 * interval.value:.1f} %"
    return f"{text} ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if interval.known else text


def points(difference: Difference) -> str:
    """``33.6 points (30.1 to 37.2)``, of a difference whose sign the sentence tells."""
    interval = difference.interval
    text = f"{100 * abs(interval.value):.1f} points"
    ends = (interval.low, interval.high) if interval.value >= 0 else (-interval.high, -interval.low)
    return f"{text} ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if interval.known else text


def probability(p: float) -> str:
    """``0.031`` or ``< 0.001``; – where there was too little to tell."""
    return "–" if p != p else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _alone(setting: Setting, run: Results, level: str) -> str:
    """What became of a single model."""
    key = setting.worst(run, level)
    sentence = (
        f"At {setting.norm_name} {level}, {key[0]} takes {run.title} from "
        f"{percent(setting.interval(run, setting.start))} Dice on {setting.start_name} to "
        f"{percent(setting.interval(run, key))}"
    )
    return sentence + ("; no attack was run, so nothing is said of its robustness." if setting.noise_only else ".")


def _noise_only(setting: Setting, level: str) -> str:
    """Noise is no attacker: how models fare under it does not say which of them withstands one."""
    if any(not str(item["attack"]).startswith(NOISE) for run in setting.runs for item in run.attacked):
        went = "; ".join(f"{run.title} had {_conditions(setting, run.attacked)}" for run in setting.runs)
        return (
            f"The models share no attack but white noise, so no model is called more robust: {went}."
            f"{_only_named_alike(setting)}"
        )
    held = " and ".join(
        f"{run.title} {percent(setting.interval(run, setting.worst(run, level)))}" for run in setting.ranked
    )
    return (
        f"No attack was run, only white noise, so no model is called more robust: at {setting.norm_name} {level} it "
        f"leaves {held} Dice."
    )


def _conditions(setting: Setting, items: Sequence[Mapping[str, Any]]) -> str:
    """``apgd and white-noise at L2 5 and 10``: attacks of the same levels together."""
    levels: dict[str, list[str]] = {}
    for item in items:
        levels.setdefault(str(item["attack"]), []).append(str(item["level"]))
    together: dict[tuple[str, ...], list[str]] = {}
    for attack, mine in levels.items():
        together.setdefault(tuple(mine), []).append(attack)
    parts = [f"{_and(attacks)} at {setting.norm_name} {_and(list(mine))}" for mine, attacks in together.items()]
    return ", ".join(parts) or "none"


def _price_of_a_sample(setting: Setting, best: Results, reference: Results) -> str:
    """The same by ADI, in which a small structure counts as much as a large one."""
    difference = setting.adi_difference(reference, best, None)
    if difference is None:
        return ""
    values = [float((run.figures(UNTOUCHED) or {})["adi"] or 0.0) for run in (best, reference)]
    word = "less" if difference.interval.value >= 0 else "more"
    return (
        f" By the mean of the samples' own Dice (ADI): {100 * values[0]:.1f} % against {100 * values[1]:.1f} %, "
        f"{points(difference)} {word}" + ("." if setting.few_cases else f", p {probability(difference.p)}.")
    )


def _under(setting: Setting) -> str:
    """Under which attack: by its name if there was but one."""
    return f"under {setting.searches[0]}" if len(setting.searches) == 1 else "under the worst attack on each"


def _end_to_end(figures: Mapping[str, Any]) -> str:
    """What whole cases lose of what an attack takes from samples; empty if that was not asked, or cannot be told."""
    whole = figures.get("end_to_end")
    if whole is None or whole["survives_end_to_end"] is None:
        return ""
    return (
        f" Of the Dice that this takes from the samples, whole cases lose {100 * whole['survives_carried_over']:.0f} % "
        f"when the perturbation is carried over, and {100 * whole['survives_end_to_end']:.0f} % when the attack goes "
        f"through nnU-Net's sliding window."
    )


def _no_winner(setting: Setting, best: Results, other: Results, level: str) -> str:
    order = setting.order(best, other)
    held = (
        f"at {setting.norm_name} {level}, {_under(setting)}, {best.title} holds "
        f"{percent(setting.interval(best, setting.worst(best, level)))} Dice and {other.title} "
        f"{percent(setting.interval(other, setting.worst(other, level)))}"
    )
    if order is Order.UNPAIRED:
        return f"The models were attacked on other samples, so they are not compared; {held}."
    if order is Order.MIXED:
        return f"Which model is more robust depends on the level: {held}, while another level says the opposite."
    few = not setting.interval(best, UNTOUCHED).known
    why = "with so few samples nobody can say whether a difference is chance" if few else "no difference is clear"
    return f"No model is clearly more robust, {why}: {held}."


def _and(titles: Iterator[str] | list[str]) -> str:
    names = list(titles)
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
