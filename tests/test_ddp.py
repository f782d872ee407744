"""Two ranks, two gloo processes on the CPU: every rank and the checkpoint hold the same state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import two_ranks
from nnunet_project import quiet
from test_trainers import foreground_batch, started
from torch import multiprocessing

from nnunet_ima.errors import UserError
from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

METHODS = (nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES)
SETTINGS = {"te_start": 0.0, "te_end": 0.0}


@pytest.fixture(scope="module")
def ranks(project, std_2d, tmp_path_factory) -> Path:
    """A folder with what both ranks held after an epoch of two steps, each method in turn.

    In the second step the second rank draws nothing but background, so that IMA has nothing to perturb there.
    """
    folder = tmp_path_factory.mktemp("ranks")
    with project.in_force(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_results", str(folder / "loader"))
        loader = started(project, nnUNetTrainerTE, "2d_tiny")
        for rank in range(2):
            batches = [foreground_batch(loader) for _ in range(2)]
            if rank == 1:
                for target in batches[1]["target"]:
                    target.zero_()
            torch.save(batches, folder / f"batches_{rank}.pt")
    weights = str(std_2d / "fold_0" / "checkpoint_final.pth")
    jobs = [(kind.__name__, weights, SETTINGS) for kind in METHODS]
    multiprocessing.spawn(two_ranks.work, (str(folder), project, jobs), nprocs=2)
    return folder


def held(folder: Path, kind: type, rank: int) -> dict[str, Any]:
    return dict(torch.load(folder / f"{kind.__name__}_{rank}.pt", weights_only=False))


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    return bool(left == right)


@pytest.mark.parametrize("kind", METHODS)
def test_both_ranks_and_the_checkpoint_hold_the_same(ranks, kind):
    first, second = (held(ranks, kind, rank) for rank in range(2))
    assert equal(first["weights"], second["weights"])
    assert equal(first["state"], second["state"])
    for name, value in first["log"].items():
        if "timestamp" not in name:
            assert value == second["log"][name], name
    saved = torch.load(ranks / f"{kind.__name__}_checkpoint_0.pth", weights_only=False)
    assert equal(saved["init_args"][KEY]["state"], first["state"])
    # Only the first rank writes.
    assert not (ranks / f"{kind.__name__}_checkpoint_1.pth").exists()


@pytest.mark.parametrize("kind", METHODS)
def test_the_ranks_learned_from_both_batches(ranks, kind, project, std_2d):
    before = torch.load(std_2d / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert not equal(held(ranks, kind, 0)["weights"], before)


def test_the_visits_of_both_ranks_are_added_up(ranks, project, std_2d, results):
    """A single process visits what each rank visited."""
    weights = torch.load(std_2d / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    visited: dict[Any, int] = {}
    for rank in range(2):
        with project.in_force(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_results", str(results))
            trainer = started(project, nnUNetTrainerIMA, "2d_tiny", copy.deepcopy(weights), **SETTINGS)
        for batch in torch.load(ranks / f"batches_{rank}.pt", weights_only=False):
            trainer.generator.manual_seed(7)
            with quiet():
                trainer.train_step(batch)
        for sample, count in zip(trainer.margins._visits, trainer.margins.all_visits().tolist(), strict=True):
            visited[sample] = visited.get(sample, 0) + count
    margins = held(ranks, nnUNetTrainerIMA, 0)["state"]["margins"]
    found = dict(
        zip(zip(margins["cases"], margins["tiles"].tolist(), strict=True), margins["visits"].tolist(), strict=True)
    )
    assert found == visited
    assert margins["margins"].max() > 1.0


def test_te_has_averages_of_the_cases_of_both_ranks(ranks):
    averages = held(ranks, nnUNetTrainerTE, 0)["state"]["averages"]
    drawn = set()
    for rank in range(2):
        for batch in torch.load(ranks / f"batches_{rank}.pt", weights_only=False):
            drawn |= {str(case) for case in batch["keys"]}
    assert set(averages) == drawn


def test_passes_and_samples_of_both_ranks_are_counted(ranks):
    log = held(ranks, nnUNetTrainerSAT, 0)["log"]
    assert log["passes_per_sample"] == 4  # three of PGD, one of the training


@pytest.mark.parametrize(
    ("error", "own", "named"),
    [
        (
            UserError("The output is NaN; train longer."),
            "SystemExit: The output is NaN",
            "UserError: The output is NaN",
        ),
        (torch.OutOfMemoryError("no memory"), "OutOfMemoryError: no memory", "OutOfMemoryError: no memory"),
    ],
)
def test_where_one_rank_cannot_measure_both_end(project, tmp_path, error, own, named):
    """And the second says what the first said, instead of waiting for it forever."""
    multiprocessing.spawn(two_ranks.measure, (str(tmp_path), project, error), nprocs=2)
    assert (tmp_path / "ended_1").read_text().startswith(own)
    other = (tmp_path / "ended_0").read_text()
    assert other.startswith("SystemExit: Rank 1 failed")
    assert named in other
