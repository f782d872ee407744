"""Does a model still hold? Rules about a run's figures, judged with their intervals: met, broken, or not to be told."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from fractions import Fraction
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.baseline import Baseline, baseline_of, learned_nothing, same_samples
from nnunet_ima.evaluation.changes import other_attack, same_model
from nnunet_ima.evaluation.markdown import escaped, table_row
from nnunet_ima.evaluation.normalisation import in_words
from nnunet_ima.evaluation.results import UNTOUCHED, Key, Results
from nnunet_ima.evaluation.statistics import FEWEST, Interval, tvdi_difference, tvdi_interval, units
from nnunet_ima.evaluation.summary import nothing_learned, nothing_to_lose
from nnunet_ima.files import write_text

_RULE = re.compile(
    r"(?:(?P<attack>\S+)@(?P<norm>l2|linf):(?P<level>\S+)|clean)\s+(?P<metric>\w+)\s*>=\s*(?P<limit>\S+)"
)
METRICS = ("tvdi",)
CHANGES = "What changed since the baseline"
FILES = ("gate.md", "junit.xml")
_ANEW = "make a new baseline with nnunet_ima gate RUN --write-baseline FILE."
_UNLEARNED = "the baseline is of a model that had not learned its task, so it says nothing of this one;"


class Verdict(IntEnum):
    """Of a rule, and of all together; the number is the exit status."""

    MET = 0
    BROKEN = 1
    UNKNOWN = 2

    @property
    def word(self) -> str:
        """For people."""
        return {0: "met", 1: "BROKEN", 2: "cannot tell"}[self.value]


@dataclass(frozen=True)
class Judgement:
    """A rule and what became of it; ``sentence`` says why."""

    rule: str
    before: str
    now: str
    verdict: Verdict
    sentence: str


@dataclass(frozen=True)
class Minimum:
    """A rule of its own: a figure that must be reached, such as ``apgd@l2:5 tvdi>=0.55``."""

    text: str
    key: Key
    norm: str | None
    limit: float


def parse_minimum(text: str) -> Minimum:
    """Read ``ATTACK@NORM:LEVEL tvdi>=SHARE`` or ``clean tvdi>=SHARE``.

    Raises:
        UserError: it is neither.
    """
    found = _RULE.fullmatch(text.strip())
    if found is None:
        raise UserError(
            f"The rule {text!r} cannot be read; it must be like 'apgd@l2:5 tvdi>=0.55' or 'clean tvdi>=0.85'."
        )
    if found["metric"] not in METRICS:
        raise UserError(f"The rule {text!r} asks for {found['metric']}; there is {', '.join(METRICS)}.")
    try:
        limit = float(found["limit"])
    except ValueError:
        limit = -1.0
    if not 0 <= limit <= 1:
        raise UserError(f"The rule {text!r} has the limit {found['limit']}; it must be a share from 0 to 1, as 0.55.")
    key = UNTOUCHED if found["attack"] is None else (found["attack"], found["level"])
    return Minimum(text.strip(), key, found["norm"], limit)


def judge_minimum(results: Results, minimum: Minimum) -> Judgement:
    """Met if the whole interval is above the limit, broken if it is below."""
    key = _find(results, minimum)
    if key is None:
        norm = results.summary["protocol"]["norm"]
        known = ", ".join(f"{item['attack']}@{norm}:{item['level']}" for item in results.attacked)
        why = f"the run has no such attack and level; it has {known}."
        return Judgement(minimum.text, f"{100 * minimum.limit:.1f} wanted", "not run", Verdict.UNKNOWN, why)
    unit, counts = units(results.samples[key].cases, results.samples[key].counts)
    interval = tvdi_interval(counts)
    now = _share(interval)
    if not interval.known:
        verdict, why = Verdict.UNKNOWN, "too few samples for an interval"
    elif interval.low >= minimum.limit:
        verdict, why = Verdict.MET, "the whole interval is at or above the limit"
    elif interval.high < minimum.limit:
        verdict, why = Verdict.BROKEN, "the whole interval is below the limit"
    else:
        verdict, why = Verdict.UNKNOWN, "the limit lies within the interval: more samples would tell"
    return Judgement(minimum.text, f"{100 * minimum.limit:.1f} wanted", now, verdict, f"{why}.{_caveat(unit)}")


def judge_drop(results: Results, baseline: Baseline, max_drop: float) -> Iterator[Judgement]:
    """For every condition of the baseline: did TVDI fall by more than ``max_drop`` points?

    The same samples are compared one with the other; of other samples only the two intervals. An attack that is not the
    baseline's tells nothing, nor does a baseline of a model that had not learned its task; nor did a model get worse
    that is the baseline's own.

    Raises:
        UserError: the baseline is of other data, another protocol or norm, or of scans that were normalised otherwise.
    """
    _refuse_incomparable(results, baseline)
    ours, norm = baseline_of(results), results.summary["protocol"]["norm"]
    paired, unchanged = same_samples(ours, baseline), same_model(ours, baseline)
    unlearned = learned_nothing(baseline)
    cases, theirs = ([case for case, _ in which] for which in (ours.samples, baseline.samples))
    for key, before in baseline.counts.items():
        name = "clean" if key == UNTOUCHED else f"{key[0]}@{norm}:{key[1]}"
        rule = f"{name}: no more than {max_drop:g} points below the baseline"
        old_unit, old_counts = units(theirs, before)
        old = tvdi_interval(old_counts)
        there = next((own for own in ours.counts if own[0] == key[0] and _same(own[1], key[1])), None)
        if there is None:
            sentence = "the run has no such attack and level; evaluate as the baseline was."
            yield Judgement(rule, _share(old), "not run", Verdict.UNKNOWN, sentence)
            continue
        after = ours.counts[there]
        new_unit, new_counts = units(cases, after)
        new = tvdi_interval(new_counts)
        other = other_attack(ours, baseline, key[0])
        if unlearned or other:
            sentence = _UNLEARNED if unlearned else _other_attack(other)
            yield Judgement(rule, _share(old), _share(new), Verdict.UNKNOWN, f"{sentence} {_ANEW}")
            continue
        if paired and np.array_equal(after, before):
            yield Judgement(rule, _share(old), _share(new), Verdict.MET, "nothing changed.")
            continue
        change = tvdi_difference(new_counts, old_counts).interval if paired else _unpaired(new, old)
        verdict, why = _judge_change(change, max_drop / 100, paired)
        if verdict is Verdict.BROKEN and unchanged:
            verdict = Verdict.UNKNOWN
            why += " But the model is the baseline's own, so something else changed; see below."
        yield Judgement(rule, _share(old), _share(new), verdict, why + _caveat(old_unit, new_unit))


def _other_attack(different: Sequence[str]) -> str:
    return (
        f"the attack of that name is another one than the baseline's ({'; '.join(different)}), so the figures say "
        f"nothing of the model;"
    )


def _caveat(*of_intervals: str) -> str:
    """What is to be said if any of the intervals that were used is of samples."""
    if "samples" not in of_intervals:
        return ""
    return (
        f" (Interval over samples, as there are fewer than {FEWEST} cases; samples of one case resemble each other, so "
        f"it is too narrow.)"
    )


def judge_trust(results: Results) -> Judgement:
    """Figures that a check of the evaluation failed say nothing."""
    reasons = [str(item["sentence"]) for item in results.summary["trust"] if not item["passed"]]
    if results.summary["trained_on_these_cases"]:
        reasons.append("the model learned from some of these very cases")
    good = "all checks of the evaluation passed"
    if results.summary["started_from_unknown_weights"]:
        good += "; the training started from other weights, and whether those learned from these cases is not known"
    verdict = Verdict.UNKNOWN if reasons else Verdict.MET
    return Judgement("the figures can be trusted", "", "", verdict, f"{'; '.join(reasons) or good}.")


def judge_learned(results: Results) -> Judgement:
    """Of a model that has not learned its task nothing that an attack leaves tells anything."""
    rule, clean = "the model has learned its task", results.summary["clean"]
    if nothing_learned(results.summary):
        return Judgement(rule, "", "", Verdict.UNKNOWN, nothing_to_lose(results.summary))
    share = 100 * clean["robust_share"]
    why = f"without an attack {share:.1f} % of the {clean['n_samples']} attacked samples are correct"
    if not share:
        why += ", but TVDI is above the threshold for that"
    return Judgement(rule, "", "", Verdict.MET, f"{why}.")


def overall(judgements: Sequence[Judgement]) -> Verdict:
    """Broken if one rule is; else not to be told if one is not."""
    verdicts = {judgement.verdict for judgement in judgements}
    return Verdict.BROKEN if Verdict.BROKEN in verdicts else max(verdicts, default=Verdict.MET)


def write_gate(
    folder: Path, title: str, judgements: Sequence[Judgement], changes: Mapping[str, str] | None = None
) -> None:
    """Write gate.md and junit.xml."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = (markdown(title, judgements, changes), junit(title, judgements, changes))
    for name, text in zip(FILES, texts, strict=True):
        write_text(folder / name, text)


def remove_gate(folder: Path) -> None:
    """Remove what an earlier gate has written, so that it is not taken for the answer of one that was interrupted."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def markdown(title: str, judgements: Sequence[Judgement], changes: Mapping[str, str] | None = None) -> str:
    """For people, and for what a CI service shows of a run.

    Args:
        title: of the run.
        judgements: in order.
        changes: since the baseline, see :func:`~nnunet_ima.evaluation.changes.what_changed`; None without one.
    """
    lines = [f"## Robustness gate: {overall(judgements).word}", "", escaped(title), ""]
    lines += ["| rule | before | now | verdict | why |", "| --- | --- | --- | --- | --- |"]
    for one in judgements:
        lines.append(table_row((one.rule, one.before, one.now, f"**{one.verdict.word}**", one.sentence)))
    lines += ["", "TVDI in %, with 95 % intervals.", ""]
    if changes:
        lines += [f"### {CHANGES}", "", *(f"- {escaped(line)}" for line in _lines(changes)), ""]
    return "\n".join(lines)


def junit(title: str, judgements: Sequence[Judgement], changes: Mapping[str, str] | None = None) -> str:
    """A test case for each rule: a broken one has failed, one that cannot be told is an error; then what changed."""
    counted = [sum(one.verdict is verdict for one in judgements) for verdict in (Verdict.BROKEN, Verdict.UNKNOWN)]
    suite = ElementTree.Element(
        "testsuite", name="nnunet_ima gate", tests=str(len(judgements)), failures=str(counted[0]),
        errors=str(counted[1]), skipped="0",
    )  # fmt: skip
    for one in judgements:
        case = ElementTree.SubElement(suite, "testcase", classname=_printable(title), name=_printable(one.rule))
        if one.verdict is not Verdict.MET:
            kind = "failure" if one.verdict is Verdict.BROKEN else "error"
            what = ElementTree.SubElement(case, kind, message=_printable(one.sentence))
            what.text = _printable(f"before {one.before}, now {one.now}")
    if changes:
        said = ElementTree.SubElement(suite, "system-out")
        said.text = "\n".join([f"{CHANGES}:", *map(_printable, _lines(changes))])
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _lines(changes: Mapping[str, str]) -> list[str]:
    return [f"{subject}: {' '.join(said.split())}" for subject, said in changes.items()]


def _judge_change(change: Interval, allowed: float, paired: bool) -> tuple[Verdict, str]:
    shown = f"{100 * change.value:+.1f} points"
    if not change.known:
        return Verdict.UNKNOWN, f"{shown}; too few samples to say whether that is chance."
    shown += f" ({100 * change.low:+.1f} to {100 * change.high:+.1f})"
    if not paired:
        shown += ", of other samples than the baseline's"
    if change.low >= -allowed:
        return Verdict.MET, f"{shown}."
    if change.high < -allowed:
        return Verdict.BROKEN, f"{shown}: worse than allowed."
    return Verdict.UNKNOWN, f"{shown}: the limit lies within the interval."


def _unpaired(new: Interval, old: Interval) -> Interval:
    """Of the difference of two independent figures: their half-widths add up as squares do."""
    low = np.hypot(new.value - new.low, old.high - old.value)
    high = np.hypot(new.high - new.value, old.value - old.low)
    value = new.value - old.value
    return Interval(value, float(value - low), float(value + high))


def _find(results: Results, minimum: Minimum) -> Key | None:
    """The condition that a rule is about; levels are compared as numbers."""
    if minimum.key == UNTOUCHED:
        return UNTOUCHED
    if results.summary["protocol"]["norm"] != minimum.norm:
        return None
    there = [(item["attack"], item["level"]) for item in results.attacked]
    return next((key for key in there if key[0] == minimum.key[0] and _same(key[1], minimum.key[1])), None)


def _same(one: str, other: str) -> bool:
    try:
        return Fraction(one) == Fraction(other)
    except (ValueError, ZeroDivisionError):
        return one == other


def _refuse_incomparable(results: Results, baseline: Baseline) -> None:
    def way(about: dict[str, Any]) -> dict[str, Any]:
        protocol, normalised = about["protocol"], about.get("normalisation")
        return {
            "dataset": about["model"]["dataset"],
            "protocol": protocol["name"],
            "norm": protocol["norm"],
            "classes": about["classes"],
            "patch": about["patch_size"],
            # A level is in units of the normalised scan.
            "normalisation": None if normalised is None else (in_words(normalised), normalised),
        }

    ours, theirs = way(results.summary), way(baseline.about)
    if None in (ours["normalisation"], theirs["normalisation"]):  # older runs do not tell
        del ours["normalisation"], theirs["normalisation"]
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        name = different[0]
        there, here = (one[name][0] if name == "normalisation" else one[name] for one in (theirs, ours))
        raise UserError(
            f"The baseline is of another {name} ({there}) than {results.folder} ({here}), so the two "
            f"cannot be compared."
        )


def _share(interval: Interval) -> str:
    text = f"{100 * interval.value:.1f}"
    return f"{text} ({100 * interval.low:.1f} to {100 * interval.high:.1f})" if interval.known else text


def _printable(text: str) -> str:
    """XML has no control characters."""
    return "".join(character if character.isprintable() else " " for character in text)
