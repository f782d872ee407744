"""What all tests share: modest, repeatable property tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from nnunet_project import Project

    from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

settings.register_profile(
    "nnunet_ima", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nnunet_ima")

# Tiny networks gain nothing from a second thread, and wait for it on a busy machine.
torch.set_num_threads(1)

# nnU-Net reads it when it is imported; each worker it spawns imports torch, which takes seconds.
os.environ["nnUNet_def_n_proc"] = "1"


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """``nnunet_ima evaluate`` takes all cores, as a user wants; the next test should not."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A phantom dataset, converted, planned and preprocessed; nnU-Net's folders are set for the session."""
    from nnunet_project import easy_task, make_project

    root = tmp_path_factory.mktemp("project")
    made = make_project(root, easy_task(root / "Task901_Phantom"))
    with made.in_force():
        yield made


@pytest.fixture(scope="session")
def std_2d(project: Project) -> Path:
    """Model folder of a 2D network that found the structure, trained by nnUNetTrainerSTD."""
    from nnunet_project import train_std

    return train_std(project, "2d_tiny", iterations=120, learning_rate=0.2)


@pytest.fixture(scope="session")
def std_3d(project: Project) -> Path:
    """The same in 3D."""
    from nnunet_project import train_std

    return train_std(project, "3d_tiny", iterations=60, learning_rate=0.3)


@pytest.fixture(scope="session")
def ima_2d(project: Project, std_2d: Path) -> nnUNetTrainerIMA:
    """A finished 2D training with nnUNetTrainerIMA, from the weights of ``std_2d``."""
    return _train_ima(project, "2d_tiny", std_2d)


@pytest.fixture(scope="session")
def ima_3d(project: Project, std_3d: Path) -> nnUNetTrainerIMA:
    """The same in 3D."""
    return _train_ima(project, "3d_tiny", std_3d)


@pytest.fixture(scope="session")
def stock_2d(project: Project, std_2d: Path) -> Path:
    """Model folder that stock nnUNetTrainer wrote, with the weights of ``std_2d``."""
    from nnunet_project import save_stock

    return save_stock(project, "2d_tiny", std_2d / "fold_0" / "checkpoint_final.pth")


def _train_ima(project: Project, configuration: str, start: Path) -> nnUNetTrainerIMA:
    from nnunet_project import make_trainer, quiet, weights_of

    from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

    with quiet(), project.in_force():
        trainer = make_trainer(project, nnUNetTrainerIMA, configuration)
        trainer.initialize()
        trainer.network.load_state_dict(weights_of(start / "fold_0" / "checkpoint_final.pth"))
        trainer.run_training()
    return trainer


@pytest.fixture
def results(project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A results folder of its own."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setenv("nnUNet_results", str(folder))
    return folder


@pytest.fixture(params=["2d_tiny", "3d_tiny"])
def configuration(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def start(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Weights of a network that found the structure, of the test's configuration; 2D if it has none."""
    from nnunet_project import weights_of

    has_configuration = "configuration" in request.fixturenames
    dimension = request.getfixturevalue("configuration")[:2] if has_configuration else "2d"
    return weights_of(request.getfixturevalue(f"std_{dimension}") / "fold_0" / "checkpoint_final.pth")


@pytest.fixture
def nnunet_finds_our_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``export nnUNet_extTrainer="$(nnunet_ima trainers)"`` does."""
    from nnunet_ima.evaluation.environment import trainers_folder

    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, without a window."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()
