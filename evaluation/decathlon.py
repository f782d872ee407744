"""Take a task folder of the Medical Segmentation Decathlon into nnU-Net."""

from __future__ import annotations

import re
from pathlib import Path

from nnunet_ima.errors import UserError

_PARTS = ("imagesTr", "labelsTr", "dataset.json")


def stage_task(source: Path, staging: Path) -> Path:
    """A view of a task folder that ``nnUNetv2_convert_MSD_dataset`` takes, made of links.

    The converter needs an ``imagesTs`` folder, which a copy without test scans lacks, and a name of the form
    ``TaskNN_Name`` with a single underscore.

    Args:
        source: the task folder: imagesTr, labelsTr, dataset.json.
        staging: where to make the view.

    Returns:
        The view's folder.

    Raises:
        UserError: ``source`` is no such folder.
    """
    missing = [part for part in _PARTS if not (source / part).exists()]
    if missing:
        raise UserError(f"{source} is no task folder of the Decathlon: it has no {missing[0]}.")
    view = staging / view_name(source)
    (view / "imagesTs").mkdir(parents=True, exist_ok=True)
    for part in _PARTS:
        link = view / part
        if not link.exists():
            # Also one to where the task was before it was moved.
            link.unlink(missing_ok=True)
            link.symlink_to((source / part).resolve())
    return view


def view_name(source: Path) -> str:
    """Name of the view of a task folder.

    Raises:
        UserError: the folder is not named like a task.
    """
    number, name = _number_and_name(source.resolve().name)
    return f"Task{number:02d}_{name}"


def dataset_name(view: Path) -> str:
    """nnU-Net's name of a staged task."""
    number, name = _number_and_name(view.name)
    return f"Dataset{number:03d}_{name}"


def task_number(view: Path) -> int:
    """Number of a staged task, which becomes the dataset's number in nnU-Net."""
    return _number_and_name(view.name)[0]


def _number_and_name(folder: str) -> tuple[int, str]:
    match = re.fullmatch(r"Task(\d{1,3})_(\w+)", folder)
    if match is None:
        raise UserError(f"The folder {folder!r} is not named like a task of the Decathlon, such as Task04_Hippocampus.")
    return int(match[1]), match[2].replace("_", "")
