"""Killed at twenty random moments: what a training goes on with is always that of its last checkpoint, whole."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_project import Project, make_trainer, quiet

from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE

pytestmark = pytest.mark.slow

KILLS = 20
NAMES = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")


def resumed(project: Project, kind: type, start: str) -> Any:
    """As nnUNetv2_train, with --c if there is a checkpoint."""
    folder = Path(os.environ["nnUNet_results"]) / project.dataset
    there = [file for name in NAMES for file in folder.glob(f"{kind.__name__}__*/fold_0/{name}")]
    trainer = make_trainer(
        project, kind, resume=bool(there), num_epochs=10_000, num_iterations_per_epoch=2, save_every=1, snapshots=500,
        epsilon=9.0, delta_epsilon=0.5, te_start=0.0, start_from=start, robust_every=3, robust_patches=2,
    )  # fmt: skip
    if there:
        trainer.load_checkpoint(str(there[0]))
    return trainer


def train(project: Project, kind: type, start: str) -> None:
    torch.set_num_threads(1)
    with quiet():
        resumed(project, kind, start).run_training()


@pytest.mark.parametrize("kind", [nnUNetTrainerIMA, nnUNetTrainerTE])
def test_after_each_kill_the_state_is_that_of_the_last_checkpoint(project, results, stock_2d, kind):
    start = str(stock_2d / "fold_0" / "checkpoint_final.pth")
    moments = random.Random(0)
    epochs, found_half_written = [0], 0
    for _ in range(KILLS):
        # A copy of this process: it has nnU-Net in memory already.
        child = multiprocessing.get_context("fork").Process(target=train, args=(project, kind, start))
        child.start()
        time.sleep(moments.uniform(0.5, 6.0))
        assert child.is_alive(), "the training ended by itself"
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        folders = list(results.glob(f"*/{kind.__name__}__*/fold_0"))
        if not folders or not any((folders[0] / name).exists() for name in NAMES):
            continue
        (folder,) = folders
        found_half_written += len(list(folder.glob(".*.tmp")))
        trainer = resumed(project, kind, start)
        with quiet():
            trainer.on_train_start()
        newest = next(folder / name for name in NAMES if (folder / name).exists())
        saved = torch.load(newest, weights_only=False)
        assert trainer.current_epoch == saved["current_epoch"]
        assert same(trainer.method_state(), saved["init_args"][KEY]["state"])
        assert all(torch.equal(v, saved["network_weights"][k]) for k, v in trainer.network.state_dict().items())
        # Whatever lies there can be read; nothing of a lost future is left.
        for file in folder.glob("*.pth"):
            torch.load(file, weights_only=False)
        assert list(folder.glob(".*.tmp")) == []
        if kind is nnUNetTrainerIMA:
            names = {f"snapshot_epoch_{epoch:04d}.pth" for epoch, _ in trainer.snapshots}
            assert {file.name for file in folder.glob("snapshot*")} == names
        assert trainer.current_epoch >= epochs[-1]
        epochs.append(trainer.current_epoch)
    assert epochs[-1] > 10
    assert len(set(epochs)) > KILLS / 2


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(value, right[key]) for key, value in left.items())
    return bool(left == right)
