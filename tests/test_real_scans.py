"""Heart and prostate MRI of the Medical Segmentation Decathlon, from scans to an evaluation, in 2D and 3D."""

from __future__ import annotations

from pathlib import Path

import pytest
from nnunet_project import PLANS, make_project, make_trainer, quiet, read, write, write_tiny_plans

from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
# Under the names of the paper's datasets, for which its values are used.
TASKS = {"Task02_Heart_8cases": "Task02_Heart", "Task05_ProstateT2_5cases": "Task05_Prostate"}
PAPER = {"Dataset002_Heart": 20.0, "Dataset005_Prostate": 40.0}
SHORT = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "steps": 2, "bisections": 1}


@pytest.fixture(scope="module", params=TASKS)
def scans(request, tmp_path_factory):
    source = DATA / request.param
    if not source.is_dir():
        pytest.skip(f"the scans {request.param} are not in ../shared/data")
    root = tmp_path_factory.mktemp(request.param)
    task = root / TASKS[request.param]
    task.mkdir()
    for part in ("imagesTr", "labelsTr", "dataset.json"):
        (task / part).symlink_to(source / part)
    project = make_project(root, task)
    write_tiny_plans(project, patch_3d=(16, 64, 64))
    plans = project.plans()
    for name, batch_size in (("2d_tiny", 4), ("3d_tiny", 2)):
        # The paper's values or those of self-configuration, but for the length.
        plans["configurations"][name].update(nnunet_ima={**SHORT, "dice_threshold": 0.0}, batch_size=batch_size)
    write(project.preprocessed / f"{PLANS}.json", plans)
    return project


@pytest.mark.parametrize("configuration", ["2d_tiny", "3d_tiny"])
def test_real_scans_from_training_to_evaluation(scans, configuration, tmp_path):
    # In this process: nnUNetv2_train would go on to predict whole volumes, patch by patch.
    with scans.in_force(), quiet():
        make_trainer(scans, nnUNetTrainerIMA, configuration).run_training()
    folder = scans.model("nnUNetTrainerIMA", configuration) / "fold_0"
    settings = read(folder / "nnunet_ima_settings.json")
    # The paper's values are for slices.
    assert settings["origins"]["epsilon"] == ("paper" if configuration == "2d_tiny" else "self-configured")
    assert (settings["settings"]["epsilon"] == PAPER[scans.dataset]) == (configuration == "2d_tiny")
    scans.command(
        "nnunet_ima", "evaluate", "-d", scans.number, "-c", configuration, "-tr", "nnUNetTrainerIMA", "-p", PLANS,
        "-device", "cpu", "-o", str(tmp_path), "--max-samples", "2", "--levels", "5", "--attacks", "apgd:steps=2",
    )  # fmt: skip
    summary = read(tmp_path / "summary.json")
    assert summary["clean"]["n_samples"] == 2
    assert summary["results"][0]["adi"] <= summary["clean"]["adi"]
    assert summary["model"]["dataset"] == scans.dataset
