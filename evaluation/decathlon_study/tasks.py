"""The paper's three tasks, and the folders of scans that were given for them."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunet_ima.errors import UserError
from nnunet_ima.files import read_json
from nnunet_ima.settings import PAPER

FOLDS = 5
# nnU-Net's own, so that its fold 0 is ours.
SPLIT_SEED = 12345
SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class PaperTask:
    """A task as the final paper describes it (3.5.3 to 3.5.5).

    Attributes:
        number, name: in the Decathlon.
        training, validation, test: numbers of cases.
        batch_size, patch_size: that nnU-Net planned in 2D.
        median_shape: of the scans, in voxels, slices first.
        channels, classes: of the Decathlon's data; foreground classes only.
    """

    number: int
    name: str
    training: int
    validation: int
    test: int
    batch_size: int
    patch_size: tuple[int, int]
    median_shape: tuple[int, int, int]
    channels: int
    classes: int

    @property
    def cases(self) -> int:
        """All of them."""
        return self.training + self.validation + self.test

    @property
    def epsilon(self) -> float:
        """ε of all trainings, L2."""
        return PAPER[f"Dataset{self.number:03d}_{self.name}"]["epsilon"]

    @property
    def delta_epsilon(self) -> float:
        """Δε of IMA."""
        return PAPER[f"Dataset{self.number:03d}_{self.name}"]["delta_epsilon"]


TASKS = {
    2: PaperTask(2, "Heart", 16, 1, 3, 40, (320, 256), (115, 320, 320), 1, 1),
    4: PaperTask(4, "Hippocampus", 208, 17, 35, 366, (56, 40), (36, 50, 35), 1, 2),
    5: PaperTask(5, "Prostate", 25, 2, 5, 32, (320, 320), (20, 320, 319), 2, 2),
}


@dataclass(frozen=True)
class Split:
    """Names of cases.

    Attributes:
        training: nnU-Net learns from them.
        validation: as many as the paper kept for this; nothing is chosen by them here, so they are left aside.
        test: attacked.
    """

    training: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def as_fold(self) -> dict[str, list[str]]:
        """As nnU-Net writes a fold."""
        return {"train": list(self.training), "val": list(self.test)}


@dataclass(frozen=True)
class GivenTask:
    """A folder of scans for one of the paper's tasks.

    Attributes:
        paper: the paper's.
        folder: TaskNN_Name.
        cases: names of those with scan and label, sorted.
        description: what its dataset.json says of it.
        channels, classes: of its images and labels; foreground classes only.
    """

    paper: PaperTask
    folder: Path
    cases: tuple[str, ...]
    description: str
    channels: int
    classes: int

    @property
    def title(self) -> str:
        """Short, for folders and messages."""
        return f"Task{self.paper.number:02d}"

    @property
    def is_the_paper_s(self) -> bool:
        """Whether folder and number of cases are those of the Decathlon's own task."""
        return self.folder.name == f"{self.title}_{self.paper.name}" and len(self.cases) == self.paper.cases

    @cached_property
    def split(self) -> Split:
        """nnU-Net's fold 0, whose validation cases are shared out between validation and test as in the paper.

        With as many cases as the paper's this gives the paper's numbers.
        """
        fold = generate_crossval_split(list(self.cases), seed=SPLIT_SEED, n_splits=FOLDS)[0]
        held_out = sorted(map(str, fold["val"]))
        share = self.paper.test / (self.paper.test + self.paper.validation)
        test = set(random.Random(0).sample(held_out, max(1, int(share * len(held_out) + 0.5))))
        return Split(
            tuple(sorted(map(str, fold["train"]))),
            tuple(name for name in held_out if name not in test),
            tuple(name for name in held_out if name in test),
        )


def find_tasks(raw: Path, numbers: Sequence[int]) -> list[GivenTask]:
    """The folders of the tasks.

    Raises:
        UserError: a number is none of the paper's, or its folder is missing, ambiguous or not usable.
    """
    unknown = [number for number in numbers if number not in TASKS]
    if unknown:
        raise UserError(
            f"Task {unknown[0]} is none of the paper's; choose among {', '.join(map(str, TASKS))} with --tasks."
        )
    if not raw.is_dir():
        raise UserError(f"{raw} is no folder; give the one that holds the tasks of the Decathlon with --raw.")
    return [_read(TASKS[number], _find(raw, number)) for number in dict.fromkeys(numbers)]


def _find(raw: Path, number: int) -> Path:
    pattern = re.compile(rf"Task0*{number}_\w+")
    found = sorted(folder for folder in raw.iterdir() if folder.is_dir() and pattern.fullmatch(folder.name))
    if not found:
        raise UserError(
            f"{raw} has no folder of task {number}, such as Task{number:02d}_{TASKS[number].name}; put it there, or "
            f"leave {number} out of --tasks."
        )
    if len(found) > 1:
        names = " and ".join(folder.name for folder in found)
        raise UserError(f"{raw} has several folders of task {number} ({names}); keep one of them there.")
    return found[0]


def _read(paper: PaperTask, folder: Path) -> GivenTask:
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        if not (folder / part).exists():
            raise UserError(f"{folder} is no task folder of the Decathlon: it has no {part}.")
    scans, labels = (_names(folder / part) for part in ("imagesTr", "labelsTr"))
    alone = sorted(scans ^ labels)
    if alone:
        raise UserError(f"In {folder} the case {alone[0]} has a scan or a label but not both; complete or remove it.")
    if len(labels) < FOLDS:
        raise UserError(f"{folder} has {len(labels)} cases; nnU-Net's {FOLDS} folds need at least {FOLDS}.")
    content = read_json(folder / "dataset.json")
    channels, classes = _table(content, "modality", folder), _table(content, "labels", folder)
    foreground = sum(name != "ignore" and str(value) != "0" for value, name in classes.items())
    description = " ".join(str(content.get("description", "")).split())
    return GivenTask(paper, folder.resolve(), tuple(sorted(labels)), description, len(channels), foreground)


def _table(content: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    table = content.get(key)
    if not isinstance(table, dict) or not table:
        raise UserError(f"{folder / 'dataset.json'} has no table {key!r}, as the Decathlon's have.")
    return table


def _names(folder: Path) -> set[str]:
    files = (file.name for file in folder.iterdir())
    return {name.removesuffix(SUFFIX) for name in files if name.endswith(SUFFIX) and name[0] not in "._"}
