"""A small copy of a task: the chosen cases, with every label where it was."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.evaluation.subset import Subset, make_subset

CASES = 5


def volume(shape: tuple[int, ...], seed: int, spacing: tuple[float, ...], labels: bool) -> SimpleITK.Image:
    draws = np.random.default_rng(seed)
    if labels:
        array = np.zeros(shape, np.uint8)
        corner = [int(draws.integers(1, size // 2)) for size in shape]
        array[tuple(slice(c, c + size // 3) for c, size in zip(corner, shape, strict=True))] = 2
        array[tuple(corner)] = 1
    else:
        array = draws.normal(size=shape).astype(np.float32)
    image = SimpleITK.GetImageFromArray(array, isVector=False)
    image.SetSpacing(spacing)
    image.SetOrigin([3.0 * i - 40 for i in range(len(spacing))])
    if len(spacing) == 3:
        image.SetDirection((0, 1, 0, -1, 0, 0, 0, 0, 1))
    return image


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """Five cases of different sizes, turned and off the origin."""
    folder = tmp_path_factory.mktemp("source") / "Task77_Source"
    entries = []
    for number in range(CASES):
        name = f"case_{number}"
        shape = (9 + number, 20, 25 - number)
        for part, labels in (("imagesTr", False), ("labelsTr", True)):
            (folder / part).mkdir(parents=True, exist_ok=True)
            made = volume(shape, number, (1.0, 1.5, 3.0), labels)
            SimpleITK.WriteImage(made, str(folder / part / f"{name}.nii.gz"))
        entries.append({"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"})
    description = {
        "labels": {"0": "background", "1": "a", "2": "b"},
        "modality": {"0": "MRI"},
        "numTraining": CASES,
        "training": entries,
        "test": ["./imagesTs/x.nii.gz"],
    }
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def read(folder: Path, part: str, name: str) -> SimpleITK.Image:
    return SimpleITK.ReadImage(str(folder / part / f"{name}.nii.gz"))


def names(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix(".nii.gz") for file in (folder / "labelsTr").iterdir())


@settings(max_examples=15)
@given(st.integers(1, CASES), st.integers(0, 50), st.none() | st.integers(0, 30), st.integers(1, 3))
def test_what_is_kept_lies_where_it_lay(task, tmp_path_factory, cases, seed, margin, shrink):
    output = tmp_path_factory.mktemp("subset") / "Task78_Tiny"
    make_subset(task, output, Subset(cases, seed, margin, shrink), progress=False)
    description = json.loads((output / "dataset.json").read_text())
    assert len(names(output)) == description["numTraining"] == len(description["training"]) == cases
    assert description["labels"] == {"0": "background", "1": "a", "2": "b"}
    assert description["test"] == []
    for name in names(output):
        for part in ("imagesTr", "labelsTr"):
            before, after = read(task, part, name), read(output, part, name)
            array = SimpleITK.GetArrayFromImage(after)
            assert after.GetDirection() == pytest.approx(before.GetDirection())
            for index in np.ndindex(*(min(size, 3) for size in array.shape)):
                place = after.TransformIndexToPhysicalPoint([int(i) for i in reversed(index)])
                there = before.TransformPhysicalPointToContinuousIndex(place)
                # With voxels made larger, the middle of one may lie between two old ones.
                ends = [(int(np.floor(c + 1e-4)), int(np.ceil(c - 1e-4))) for c in there]
                near = [p for p in itertools.product(*ends) if np.all(np.less(p, before.GetSize()))]
                assert array[index] in {before.GetPixel(p) for p in near}
        label = SimpleITK.GetArrayFromImage(read(output, "labelsTr", name))
        if shrink == 1:
            assert (label > 0).sum() == (SimpleITK.GetArrayFromImage(read(task, "labelsTr", name)) > 0).sum()
        if margin == 0 and shrink == 1:
            assert all((label > 0).any(tuple(set(range(3)) - {axis})).all() for axis in range(3))


def test_the_seed_chooses(task, tmp_path):
    chosen = []
    for number, seed in enumerate([*range(8), 0]):
        (tmp_path / str(number)).mkdir()
        output = make_subset(task, tmp_path / str(number) / "Task01_X", Subset(2, seed), progress=False)
        chosen.append(tuple(names(output)))
    assert len(set(chosen)) > 2
    assert chosen[0] == chosen[-1]


def test_a_fourth_axis_of_channels_stays_whole(tmp_path):
    source = tmp_path / "Task05_Two"
    for part in ("imagesTr", "labelsTr"):
        (source / part).mkdir(parents=True)
    label = volume((8, 12, 14), 0, (1.0, 1.0, 2.0), True)
    channels = [volume((8, 12, 14), seed, (1.0, 1.0, 2.0), False) for seed in (1, 2)]
    SimpleITK.WriteImage(SimpleITK.JoinSeries(channels), str(source / "imagesTr" / "a.nii.gz"))
    SimpleITK.WriteImage(label, str(source / "labelsTr" / "a.nii.gz"))
    entry = {"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}
    (source / "dataset.json").write_text(json.dumps({"training": [entry]}))
    output = make_subset(source, tmp_path / "Task06_Less", Subset(1, 0, 1, 2), progress=False)
    image, kept = read(output, "imagesTr", "a"), read(output, "labelsTr", "a")
    assert image.GetDimension() == 4
    assert image.GetSize()[3] == 2
    assert image.GetSize()[:3] == kept.GetSize()


def test_nnunet_can_plan_it(tmp_path):
    """The phantom is a task that nnU-Net's own commands take; so is a part of it."""
    phantom = make_phantom_task(tmp_path / "Task901_Phantom", 3, seed=0, progress=False)
    output = make_subset(phantom, tmp_path / "Task902_Part", Subset(2), progress=False)
    for name in names(output):
        for part in ("imagesTr", "labelsTr"):
            assert SimpleITK.Hash(read(output, part, name)) == SimpleITK.Hash(read(phantom, part, name))


# ---- bad input


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["subset", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def changed(task: Path, folder: Path, change: Any) -> Path:
    shutil.copytree(task, folder)
    change(folder)
    return folder


def test_what_cannot_be_is_said_and_nothing_is_left(task, tmp_path, capsys):
    out = tmp_path / "Task01_X"
    assert "no dataset.json" in refused(capsys, tmp_path, "-o", out)
    assert "has 5 cases" in refused(capsys, task, "-o", out, "--cases", 6)
    assert "must be named like a task" in refused(capsys, task, "-o", tmp_path / "tiny", "--cases", 1)
    assert "--crop" in refused(capsys, task, "-o", out, "--crop", -1)
    broken = {
        "has no label": lambda f: (f / "labelsTr" / "case_0.nii.gz").unlink(),
        "cannot be read": lambda f: [p.write_bytes(b"x") for p in (f / "imagesTr").iterdir()],
        "differ in size": lambda f: [
            (f / "labelsTr" / f"case_{i}.nii.gz").write_bytes((task / "labelsTr" / f"case_{4 - i}.nii.gz").read_bytes())
            for i in range(5)
        ],
        "no valid JSON": lambda f: (f / "dataset.json").write_text("{"),
        "lists no training cases": lambda f: (f / "dataset.json").write_text("[]"),
        "names no scan": lambda f: (f / "dataset.json").write_text('{"training": ["case_0"]}'),
    }
    for number, (named, change) in enumerate(broken.items()):
        assert named in refused(capsys, changed(task, tmp_path / f"b{number}", change), "-o", out, "--cases", 4)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
    out.mkdir()
    assert "exists already" in refused(capsys, task, "-o", out, "--cases", 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a limit on the size of files")
def test_a_file_that_cannot_be_written_whole_is_named_and_nothing_is_left(task, tmp_path):
    """The system itself refuses to make a file longer, as a full disk would; SimpleITK alone says nothing."""
    limit = min(file.stat().st_size for file in (task / "imagesTr").iterdir()) // 2
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from nnunet_ima.evaluation.command_line import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "subset", str(task), "-o", str(tmp_path / "Task01_X"), "--cases", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    *_, sentence = done.stderr.splitlines()
    assert sentence.rpartition("\r")[2].startswith("nnunet_ima: ")
    assert "could not be written whole" in sentence
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_path_with_spaces_and_umlauts(task, tmp_path, capsys):
    source = tmp_path / "Über alle Maßen" / "Task77_Quelle"
    shutil.copytree(task, source)
    output = tmp_path / "kleine Menge" / "Task01_Größe"
    assert main(["subset", str(source), "-o", str(output), "--cases", "2", "--crop", "1"]) == 0
    assert f"Written to {output}" in capsys.readouterr().out
    assert len(names(output)) == 2
    assert all(SimpleITK.GetArrayFromImage(read(output, "labelsTr", name)).any() for name in names(output))


def test_a_case_without_foreground_cannot_be_cropped(task, tmp_path, capsys):
    def empty(folder: Path) -> None:
        for file in (folder / "labelsTr").iterdir():
            label = SimpleITK.ReadImage(str(file))
            SimpleITK.WriteImage(label * 0, str(file))

    source = changed(task, tmp_path / "empty", empty)
    assert "no foreground" in refused(capsys, source, "-o", tmp_path / "Task01_X", "--crop", 2, "--cases", 2)
    assert not (tmp_path / "Task01_X").exists()
