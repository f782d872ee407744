"""What the paper reports, to stand beside one's own figures. Numbers, quoted with their source."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from importlib.resources import files
from typing import Any, NamedTuple

from nnunet_ima.attacks import PGD
from nnunet_ima.evaluation.report.attacks_run import made_attack

TABLE3 = {
    "AutoAttack": "IMA, final version (arXiv 2005.09147 v10), Table 3: AutoAttack, images clamped to [0, 1]",
    "WhiteNoise": "IMA, final version (arXiv 2005.09147 v10), Table 3: white noise, images clamped to [0, 1]",
}
TASKS = {2: "Heart", 4: "Hippocampus", 5: "Prostate"}
PGD_STEPS = 100
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


class PaperTask(NamedTuple):
    """One of the paper's three tasks of the Decathlon, and whether a data set is that task or only stands in for it."""

    name: str
    number: int
    exact: bool

    @property
    def dataset(self) -> str:
        """nnU-Net's name of the task itself."""
        return f"Dataset{self.number:03d}_{self.name}"


def paper_task(dataset: str) -> PaperTask | None:
    """The paper's task that a data set is, or stands in for; None for any other.

    Only data sets of the task's own number count, which nnU-Net reserves for the Decathlon: ``Dataset002_Heart`` is
    the paper's, ``Dataset002_Heart8cases``, as ``nnunet_ima decathlon`` names another folder of that task, stands in
    for it, and ``Dataset101_HeartMRI`` is something else.
    """
    found = re.fullmatch(r"Dataset(\d+)_(.+)", dataset)
    if found is None:
        return None
    number, name = int(found[1]), found[2]
    task = TASKS.get(number)
    return PaperTask(task, number, name == task) if task is not None and name.startswith(task) else None


def published_attack(protocol: str, attack: str) -> str | None:
    """The published attack that one of ours may stand beside; None if there is none.

    Noise beside noise, the ensemble beside AutoAttack, 100 steps of PGD beside 100 steps of PGD. An ensemble that
    leaves a sample once its Dice is under the threshold (``mode=threshold``) does not look for the lowest Dice, which
    Table 3's does.

    Args:
        protocol: ``paper`` goes with Table 3, ``sound`` with the earlier version's tables.
        attack: as ``nnunet_ima evaluate`` takes it.
    """
    made = made_attack(attack)
    if made is None or made.mode != "dice":
        return None
    if protocol == "paper":
        return {"autoattack": "AutoAttack", "white-noise": "WhiteNoise"}.get(made.name)
    return "PGD" if isinstance(made, PGD) and made.steps == PGD_STEPS else None


def published_for(summary: Mapping[str, Any], attack: str) -> list[Published]:
    """The rows that belong to a run's dataset, network, norm and protocol.

    Args:
        summary: of a run.
        attack: ``AutoAttack``, ``WhiteNoise`` or ``PGD``; see :func:`published_attack`.

    Returns:
        Nothing for other data sets than the paper's, and for 3D networks: the paper's are 2D.
    """
    task = paper_task(str(summary["model"]["dataset"]))
    if task is None or len(summary["patch_size"]) != 2:
        return []
    return published_rows(task.name, attack, summary["protocol"]["norm"])


def level_value(text: str) -> float:
    """A published level as a number, as :func:`~nnunet_ima.evaluation.protocols.parse_level` reads one."""
    return float(Fraction(text))


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
