"""Join results of one study that were made in several work folders, as of its repetitions on several machines.

    python benchmarks/paper_scale.py --data <task folder> -o work --scale small --repetitions 1
    python benchmarks/paper_scale.py --data <task folder> -o work --scale small --from-repetition 2  # elsewhere
    python benchmarks/study_join.py here/paper_scale_small.json there/paper_scale_small.json --results joined

What was trained with other settings or lengths, or attacked on other samples, at other levels or with other seeds, is
refused, and so is a repetition that was trained twice, or one training as two repetitions. A model that was trained in
one work folder and carried to another may have been through some evaluations here, and others there. Versions may
differ: the page says which there were.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_machines import machine_lines
from study_results import in_order, table

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

Row = Mapping[str, Any]
ALIKE = ("scale", "dataset", "network")
KEYS = {*ALIKE, "parts", "rows"}
# What all methods of a study have in common.
LENGTH = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "initial_lr")
SEEDS = ("samples", "seed", "samples_seed")
# A model that is carried is rounded on the way; how long an evaluation took, and where, is none of its figures.
NOT_OF_A_TRAINING, NOT_OF_AN_EVALUATION = {"weights"}, {"seconds", "machines"}


def main() -> None:
    """Write the joined JSON and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="paper_scale_<scale>.json of each part")
    parser.add_argument("--results", type=Path, required=True, help="where the joined JSON and its table go")
    options = parser.parse_args()
    try:
        joined = join([read(file) for file in options.files])
        text = table(joined)
        write(options.results / f"paper_scale_{joined['scale']}.json", json.dumps(joined, indent=1) + "\n", text)
    except UserError as error:
        raise SystemExit(str(error)) from None
    sys.stdout.write("\n".join([text, *machine_lines(joined["rows"]), ""]))


def write(file: Path, result: str, text: str) -> None:
    """Both files, the table first: whoever finds the JSON finds its table.

    Raises:
        UserError: they cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file.with_suffix(".md"), text)
        write_text(file, result)
    except OSError as error:
        raise UserError(f"{file.parent} cannot take the results: {error}.") from None


def read(file: Path) -> dict[str, Any]:
    """A part.

    Raises:
        UserError: it is none, or is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(found, dict) or not found.keys() >= KEYS or not found["rows"]:
        raise UserError(f"{file} is no result of this version of paper_scale.py; name its paper_scale_<scale>.json.")
    try:
        sound = all(_is_sound(row) for row in found["rows"])
        join([found])
        machine_lines(found["rows"])
        table(found)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{file} is damaged ({type(error).__name__}: {error}); take it from the work folder.") from None
    if not sound:
        raise UserError(f"{file} is damaged: a number is beyond what it can be; take it from the work folder.")
    return found


def _is_sound(row: Row) -> bool:
    figures = [
        float(one["tvdi"])
        for found in row["evaluations"].values()
        if found
        for one in (found["clean"], found["clamp_only"] or found["clean"], *found["results"])
    ]
    numbered = isinstance(row["repetition"], int) and row["repetition"] >= 0
    return numbered and isinstance(row["method"], str) and all(0 <= figure <= 1 for figure in figures)


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rows, in the order of the tables, and all parts.

    Args:
        results: of the parts.

    Raises:
        UserError: they are not of one study.
    """
    for key in ALIKE:
        found = list(dict.fromkeys(json.dumps(result[key], sort_keys=True) for result in results))
        if len(found) > 1:
            raise UserError(f"These are results of different studies: {key} {' and '.join(sorted(found))}.")
    every = [row for result in results for row in result["rows"]]
    _refuse_other_settings(every)
    rows: dict[tuple[str, int], Row] = {}
    for row in every:
        which = row["method"], row["repetition"]
        rows[which] = _both(rows[which], row) if which in rows else row
    _refuse_one_training_as_two(rows.values())
    _refuse_other_evaluations(rows.values())
    # A part may have been asked for fewer evaluations.
    names = list(dict.fromkeys(name for row in rows.values() for name in row["evaluations"]))
    whole = [{**row, "evaluations": {name: row["evaluations"].get(name) for name in names}} for row in rows.values()]
    parts: list[Any] = []
    for part in (part for result in results for part in result["parts"]):
        parts += [part] if part not in parts else []
    return {**{key: results[0][key] for key in ALIKE}, "parts": parts, "rows": in_order(whole)}


def _both(one: Row, other: Row) -> Row:
    """Of one training, the evaluations that either has."""
    name = _name(one)
    for row, beside in ((one, other), (other, one)):
        if any(row["evaluations"].values()) and not row["training"] and beside["training"]:
            raise UserError(f"{name} was evaluated in one part, and trained in another: is that the same model?")
    trained = [row["training"] for row in (one, other) if row["training"]]
    if len(trained) == 2 and _trained(trained[0]) != _trained(trained[1]):
        raise UserError(f"{name} was trained twice; leave one of the two out.")
    evaluations = dict(one["evaluations"])
    for evaluation, found in other["evaluations"].items():
        mine = evaluations.get(evaluation)
        if mine and found and _figures(mine) != _figures(found):
            raise UserError(f"{name} went through {evaluation} twice, and the figures are not the same.")
        evaluations[evaluation] = mine or found
    # Of one training the weights that were attacked are those that count.
    attacked = [row["training"] for row in (one, other) if row["training"] and any(row["evaluations"].values())]
    training = next(iter([*attacked, *trained]), None)
    return {**one, "training": training, "evaluations": evaluations}


def _trained(training: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in training.items() if key not in NOT_OF_A_TRAINING}


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in evaluation.items() if key not in NOT_OF_AN_EVALUATION}


def _refuse_other_settings(rows: Iterable[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        settings, training = row["settings"], row["training"]
        before = first.setdefault(row["method"], row)
        length = next(iter(first.values()))
        if settings != before["settings"]:
            raise UserError(f"{_name(row)} was trained with other settings than {_name(before)}.")
        if any(settings.get(key) != length["settings"].get(key) for key in LENGTH):
            raise UserError(
                f"{_name(row)} was not trained alike: its length or learning rate is not {_name(length)}'s."
            )
        if training and training["epochs"] != settings.get("num_epochs", training["epochs"]):
            raise UserError(f"{_name(row)} was trained for {training['epochs']} epochs, which is not what was asked.")


def _refuse_one_training_as_two(rows: Iterable[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        if row["training"]:
            mark = json.dumps([row["method"], _trained(row["training"])], sort_keys=True)
            if (before := first.setdefault(mark, row)) is not row:
                raise UserError(f"{_name(row)} is the training of {_name(before)}; leave one of the two out.")


def _refuse_other_evaluations(rows: Iterable[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        for evaluation, found in row["evaluations"].items():
            if found and _asked(found) != _asked(first.setdefault(evaluation, row)["evaluations"][evaluation]):
                raise UserError(
                    f"{evaluation} of {_name(row)} is of other attacks, levels, samples or seeds than of "
                    f"{_name(first[evaluation])}."
                )


def _asked(evaluation: Mapping[str, Any]) -> list[Any]:
    return [
        *(evaluation[key] for key in SEEDS),
        *((result["attack"], result["level"]) for result in evaluation["results"]),
    ]


def _name(row: Row) -> str:
    return f"{row['method']} (repetition {row['repetition'] + 1})"


if __name__ == "__main__":
    main()
