"""Join what the parts of an evaluation noted into its tables and pictures."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_ima.attacks import Finding
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.ensembles import points_for_tvdi
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.identity import digest, read_run, refuse_different, write_identity
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.normalisation import scale_of
from nnunet_ima.evaluation.outcomes import (
    CLAMP,
    CLEAN,
    Condition,
    Outcome,
    SampleKey,
    SampleScore,
    lost_most,
    unperturbed,
)
from nnunet_ima.evaluation.pictures import draw_dice_against_level, draw_worst
from nnunet_ima.evaluation.protocols import parse_level
from nnunet_ima.evaluation.records import RECORDS, Records, options_of, part_folders
from nnunet_ima.evaluation.summary import summarise, write_all
from nnunet_ima.files import remove_leftovers
from nnunet_ima.units import short

NAMED = 3
# In seconds. Tables and pictures take far less.
PATIENCE = 300.0


def gather(folders: Sequence[Path], output: Path) -> None:
    """Copy the records of runs that were made in other folders, on other machines, to ``output``.

    Raises:
        UserError: a folder holds no run, or another one than the first.
    """
    for folder in folders:
        run = read_run(folder)
        refuse_different(read_run(folders[0])["identity"], run["identity"], folders[0])
        if not part_folders(folder):
            raise UserError(f"{folder} holds no records; give the folders in which the parts were run.")
    output.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        run = read_run(folder)
        write_identity(output, run["identity"], run["head"])
        if folder.resolve() == output.resolve():
            continue
        for part in part_folders(folder):
            # Several machines may each have run a part of that number; fetched again, it takes its former place.
            name = Records(part, conditions_of(run["identity"]), digest(run["identity"])).name
            if name is None:
                continue  # not a line is whole: there is nothing to copy
            target = output / RECORDS / f"{part.name}_{name}"
            temporary = target.with_name(f".{target.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(part, temporary, ignore=shutil.ignore_patterns("lock", ".*.tmp", "tiles"))
            shutil.rmtree(target, ignore_errors=True)
            temporary.rename(target)


def merge(folder: Path) -> dict[str, Any]:
    """Write all tables and two pictures from the records in ``folder``.

    Returns:
        The content of summary.json.

    Raises:
        UserError: something is missing; it is said what. Or another process is at it, and does not end.
    """
    run = read_run(folder)
    conditions = conditions_of(run["identity"])
    parts = [Records(part, conditions, digest(run["identity"])) for part in part_folders(folder)]
    _refuse_other_data(parts)
    _refuse_incomplete(folder, run["identity"], conditions, parts)
    outcomes = [_join(condition, parts) for condition in conditions]
    if not outcomes[0].samples:
        raise UserError(f"No validation case of {folder} holds any foreground, so nothing can be measured.")
    outcomes[0].findings = _join_findings([part.findings for part in parts if part.findings is not None])
    start = unperturbed(outcomes)
    for outcome in outcomes:
        outcome.points = points_for_tvdi(outcome, start)
    chunks = [part.smallest_chunk for part in parts if part.smallest_chunk is not None]
    summary = summarise(run["head"], outcomes, min(chunks, default=None))
    refusal = (
        f"Another process has been writing the tables of {folder} for {PATIENCE / 60:g} minutes; wait until it has "
        f"ended, and start again"
    )
    # Merges wait for each other: only then is what lies half written in the folder a killed process's.
    with alone(folder / RECORDS / "merge.lock", refusal, PATIENCE):
        remove_leftovers(folder)
        _write(folder, outcomes, summary)
    return summary


def _write(folder: Path, outcomes: Sequence[Outcome], summary: dict[str, Any]) -> None:
    # It stands for a complete set: an older one must not stay beside newer tables if writing these fails.
    (folder / "summary.json").unlink(missing_ok=True)
    # The tables first: no picture is worth the attacks of a night.
    write_all(folder, outcomes, summary)
    draw_dice_against_level(summary, folder / "dice_against_level.png")
    # The panel shows the condition that took most Dice off the samples.
    strongest = min(outcomes[1:], key=lambda o: sum(score.dice for score in o.samples))
    if strongest.worst:
        unit = short(scale_of(summary.get("normalisation")))
        draw_worst(strongest, summary["classes"], unit, folder / "worst_samples.png")


def conditions_of(identity: Mapping[str, Any]) -> list[Condition]:
    """Those of a run, in its order."""
    none = [CLEAN, CLAMP] if identity["protocol"] == "paper" else [CLEAN]
    levels = [parse_level(text, identity["norm"]) for text in identity["levels"]]
    return [Condition(name, None) for name in none] + [
        Condition(attack, level) for attack in identity["attacks"] for level in levels
    ]


def _refuse_other_data(parts: Sequence[Records]) -> None:
    """Of a case that several parts attacked, one's scores would stand beside the other's of another image."""
    known: dict[str, tuple[int, Records]] = {}
    for part in parts:
        for case, number in part.fingerprints.items():
            there, first = known.setdefault(case, (number, part))
            if number != there:
                raise UserError(
                    f"The preprocessed case {case} was not the same for {first.folder} and {part.folder}, so their "
                    f"results cannot be joined; move away the one that was made of the wrong data, and if cases are "
                    f"missing then, run that part again."
                )


def _refuse_incomplete(
    folder: Path, identity: Mapping[str, Any], conditions: Sequence[Condition], parts: Sequence[Records]
) -> None:
    planned = {case for part in parts for case in part.planned}
    missing = [case for case in identity["cases"] if case not in planned]
    if missing:
        raise UserError(
            f"{folder} is not complete: no part that was begun attacks {_few(missing)}; run the parts that are missing "
            f"(-num_parts, -part_id)."
        )
    for part in parts:
        for condition in conditions:
            left = _planned([part]).difference(*(other.samples[condition] for other in parts))
            cases = part.complete_cases.difference(*(other.cases[condition] for other in parts))
            if identity.get("end to end") and condition.level is not None:
                cases |= part.complete_cases.difference(*(other.end_to_end[condition] for other in parts))
            if left or (cases and identity["case level"]):
                what = f"{len(left)} samples" if left else f"{len(cases)} cases"
                raise UserError(_not_complete(part, f"{what} under {condition}"))
    checked = [part for part in parts if part.findings is not None]
    for part in parts:
        # The last thing that a part does. A copy of it may have been taken before.
        if part.findings is None and _planned([part]) - _planned(checked):
            raise UserError(_not_complete(part, "the checks of the network"))


def _not_complete(part: Records, what: str) -> str:
    return (
        f"{part.folder} is not complete: {what} are missing; start that part again ({options_of(part.folder)}), it "
        f"goes on where it stopped."
    )


def _planned(parts: Sequence[Records]) -> set[SampleKey]:
    return {SampleKey(case, tile) for part in parts for case, tiles in part.planned.items() for tile in tiles}


def _join(condition: Condition, parts: Sequence[Records]) -> Outcome:
    planned = _planned(parts)
    complete = {case for part in parts for case in part.complete_cases}
    scores = {key: score for part in parts for key, score in part.samples[condition].items() if key in planned}
    cases = {name: score for part in parts for name, score in part.cases[condition].items() if name in complete}
    whole = {name: found for part in parts for name, found in part.end_to_end[condition].items() if name in complete}
    samples = [scores[key] for key in sorted(scores)]
    worst = examples_of(condition, parts, lost_most) if condition.level else []
    return Outcome(
        condition.attack, condition.level, samples, dict(sorted(cases.items())), dict(sorted(whole.items())), worst
    )


def examples_of(
    condition: Condition, parts: Sequence[Records], choose: Callable[[Iterable[SampleScore]], list[SampleScore]]
) -> list[Example]:
    """The samples chosen among those of all parts together, as far as they are on the disk."""
    scores = {key: score for part in parts for key, score in part.samples[condition].items()}
    found = ((part.load_example(condition, score.sample) for part in parts) for score in choose(scores.values()))
    shown = [next((example for example in examples if example is not None), None) for examples in found]
    return [example for example in shown if example is not None]


def _join_findings(parts: Sequence[Sequence[Finding]]) -> list[Finding]:
    """A check has passed if it has in all parts; of those where it has not, the first one's sentence."""
    names = dict.fromkeys(finding.name for part in parts for finding in part)
    joined = []
    for name in names:
        mine = [finding for part in parts for finding in part if finding.name == name]
        joined.append(next((finding for finding in mine if not finding.passed), mine[0]))
    return joined


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more cases" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
