"""Read the results of an evaluation back, for reports and gates."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.identity import digest, read_run, read_sealed
from nnunet_ima.evaluation.merge import conditions_of, examples_of
from nnunet_ima.evaluation.metrics import Array, class_scores
from nnunet_ima.evaluation.outcomes import CLAMP, CLEAN, SampleScore, drawn_by_lot, lost_most
from nnunet_ima.evaluation.records import Records, part_folders
from nnunet_ima.evaluation.summary import SCHEMA

Key = tuple[str, str]
"""Attack and level as they were written; ``("clean", "0")`` for none."""
UNTOUCHED: Key = (CLEAN, "0")
CLAMPED: Key = (CLAMP, "0")
ADVICE = "write it again with nnunet_ima evaluate --merge"


@dataclass(frozen=True)
class SampleTable:
    """The samples of one condition, in the order of cases and tiles.

    Attributes:
        cases: (n,) of names.
        tiles: (n,) of numbers.
        dice: (n,), in [0, 1], of the image that was kept.
        counts: (n, F, 3) of the tp, fp, fn that TVDI pools: of an ensemble, of the points chosen for it.
    """

    cases: np.ndarray[Any, Any]
    tiles: np.ndarray[Any, Any]
    dice: Array
    counts: Array

    @property
    def sizes(self) -> Array:
        """(n,) voxels of foreground in the reference, classes or regions added up."""
        sizes: Array = self.counts[:, :, [0, 2]].sum((1, 2))
        return sizes

    def by_case(self) -> tuple[list[str], Array]:
        """Names of the cases, and their samples' counts added up, (cases, F, 3)."""
        names = list(dict.fromkeys(self.cases.tolist()))
        return names, np.stack([self.counts[self.cases == name].sum(0) for name in names])


@dataclass(frozen=True, eq=False)
class Results:
    """A finished evaluation.

    Attributes:
        folder: where it is.
        title: for people.
        summary: of summary.json.
        samples: of samples.csv, by condition.
        cases: of cases.csv, by condition and then case: ``dice``, ``hd95_mm``, ``surface_dice_1mm`` for each class.
    """

    folder: Path
    title: str
    summary: dict[str, Any]
    samples: dict[Key, SampleTable]
    cases: dict[Key, dict[str, dict[str, list[float]]]]

    @property
    def attacked(self) -> list[dict[str, Any]]:
        """The summary's results."""
        found: list[dict[str, Any]] = self.summary["results"]
        return found

    def figures(self, key: Key) -> Mapping[str, Any] | None:
        """The summary's figures of a condition, None if it was not run."""
        if key == UNTOUCHED:
            clean: dict[str, Any] = self.summary["clean"]
            return clean
        if key == CLAMPED:
            clamped: dict[str, Any] | None = self.summary.get("clamp_only")
            return clamped
        return next((item for item in self.attacked if (item["attack"], item["level"]) == key), None)

    def case_dice(self, key: Key, whole: bool) -> dict[str, float]:
        """Dice of each case by its name, classes averaged: nnU-Net's, or that of its samples as TVDI pools them."""
        if whole:
            return {name: _mean(scores["dice"]) for name, scores in self.cases[key].items()}
        names, counts = self.samples[key].by_case()
        dice = class_scores(counts[..., 0], counts[..., 1], counts[..., 2])
        return {name: _mean(row.tolist()) for name, row in zip(names, dice, strict=True)}

    def worst(self, key: Key) -> list[Example]:
        """The samples that lost most Dice under a condition."""
        return self._examples(key, lost_most)

    def drawn(self, key: Key) -> list[Example]:
        """The same samples for every model: see :func:`~nnunet_ima.evaluation.outcomes.drawn_by_lot`."""
        return self._examples(key, drawn_by_lot)

    def _examples(self, key: Key, choose: Callable[[Iterable[SampleScore]], list[SampleScore]]) -> list[Example]:
        identity = read_run(self.folder)["identity"]
        conditions = conditions_of(identity)
        wanted = next(c for c in conditions if (c.attack, c.level.text if c.level else "0") == key)
        parts = [Records(folder, conditions, digest(identity)) for folder in part_folders(self.folder)]
        return examples_of(wanted, parts, choose)


def read_results(folder: Path, title: str | None = None) -> Results:
    """Read the folder of an evaluation.

    Raises:
        UserError: a file is missing, damaged, of another version, or was changed after it was written.
    """
    summary = read_summary(folder)
    regions = [str(region) for region in summary["labels"]]
    for name, wanted in summary["tables"].items():
        if digest(_text(folder / name)) != wanted:
            raise UserError(f"{folder / name} was changed after it was written; {ADVICE} -o {folder}.")
    samples = dict(_sample_tables(folder / "samples.csv", regions))
    return Results(folder, title or _title(summary), summary, samples, _case_tables(folder / "cases.csv", regions))


def read_summary(folder: Path) -> dict[str, Any]:
    """What summary.json says.

    Raises:
        UserError: it is missing, damaged, of another version, or was changed after it was written.
    """
    return read_sealed(folder / "summary.json", SCHEMA, f"finish or repeat it: {ADVICE} -o {folder}")


def read_if_whole(folder: Path) -> dict[str, Any] | None:
    """What summary.json says; None where it is to be written again: missing, damaged, or changed since."""
    try:
        return read_summary(folder)
    except UserError:
        return None


def _title(summary: Mapping[str, Any]) -> str:
    model = summary["model"]
    return f"{model['trainer']} {model['dataset']} {model['configuration']} fold {model['fold']}"


def _sample_tables(file: Path, regions: list[str]) -> Iterator[tuple[Key, SampleTable]]:
    for key, rows in _rows(file).items():
        counts = [
            [[float(row[f"tvdi_{kind}_{region}"]) for kind in ("tp", "fp", "fn")] for region in regions] for row in rows
        ]
        yield (
            key,
            SampleTable(
                np.array([row["case"] for row in rows]),
                np.array([int(row["tile"]) for row in rows]),
                np.array([float(row["dice"]) for row in rows]),
                np.array(counts, float),
            ),
        )


def _case_tables(file: Path, regions: list[str]) -> dict[Key, dict[str, dict[str, list[float]]]]:
    kinds = ("dice", "hd95_mm", "surface_dice_1mm")
    return {
        key: {
            row["case"]: {kind: [float(row[f"{kind}_{region}"] or "nan") for region in regions] for kind in kinds}
            for row in rows
        }
        for key, rows in _rows(file).items()
    }


def _rows(file: Path) -> dict[Key, list[dict[str, str]]]:
    found: dict[Key, list[dict[str, str]]] = {}
    for row in csv.DictReader(io.StringIO(_text(file), newline="")):
        found.setdefault((row["attack"], row["level"]), []).append(row)
    return found


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file} is missing; {ADVICE} -o {file.parent}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{file} is damaged; {ADVICE} -o {file.parent}.") from None


def _mean(values: list[float]) -> float:
    kept = [value for value in values if value == value]
    return sum(kept) / len(kept) if kept else float("nan")
