"""What the paper reports, to stand beside one's own figures. Numbers, quoted with their source."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

TABLE3 = {
    "AutoAttack": "IMA, final version (arXiv 2005.09147 v10), Table 3: AutoAttack, images clamped to [0, 1]",
    "WhiteNoise": "IMA, final version (arXiv 2005.09147 v10), Table 3: white noise, images clamped to [0, 1]",
}
PGD100 = "IMA, earlier version, Tables 5 to 10: PGD with 100 steps, L2, images not clamped"


@dataclass(frozen=True)
class Published:
    """A published row.

    Attributes:
        source: where.
        method: its name there.
        clean: Dice in %, None where the text lost it.
        levels: Dice in % by level.
    """

    source: str
    method: str
    clean: float | None
    levels: dict[str, float | None]


def published_for(summary: Mapping[str, Any]) -> list[Published]:
    """The rows that belong to a run's dataset, norm and protocol; none for other datasets."""
    dataset = str(summary["model"]["dataset"]).partition("_")[2]
    attack = "AutoAttack" if summary["protocol"]["name"] == "paper" else "PGD"
    return published_rows(dataset, attack, summary["protocol"]["norm"])


def published_rows(dataset: str, attack: str, norm: str) -> list[Published]:
    """The rows of an attack.

    Args:
        dataset: its name without number, or what begins with it; none for others than the paper's.
        attack: ``AutoAttack`` or ``WhiteNoise`` for Table 3 (protocol ``paper``); ``PGD`` for the earlier version's
            tables (protocol ``sound``), which are of L2 alone.
        norm: l2 or linf.
    """
    if attack != "PGD":
        rows = [row for row in _read("table3.csv") if row["attack"] == attack and row["norm"].lower() == norm]
        return [_row(TABLE3[attack], row) for row in rows if dataset.startswith(row["dataset"])]
    if norm != "l2":
        return []
    rows = [row for row in _read("pgd100.csv") if row["metric"] == "TVDI"]
    return [_row(PGD100, row) for row in rows if dataset.startswith(row["dataset"])]


def published_levels(dataset: str, attack: str, norm: str) -> list[str]:
    """The levels of :func:`published_rows`, as written there."""
    return list(dict.fromkeys(level for row in published_rows(dataset, attack, norm) for level in row.levels))


def _row(source: str, row: Mapping[str, str]) -> Published:
    numbers = [key.removeprefix("level") for key in row if key.startswith("level") and row[key]]
    levels = {row[f"level{number}"]: _number(row[f"dice{number}"]) for number in numbers}
    return Published(source, row["method"], _number(row["clean"]), levels)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _read(name: str) -> list[dict[str, str]]:
    text = (files("nnunet_ima.evaluation.report") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
