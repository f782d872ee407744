"""A small nnU-Net project for tests: a phantom dataset that went through nnU-Net's own commands, and tiny networks."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_ima.evaluation.decathlon import stage_task, task_number
from nnunet_ima.evaluation.environment import trainers_folder
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD

FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
PLANS = "nnUNetPlansTiny"
CASES = 8

# Short enough for a test; long enough for a margin to move and for two values in each log.
SETTINGS: dict[str, Any] = {
    "num_epochs": 2,
    "num_iterations_per_epoch": 2,
    "num_val_iterations_per_epoch": 1,
    "steps": 3,
    "bisections": 2,
    "epsilon": 6.0,
    "delta_epsilon": 1.0,
    # A network that learnt for seconds is seldom above the paper's 0.6.
    "dice_threshold": 0.02,
    "save_every": 1,
}


@dataclass(frozen=True)
class Project:
    """nnU-Net's three folders with one dataset.

    Attributes:
        root: holds the folders.
        dataset: its name, such as ``Dataset901_Phantom``.
        plans_name: of the plans that trainings use.
    """

    root: Path
    dataset: str
    plans_name: str = PLANS

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset

    @property
    def results(self) -> Path:
        return self.root / "nnUNet_results" / self.dataset

    @property
    def number(self) -> str:
        return str(int(self.dataset[7:10]))

    def environment(self) -> dict[str, str]:
        return {name: str(self.root / name) for name in FOLDERS}

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """nnU-Net in this process works on the project, augmenting without worker processes."""
        with pytest.MonkeyPatch.context() as environment:
            # With 0 workers nnU-Net's planner would fail; but it has run.
            for name, value in {**self.environment(), "nnUNet_n_proc_DA": "0", "nnUNet_compile": "0"}.items():
                environment.setenv(name, value)
            yield

    def plans(self, name: str | None = None) -> dict[str, Any]:
        return read(self.preprocessed / f"{name or self.plans_name}.json")

    def model(self, trainer: str, configuration: str) -> Path:
        return self.results / f"{trainer}__{self.plans_name}__{configuration}"

    def names(self) -> list[str]:
        """All cases."""
        return sorted(file.stem for file in (self.preprocessed / "nnUNetPlans_2d").glob("*.pkl"))

    def command(
        self, *arguments: str, check: bool = True, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of this installation on the project, with one worker of each kind."""
        done = subprocess.run(
            [program(arguments[0]), *arguments[1:]],
            env={**command_environment(self), **(environment or {})},
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done


def read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8")))


def write(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def program(name: str) -> str:
    """The command that belongs to this Python."""
    return str(Path(sys.executable).with_name(name))


def command_environment(project: Project) -> dict[str, str]:
    return {
        **os.environ,
        **project.environment(),
        "nnUNet_extTrainer": str(trainers_folder()),
        "nnUNet_n_proc_DA": "1",  # nnU-Net's planner fails with 0
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "0",
        "OMP_NUM_THREADS": "1",
    }


def easy_task(folder: Path) -> Path:
    """The phantom with its two parts painted over brightly, which a tiny network learns within seconds."""
    make_phantom_task(folder, CASES, seed=0, progress=False)
    for file in sorted((folder / "imagesTr").glob("*.nii.gz")):
        scan, labels = (SimpleITK.ReadImage(str(folder / kind / file.name)) for kind in ("imagesTr", "labelsTr"))
        image, parts = (SimpleITK.GetArrayFromImage(volume) for volume in (scan, labels))
        painted = image + image.std() * np.array([0, -2.0, 2.5])[parts]
        easy = SimpleITK.GetImageFromArray(painted.clip(0, np.iinfo(image.dtype).max).astype(image.dtype))
        easy.CopyInformation(scan)
        SimpleITK.WriteImage(easy, str(file))
    return folder


def make_project(root: Path, task: Path) -> Project:
    """Convert, plan and preprocess a Decathlon task with nnU-Net's commands, and add the tiny configurations."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    view = stage_task(task, root / "staged")
    number = task_number(view)
    project = Project(root, f"Dataset{number:03d}_{view.name.partition('_')[2]}")
    project.command("nnUNetv2_convert_MSD_dataset", "-i", str(view), "-np", "1")
    project.command("nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", "2d", "3d_fullres", "-np", "1")
    write_tiny_plans(project)
    return project


def write_tiny_plans(project: Project, patch_2d: Sequence[int] | None = None, patch_3d: Sequence[int] = (24, 32, 32)):
    """A plans file of its own with ``2d_tiny`` and ``3d_tiny``, which inherit nnU-Net's configurations."""
    plans = project.plans("nnUNetPlans")
    plans["plans_name"] = PLANS
    planned = plans["configurations"]
    plans["configurations"]["2d_tiny"] = tiny(planned["2d"], "2d", [8, 16, 32], 8, patch_2d)
    plans["configurations"]["3d_tiny"] = tiny(planned["3d_fullres"], "3d_fullres", [4, 8, 16], 2, patch_3d)
    write(project.preprocessed / f"{PLANS}.json", plans)


def tiny(
    planned: Mapping[str, Any], parent: str, features: list[int], batch_size: int, patch: Sequence[int] | None
) -> dict[str, Any]:
    """A configuration with as many stages as ``features``, each but the first halving every axis."""
    architecture = copy.deepcopy(planned["architecture"])
    arguments, stages = architecture["arch_kwargs"], len(features)
    axes = len(planned["patch_size"])
    arguments["n_stages"], arguments["features_per_stage"] = stages, features
    arguments["strides"] = [[1] * axes, *[[2] * axes] * (stages - 1)]
    arguments["kernel_sizes"] = [[3] * axes] * stages
    arguments["n_conv_per_stage"] = [1] * stages
    arguments["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    return {
        "inherits_from": parent,
        "batch_size": batch_size,
        "patch_size": list(patch or planned["patch_size"]),
        "architecture": architecture,
        "nnunet_ima": dict(SETTINGS),
    }


def make_trainer(
    project: Project,
    trainer_class: type[nnUNetTrainer],
    configuration: str = "2d_tiny",
    fold: int | str = 0,
    resume: bool = False,
    device: str = "cpu",
    **settings: Any,
) -> nnUNetTrainer:
    """A trainer as nnUNetv2_train makes it; ``settings`` go on top of those of the configuration."""
    plans = project.plans()
    plans["configurations"][configuration]["nnunet_ima"].update(settings)
    plans["continue_training"] = resume
    dataset_json = read(project.preprocessed / "dataset.json")
    with quiet():
        return trainer_class(plans, configuration, fold, dataset_json, torch.device(device))


def train_std(project: Project, configuration: str, iterations: int, learning_rate: float) -> Path:
    """A short training with nnUNetTrainerSTD that finds the structure; returns its model folder."""
    length = {"num_epochs": 1, "num_iterations_per_epoch": iterations, "initial_lr": learning_rate}
    with quiet(), project.in_force():
        trainer = make_trainer(project, nnUNetTrainerSTD, configuration, **length)
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 (nnU-Net's loaders draw from it)
        trainer.run_training()
    return project.model("nnUNetTrainerSTD", configuration)


def save_stock(project: Project, configuration: str, weights: Path) -> Path:
    """Let stock nnUNetTrainer write the weights of a checkpoint as its own; returns its model folder."""
    with quiet(), project.in_force():
        trainer = make_trainer(project, nnUNetTrainer, configuration)
        trainer.on_train_start()
        trainer.network.load_state_dict(weights_of(weights))
        trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    return project.model("nnUNetTrainer", configuration)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """nnU-Net prints its plans, its citation and every epoch."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def weights_of(checkpoint: Path) -> dict[str, Any]:
    return dict(torch.load(checkpoint, map_location="cpu", weights_only=False)["network_weights"])
