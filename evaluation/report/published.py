"""What the paper reports, to stand beside one's own figures. Numbers, quoted with their source."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

TABLE3 = "IMA, final version (arXiv 2005.09147 v10), Table 3: AutoAttack, images clamped to [0, 1]"
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
    norm, protocol = summary["protocol"]["norm"], summary["protocol"]["name"]
    if protocol == "paper":
        rows = _read("table3.csv")
        mine = [row for row in rows if row["attack"] == "AutoAttack" and row["norm"].lower() == norm]
        return [_row(TABLE3, row) for row in mine if dataset.startswith(row["dataset"])]
    if norm != "l2":
        return []
    rows = [row for row in _read("pgd100.csv") if row["metric"] == "TVDI"]
    return [_row(PGD100, row) for row in rows if dataset.startswith(row["dataset"])]


def _row(source: str, row: Mapping[str, str]) -> Published:
    numbers = [key.removeprefix("level") for key in row if key.startswith("level") and row[key]]
    levels = {row[f"level{number}"]: _number(row[f"dice{number}"]) for number in numbers}
    return Published(source, row["method"], _number(row["clean"]), levels)


def _number(text: str) -> float | None:
    return float(text) if text else None


def _read(name: str) -> list[dict[str, str]]:
    text = (files("nnunet_ima.evaluation.report") / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
