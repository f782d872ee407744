"""A small copy of a Decathlon task, so that a gate can train and evaluate within minutes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from tqdm import tqdm

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class Subset:
    """What to keep of a task.

    Attributes:
        cases: how many, drawn with ``seed`` from those with a label file.
        margin: crop to the foreground and this many voxels around it; None to keep whole scans.
        shrink: voxels become this many times as large along each axis of the scan's plane.
    """

    cases: int
    seed: int = 0
    margin: int | None = None
    shrink: int = 1


def make_subset(task: Path, output: Path, subset: Subset, progress: bool = True) -> Path:
    """Write a task folder of the same form: imagesTr, labelsTr, dataset.json.

    The geometry in world coordinates stays, so that a label lies where it lay. Labels keep their values; where voxels
    are enlarged, the value of the nearest one is taken.

    Args:
        task: a task folder of the Decathlon.
        output: the new one, TaskNN_Name; it must not exist.
        subset: what to keep.
        progress: whether to show a bar.

    Raises:
        UserError: the task is not complete, has fewer cases, or ``output`` exists.
    """
    description = _read_description(task)
    if not re.fullmatch(r"Task\d{1,3}_\w+", output.name):
        raise UserError(f"The folder {output.name!r} must be named like a task of the Decathlon, such as Task04_Tiny.")
    if output.exists():
        raise UserError(f"{output} exists already; remove it or give another folder.")
    names = _complete_cases(task, description)
    if subset.cases > len(names):
        raise UserError(f"{task} has {len(names)} cases with a scan and a label, so {subset.cases} cannot be taken.")
    chosen = sorted(random.Random(subset.seed).sample(names, subset.cases))
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        # nnU-Net's converter asks for a folder of test scans, even an empty one.
        for part in ("imagesTr", "labelsTr", "imagesTs"):
            (temporary / part).mkdir(parents=True)
        for name in tqdm(chosen, unit="case", disable=not progress):
            _copy(task, temporary, name, subset)
        write_text(temporary / "dataset.json", json.dumps(_described(description, chosen), indent=1) + "\n")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def _read_description(task: Path) -> dict[str, Any]:
    file = task / "dataset.json"
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{task} is no task folder of the Decathlon: it has no dataset.json.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); restore it.") from error
    if not isinstance(description, dict) or not isinstance(description.get("training"), list):
        raise UserError(f"{file} lists no training cases; it is not that of a Decathlon task.")
    return description


def _complete_cases(task: Path, description: Mapping[str, Any]) -> list[str]:
    """Names of the listed cases.

    Raises:
        UserError: a listed case lacks its scan or its label, or an entry names neither.
    """
    names = []
    for entry in description["training"]:
        image, label = (entry.get(kind) if isinstance(entry, dict) else None for kind in ("image", "label"))
        if not isinstance(image, str) or not isinstance(label, str) or Path(image).name != Path(label).name:
            raise UserError(f"{task / 'dataset.json'} lists {entry!r} as a case, which names no scan with its label.")
        name = Path(image).name.removesuffix(SUFFIX)
        if not (task / "imagesTr" / f"{name}{SUFFIX}").is_file():
            continue  # copies of a task often hold some of its scans only
        if not (task / "labelsTr" / f"{name}{SUFFIX}").is_file():
            raise UserError(
                f"The case {name} has no label: {task / 'labelsTr' / (name + SUFFIX)} is missing; add it, or take the "
                f"scan away."
            )
        names.append(name)
    return sorted(names)


def _copy(task: Path, target: Path, name: str, subset: Subset) -> None:
    label = _read(task / "labelsTr" / f"{name}{SUFFIX}")
    image = _read(task / "imagesTr" / f"{name}{SUFFIX}")
    if image.GetSize()[:3] != label.GetSize():
        raise UserError(f"Scan and label of the case {name} in {task} differ in size; correct one of them.")
    box = None if subset.margin is None else _box(label, subset.margin, name)
    for part, volume in (("imagesTr", image), ("labelsTr", label)):
        _write_image(_reduced(volume, box, subset.shrink), target / part / f"{name}{SUFFIX}")


def _write_image(volume: SimpleITK.Image, file: Path) -> None:
    # SimpleITK says nothing where a full disk cuts a file off, so what was written is read again.
    try:
        SimpleITK.WriteImage(volume, str(file), True)
        there, wanted = map(SimpleITK.GetArrayFromImage, (SimpleITK.ReadImage(str(file)), volume))
        whole = np.array_equal(there, wanted, equal_nan=True)
    except RuntimeError:
        whole = False
    if not whole:
        raise UserError(
            f"{file} could not be written whole, so nothing of the copy was kept; make room on the disk, or give "
            f"another folder with -o."
        )


def _reduced(volume: SimpleITK.Image, box: Sequence[slice] | None, shrink: int) -> SimpleITK.Image:
    """Cropped, then with larger voxels; a fourth axis, of the channels, stays whole."""
    if volume.GetDimension() == 4:  # for which SimpleITK has neither filter
        channels = [_reduced(volume[:, :, :, i], box, shrink) for i in range(volume.GetSize()[3])]
        return SimpleITK.JoinSeries(channels, volume.GetOrigin()[3], volume.GetSpacing()[3])
    if box is not None:
        sizes = [part.stop - part.start for part in box]
        volume = SimpleITK.RegionOfInterest(volume, sizes, [part.start for part in box])
    # Means of intensities would be smoother, but then a scan would be another one, with less noise.
    return SimpleITK.Shrink(volume, [shrink, shrink, 1]) if shrink > 1 else volume


def _read(file: Path) -> SimpleITK.Image:
    try:
        return SimpleITK.ReadImage(str(file))
    except RuntimeError as error:
        raise UserError(f"{file} cannot be read as a NIfTI file; restore it.") from error


def _box(label: SimpleITK.Image, margin: int, name: str) -> list[slice]:
    found = np.nonzero(SimpleITK.GetArrayViewFromImage(label))
    if not len(found[0]):
        raise UserError(f"The case {name} has no foreground to crop around; keep whole scans, or take it away.")
    # SimpleITK counts x first, numpy z.
    axes = zip(reversed(found), label.GetSize(), strict=True)
    return [slice(max(int(i.min()) - margin, 0), min(int(i.max()) + margin + 1, size)) for i, size in axes]


def _described(description: Mapping[str, Any], chosen: Sequence[str]) -> dict[str, Any]:
    cases = [{"image": f"./imagesTr/{name}{SUFFIX}", "label": f"./labelsTr/{name}{SUFFIX}"} for name in chosen]
    return {**description, "numTraining": len(cases), "training": cases, "numTest": 0, "test": []}
