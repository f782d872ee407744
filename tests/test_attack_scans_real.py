"""Perturbed real scans as files: plain nnUNetv2_predict finds in them what ``nnunet_ima evaluate`` reports."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet_project import PLANS, Project, make_project, make_trainer, quiet, read, write, write_tiny_plans

from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD

pytestmark = pytest.mark.slow

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRAINER = "nnUNetTrainerSTD"
CASES = 8
EPOCHS = 8
ATTACK = "apgd:steps=3"


@dataclass(frozen=True)
class Scans:
    """A task of the Decathlon, and how a small network finds something in it within a minute or two."""

    folder: str
    task: str
    configuration: str
    patch: tuple[int, ...]
    iterations: int
    batch_size: int
    learning_rate: float
    level: str
    mirrored: tuple[int, ...] | None = None
    """Axes over which the network may be mirrored, if not those of its training."""
    least: float = 0.3


WAYS = {
    "hippocampus 3d": Scans("Task04_Hippocampus", "Task04_Hippocampus", "3d_tiny", (40, 56, 40), 250, 2, 0.3, "15"),
    "hippocampus 2d": Scans("Task04_Hippocampus", "Task04_Hippocampus", "2d_tiny", (56, 40), 800, 16, 0.2, "5"),
    "heart 2d": Scans("Task02_Heart_8cases", "Task02_Heart", "2d_tiny", (128, 128), 900, 8, 0.2, "10", least=0.2),
    # Networks as small as these find 0.35 (2D) and 0.30 (3D) of the left atrium, after three and five minutes.
    # Mirrored over one axis: over all three, eight times as many passes over eight million voxels would take half an
    # hour.
    "heart 3d": Scans(
        "Task02_Heart_8cases", "Task02_Heart", "3d_tiny", (32, 96, 96), 480, 2, 0.1, "30", (2,), least=0.2
    ),
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Scans:
    found = WAYS[request.param]
    if not (DATA / found.folder).is_dir():
        pytest.skip(f"the scans {found.folder} are not in ../shared/data")
    return found


@pytest.fixture(scope="module")
def trained(way: Scans, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, str]]:
    """A project with a trained network, and the name of the one case that it has not seen."""
    source, root = DATA / way.folder, tmp_path_factory.mktemp("scans")
    task = root / way.task
    for part in ("imagesTr", "labelsTr"):
        (task / part).mkdir(parents=True)
        for scan in sorted((source / part).glob("[!.]*.nii.gz"))[:CASES]:
            (task / part / scan.name).symlink_to(scan)
    write(task / "dataset.json", {**read(source / "dataset.json"), "numTraining": CASES})
    project = make_project(root, task)
    write_tiny_plans(project)
    plans = project.plans()
    plans["configurations"][way.configuration].update(patch_size=list(way.patch), batch_size=way.batch_size)
    write(project.preprocessed / f"{PLANS}.json", plans)
    *seen, unseen = project.names()
    write(project.preprocessed / "splits_final.json", [{"train": seen, "val": [unseen]}])
    # Several epochs: nnU-Net lowers the rate between them, and what is found no longer hangs on the last batches.
    length = {
        "num_epochs": EPOCHS,
        "num_iterations_per_epoch": way.iterations // EPOCHS,
        "initial_lr": way.learning_rate,
    }
    with project.in_force():
        with quiet():
            trainer = make_trainer(project, nnUNetTrainerSTD, way.configuration, **length)
            torch.manual_seed(0)
            np.random.seed(0)  # noqa: NPY002 (nnU-Net's loaders draw from it)
            trainer.run_training()
        checkpoint = project.model(TRAINER, way.configuration) / "fold_0" / "checkpoint_final.pth"
        if way.mirrored is not None:
            content = torch.load(checkpoint, weights_only=False)
            torch.save({**content, "inference_allowed_mirroring_axes": way.mirrored}, checkpoint)
        yield project, unseen


def test_plain_prediction_of_the_files_has_the_case_dice_of_the_report(way, trained, tmp_path):
    project, name = trained
    ask = ("-d", project.number, "-c", way.configuration, "-tr", TRAINER, "-p", PLANS, "-f", "0")
    run, attacked_scans = tmp_path / "run", tmp_path / "attacked"
    project.command("nnunet_ima", "evaluate", *ask, "-device", "cpu", "-o", str(run), "--levels", way.level,
                    "--attacks", ATTACK)  # fmt: skip
    project.command("nnunet_ima", "attack", *ask, "-device", "cpu", "-o", str(attacked_scans), "--level", way.level,
                    "--attack", ATTACK, "--cases", name)  # fmt: skip
    predicted = tmp_path / "predicted"
    project.command("nnUNetv2_predict", *ask, "-device", "cpu", "-i", str(attacked_scans / "images"), "-o",
                    str(predicted), "-npp", "1", "-nps", "1", "--disable_progress_bar")  # fmt: skip
    truth, folder = project.root / "nnUNet_raw" / project.dataset / "labelsTr", tmp_path / "truth"
    folder.mkdir()
    (folder / f"{name}.nii.gz").symlink_to(truth / f"{name}.nii.gz")
    project.command("nnUNetv2_evaluate_folder", str(folder), str(predicted), "-djfile", str(predicted / "dataset.json"),
                    "-pfile", str(predicted / "plans.json"), "-np", "1")  # fmt: skip
    plain = float(read(predicted / "summary.json")["foreground_mean"]["Dice"])

    with (run / "cases.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["attack"]: row for row in csv.DictReader(stream)}
    assert all(row["case"] == name for row in rows.values())
    clean, attacked = (
        float(np.mean([float(value) for key, value in rows[attack].items() if key.startswith("dice_")]))
        for attack in ("clean", ATTACK)
    )
    print(way.task, way.configuration, f"clean {clean:.4f}, attacked {attacked:.4f}, plain {plain:.4f}",
          read(attacked_scans / "attack.json")["cases"])  # fmt: skip
    # Otherwise the rest would state little.
    assert clean > way.least
    assert attacked < clean - 0.05
    assert plain == pytest.approx(attacked, abs=0.01)
    (case,) = read(attacked_scans / "attack.json")["cases"]
    assert case["dice_in_evaluation"] == pytest.approx(attacked, abs=1e-6)
    assert case["dice_after"] == pytest.approx(plain, abs=1e-3)
