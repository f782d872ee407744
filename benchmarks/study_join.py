"""Join results of one study that were made in several work folders, as of its repetitions on several machines.

    python benchmarks/paper_scale.py --data <task folder> -o work --scale small --repetitions 1
    python benchmarks/paper_scale.py --data <task folder> -o work --scale small --from-repetition 2  # elsewhere
    python benchmarks/study_join.py here/paper_scale_small.json there/paper_scale_small.json --results joined

What was trained with other settings, or attacked on other samples, at other levels or with other seeds, is refused, and
so is a repetition that was trained twice. A model that was trained in one work folder and carried to another may have
been through some evaluations here, and others there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from study_results import table

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

Row = Mapping[str, Any]
SEEDS = ("samples", "seed", "samples_seed")


def main() -> None:
    """Write the joined JSON and its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="paper_scale_<scale>.json of each part")
    parser.add_argument("--results", type=Path, required=True, help="where the joined JSON and its table go")
    options = parser.parse_args()
    try:
        joined = join([read(file) for file in options.files])
    except UserError as error:
        raise SystemExit(str(error)) from None
    options.results.mkdir(parents=True, exist_ok=True)
    file = options.results / f"paper_scale_{joined['scale']}.json"
    write_text(file, json.dumps(joined, indent=1) + "\n")
    write_text(file.with_suffix(".md"), table(joined))


def read(file: Path) -> dict[str, Any]:
    """A part.

    Raises:
        UserError: it is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}.") from None
    if not isinstance(found, dict) or not {"scale", "dataset", "parts", "rows"} <= found.keys():
        raise UserError(f"{file} is no result of paper_scale.py; name its paper_scale_<scale>.json.")
    return found


def join(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All rows, method by method as the parts come, repetition by repetition.

    Args:
        results: of the parts.

    Raises:
        UserError: they are not of one study.
    """
    for key in ("scale", "dataset"):
        found = sorted({str(result[key]) for result in results})
        if len(found) > 1:
            raise UserError(f"These are results of different studies: {key} {' and '.join(found)}.")
    rows: dict[tuple[str, int], Row] = {}
    for row in (row for result in results for row in result["rows"]):
        which = str(row["method"]), int(row["repetition"])
        rows[which] = _both(rows[which], row) if which in rows else row
    _refuse_other_settings(rows.values())
    _refuse_other_evaluations(rows.values())
    methods = list(dict.fromkeys(method for method, _ in rows))
    ordered = sorted(rows.values(), key=lambda row: (row["repetition"], methods.index(row["method"])))
    parts = [part for result in results for part in result["parts"]]
    return {**{key: results[0][key] for key in ("scale", "dataset")}, "parts": parts, "rows": ordered}


def _both(one: Row, other: Row) -> Row:
    """Of one training, the evaluations that either has."""
    name = _name(one)
    trained = [row["training"] for row in (one, other) if row["training"]]
    if len(trained) == 2 and trained[0] != trained[1]:
        raise UserError(f"{name} was trained twice; leave one of the two out, or give it another number.")
    evaluations = dict(one["evaluations"])
    for evaluation, found in other["evaluations"].items():
        mine = evaluations.get(evaluation)
        if mine and found and mine != found:
            raise UserError(f"{name} went through {evaluation} twice, and the figures are not the same.")
        evaluations[evaluation] = mine or found
    return {**one, "training": trained[0] if trained else None, "evaluations": evaluations}


def _refuse_other_settings(rows: Iterable[Row]) -> None:
    first: dict[str, Row] = {}
    for row in rows:
        before = first.setdefault(row["method"], row)
        if row["settings"] != before["settings"]:
            raise UserError(f"{_name(row)} was trained with other settings than {_name(before)}.")


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
    return f"{row['method']}, repetition {int(row['repetition']) + 1},"


if __name__ == "__main__":
    main()
