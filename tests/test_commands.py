"""The real commands, each in a process of its own, as a user types them."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_project import PLANS, Project, command_environment, program, read, write

pytestmark = pytest.mark.slow

DEVICE = ("-device", "cpu")
ATTACK = ("--levels", "5", "--attacks", "apgd:steps=2", *DEVICE)


def train(project: Project, configuration: str, fold: str, *options: str, **how: Any) -> subprocess.CompletedProcess:
    trainer = () if "-tr" in options else ("-tr", "nnUNetTrainerIMA")
    command = ("nnUNetv2_train", project.number, configuration, fold, *trainer, "-p", PLANS, *DEVICE, *options)
    return project.command(*command, **how)


def in_plans(project: Project, configuration: str, name: str, **settings: Any) -> str:
    """One more configuration in the plans file: ``configuration`` with other settings."""
    plans = project.plans()
    entry = plans["configurations"][configuration]
    plans["configurations"][name] = {**entry, "nnunet_ima": {**entry["nnunet_ima"], **settings}}
    write(project.preprocessed / f"{PLANS}.json", plans)
    return name


@pytest.fixture(scope="module")
def trained_2d(project: Project) -> Path:
    """Fold 1 trained with the command, with the probabilities of its validation cases."""
    train(project, "2d_tiny", "1", "--npz")
    return project.model("nnUNetTrainerIMA", "2d_tiny") / "fold_1"


@pytest.fixture(scope="module")
def trained_3d(project: Project) -> Path:
    """The same in 3D."""
    train(project, "3d_tiny", "1", "--npz")
    return project.model("nnUNetTrainerIMA", "3d_tiny") / "fold_1"


@pytest.fixture(params=["2d_tiny", "3d_tiny"])
def trained(request) -> tuple[str, Path]:
    return request.param, request.getfixturevalue("trained_" + request.param[:2])


def test_training_validates_and_exports_probabilities(trained, project):
    _, folder = trained
    names = read_splits(project)[1]["val"]
    written = contents(folder)
    assert {"checkpoint_final.pth", "progress.png", "margins.png", "nnunet_ima_settings.json"} <= written
    assert "checkpoint_latest.pth" not in written
    for name in names:
        assert {f"{name}.nii.gz", f"{name}.npz", f"{name}.pkl"} <= contents(folder / "validation")
        with np.load(folder / "validation" / f"{name}.npz") as probabilities:
            assert np.isfinite(probabilities["probabilities"]).all()
    scored = {Path(case["prediction_file"]).name for case in metrics(folder)["metric_per_case"]}
    assert scored == {f"{name}.nii.gz" for name in names}


def contents(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def read_splits(project: Project) -> list[dict[str, list[str]]]:
    return list(json.loads((project.preprocessed / "splits_final.json").read_text(encoding="utf-8")))


def metrics(folder: Path) -> dict[str, Any]:
    return read(folder / "validation" / "summary.json")


def test_evaluate_as_a_command_scores_clean_cases_as_nnunets_validation_did(trained, project, tmp_path):
    configuration, folder = trained
    done = project.command(
        "nnunet_ima", "evaluate", "-d", project.number, "-c", configuration, "-f", "1", "-tr", "nnUNetTrainerIMA",
        "-p", PLANS, *ATTACK, "-o", str(tmp_path),
    )  # fmt: skip
    assert f"Written to {tmp_path}" in done.stdout
    assert "Traceback" not in done.stderr
    with (tmp_path / "cases.csv").open(encoding="utf-8", newline="") as stream:
        ours = {row["case"]: row for row in csv.DictReader(stream) if row["attack"] == "clean"}
    nnunets = metrics(folder)["metric_per_case"]
    assert len(nnunets) == len(ours) > 0
    for case in nnunets:
        name = Path(case["prediction_file"]).name.removesuffix(".nii.gz")
        for label in ("1", "2"):
            expected, found = case["metrics"][label]["Dice"], ours[name][f"dice_{label}"]
            assert float(found or "nan") == pytest.approx(expected, abs=1e-6, nan_ok=True)
    assert read(tmp_path / "summary.json")["clean"]["case_dice"] == pytest.approx(
        metrics(folder)["foreground_mean"]["Dice"], abs=1e-6
    )


def test_val_and_val_best_validate_again(trained_2d, project):
    before = metrics(trained_2d)["foreground_mean"]["Dice"]
    for options in (["--val", "--val_best"], ["--val"]):
        (trained_2d / "validation" / "summary.json").unlink()
        train(project, "2d_tiny", "1", *options)
        assert (trained_2d / "validation" / "summary.json").is_file()
    assert metrics(trained_2d)["foreground_mean"]["Dice"] == pytest.approx(before, abs=1e-6)


def test_predict_runs_the_model(trained_3d, project, tmp_path):
    source = project.root / "nnUNet_raw" / project.dataset / "imagesTr"
    (tmp_path / "in").mkdir()
    scan = sorted(source.iterdir())[0]
    (tmp_path / "in" / scan.name).write_bytes(scan.read_bytes())
    project.command(
        "nnUNetv2_predict", "-i", str(tmp_path / "in"), "-o", str(tmp_path / "out"), "-d", project.number,
        "-c", "3d_tiny", "-f", "1", "-tr", "nnUNetTrainerIMA", "-p", PLANS, "-npp", "1", "-nps", "1", *DEVICE,
    )  # fmt: skip
    assert (tmp_path / "out" / scan.name.replace("_0000", "")).is_file()


def test_fold_all_from_the_weights_of_a_stock_model(project, stock_2d):
    checkpoint = stock_2d / "fold_0" / "checkpoint_final.pth"
    done = train(project, "2d_tiny", "all", "-pretrained_weights", str(checkpoint))
    # nnU-Net takes all weights but those of the segmentation layers, which start at random.
    assert "Loading pretrained weights" in done.stdout
    folder = project.model("nnUNetTrainerIMA", "2d_tiny") / "fold_all"
    assert len(metrics(folder)["metric_per_case"]) == len(project.names())


def test_continuing_from_a_stock_checkpoint_is_refused(project, stock_2d):
    configuration = in_plans(project, "2d_tiny", "2d_refused")
    folder = project.model("nnUNetTrainerIMA", configuration) / "fold_0"
    folder.mkdir(parents=True)
    (folder / "checkpoint_latest.pth").write_bytes((stock_2d / "fold_0" / "checkpoint_final.pth").read_bytes())
    done = train(project, configuration, "0", "--c", check=False)
    assert done.returncode != 0
    assert "-pretrained_weights" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_a_bad_setting_ends_the_training_with_one_sentence(project):
    configuration = in_plans(project, "2d_tiny", "2d_bad", epsilon=-1)
    done = train(project, configuration, "0", check=False)
    assert done.returncode != 0
    assert "epsilon" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not project.model("nnUNetTrainerIMA", configuration).exists()


def test_a_killed_training_continues_with_the_margins_of_its_checkpoint(project, std_2d):
    configuration = in_plans(project, "2d_tiny", "2d_killed", num_epochs=4, num_iterations_per_epoch=3)
    folder = project.model("nnUNetTrainerIMA", configuration) / "fold_0"
    checkpoint = folder / "checkpoint_latest.pth"
    start = str(std_2d / "fold_0" / "checkpoint_final.pth")
    command = ["nnUNetv2_train", project.number, configuration, "0", "-tr", "nnUNetTrainerIMA", "-p", PLANS, *DEVICE]
    running = subprocess.Popen(
        [program(command[0]), *command[1:], "-pretrained_weights", start],
        env=command_environment(project), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(checkpoint.is_file, running)
    finally:
        os.killpg(running.pid, signal.SIGKILL)  # the workers too
        running.wait()
    assert not (folder / "checkpoint_final.pth").exists()
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    kept = saved["init_args"]["nnunet_ima"]["state"]["margins"]
    assert len(kept["cases"]) > 0
    done = train(project, configuration, "0", "--c")
    assert f"IMA continues with the margins of {len(kept['cases'])} samples." in done.stdout
    assert f"Epoch {saved['current_epoch']}" in done.stdout
    assert not re.search(r"Epoch 0\b", done.stdout)
    finished = torch.load(folder / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert {len(values) for values in finished["logging"].values()} == {4}
    after = finished["init_args"]["nnunet_ima"]["state"]
    assert len(after["histograms"]) == 4
    visits = visits_of(after["margins"])
    assert all(visits[sample] >= count for sample, count in visits_of(kept).items())
    assert [file.name for file in folder.iterdir() if file.name.endswith(".tmp")] == []


def visits_of(margins: dict[str, Any]) -> dict[tuple[str, int], int]:
    samples = zip(margins["cases"], margins["tiles"].tolist(), strict=True)
    return dict(zip(samples, margins["visits"].tolist(), strict=True))


def wait_for(happened: Any, running: subprocess.Popen, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert running.poll() is None, "the training ended early"
        assert time.monotonic() < until
        time.sleep(0.05)


def test_nnunet_ima_trainers_prints_the_folder_to_export(project):
    printed = project.command("nnunet_ima", "trainers").stdout.strip()
    assert (Path(printed) / "nnUNetTrainerIMA.py").is_file()
    assert len(printed.splitlines()) == 1


def test_the_command_line_ends_with_one_sentence_and_status_2(project, tmp_path):
    done = project.command("nnunet_ima", "evaluate", "-d", "77", "-c", "2d", *ATTACK, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "nnunet_ima: There is no dataset '77'; give its number or full name, as nnU-Net does.\n"
