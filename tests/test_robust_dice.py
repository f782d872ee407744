"""The robust Dice in training, the checkpoint it chooses, and IMA's snapshots."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_project import make_trainer, quiet, weights_of
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_trainers import started

from nnunet_ima import training_log
from nnunet_ima.attacks.pgd import PGD
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.metrics import tvdi
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.fixed_patches import fixed_patches
from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD


@pytest.mark.parametrize(("seconds", "pictures"), [(1.0, 2), (59.0, 3), (61.0, 4)])
def test_pictures_are_drawn_once_a_minute_and_after_the_last_epoch(project, results, monkeypatch, seconds, pictures):
    """They take seconds; an epoch of the paper's trainings takes seconds on a GPU."""
    now, drawn = [1000.0], {"progress": [], "margins": []}
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", num_epochs=4, robust_every=0)
    epoch = lambda *_: trainer.current_epoch  # noqa: E731 (asked anew at each call)
    monkeypatch.setattr(training_log.AdversarialLogger, "_draw", lambda *_: drawn["progress"].append(epoch()))
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerIMA.draw_margins", lambda *_: drawn["margins"].append(1))
    trainer.disable_checkpointing = True
    for number in range(4):
        with quiet():
            for key in ("epoch_start_timestamps", "train_losses", "val_losses", "ema_fg_dice"):
                trainer.logger.log(key, 0.5, number)
            trainer.logger.log("dice_per_class_or_region", [0.5, 0.5], number)
            trainer.histograms.append([1, 0])
            trainer.on_epoch_end()
        now[0] += seconds
    assert drawn["progress"][0] == 0
    assert drawn["progress"][-1] == 3
    assert len(drawn["progress"]) == len(drawn["margins"]) == pictures


def loader_of(trainer: Any) -> Any:
    return trainer.dataloader_val.data_loader


def test_the_patches_are_the_same_whatever_was_drawn_before(project, results, configuration):
    found = []
    for draws in (0, 3):
        trainer = started(project, nnUNetTrainerSAT, configuration)
        for _ in range(draws):
            next(trainer.dataloader_val)
        found.append(fixed_patches(loader_of(trainer), 5))
    (images, targets, _), (again, targets_again, _) = found
    assert torch.equal(images, again)
    for one, other in zip(targets, targets_again, strict=True):
        assert torch.equal(one, other)
    assert len(images) == 5
    other_seed, *_ = fixed_patches(loader_of(trainer), 5, seed=1)
    assert not torch.equal(images, other_seed)


def test_each_patch_is_a_place_of_a_validation_case_and_holds_foreground(project, results, configuration):
    trainer = started(project, nnUNetTrainerSAT, configuration)
    images, targets, _ = fixed_patches(loader_of(trainer), 4)
    size = tuple(trainer.configuration_manager.patch_size)
    assert images.shape == (4, 1, *size)
    assert targets[0].shape == (4, 1, *size)
    assert (targets[0] > 0).flatten(1).any(1).all()
    cases = [loader_of(trainer)._data.load_case(case) for case in loader_of(trainer).indices]
    for image, target in zip(images, targets[0], strict=True):
        assert any(shows(np.asarray(data[0]), np.asarray(seg[0]), image[0], target[0]) for data, seg, _, _ in cases)


def shows(data: np.ndarray, segmentation: np.ndarray, image: torch.Tensor, target: torch.Tensor) -> bool:
    """Brute force: the part of a patch that is no padding, looked for everywhere in a case."""
    if image.ndim == 2:
        image, target = image[None], target[None]
    centre = [size // 2 for size in image.shape]
    values = np.argwhere(data == float(image[tuple(centre)]))
    for place in values:
        low = [int(p) - c for p, c in zip(place, centre, strict=True)]
        inside = [slice(max(-lo, 0), min(n - lo, s)) for lo, n, s in zip(low, data.shape, image.shape, strict=True)]
        there = tuple(slice(lo + i.start, lo + i.stop) for lo, i in zip(low, inside, strict=True))
        if np.array_equal(data[there], image[tuple(inside)].numpy()):
            return np.array_equal(np.maximum(segmentation[there], 0), target[tuple(inside)].numpy())
    return False


def test_there_may_be_fewer_patches_than_asked_for(project, results):
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny")
    images, *_ = fixed_patches(loader_of(trainer), 10_000)
    slices = 0
    for case in loader_of(trainer).indices:
        slices += int((np.asarray(loader_of(trainer)._data.load_case(case)[1][0]) > 0).any((1, 2)).sum())
    assert len(images) == slices


def test_the_robust_dice_is_the_pooled_dice_after_pgd(project, results, configuration, start):
    trainer = started(project, nnUNetTrainerSAT, configuration, start, robust_epsilon=3.0, robust_patches=5)
    found = trainer._robust_dice(trainer.network)
    images, targets, _ = fixed_patches(loader_of(trainer), 5)
    threat = trainer.patch_threat(images, torch.full((5,), 3.0))
    perturbed = PGD(threat, trainer.criterion, steps=10, step_size=0.25)(trainer.network, images, targets[0]).images
    assert threat.contains(perturbed, images).all()
    trainer.network.eval()
    with torch.no_grad():
        predicted = trainer.network(perturbed)[0].argmax(1)
    counts = []
    for label in (1, 2):
        p, t = predicted == label, targets[0][:, 0] == label
        counts.append([int((p & t).sum()), int((p & ~t).sum()), int((~p & t).sum())])
    assert found == pytest.approx(tvdi(np.array(counts)[None]), abs=0.02)
    clean = trainer._robust_dice.__class__(
        images, targets[0], threat.with_epsilon(torch.zeros(5)), trainer.criterion, 2
    )  # fmt: skip
    assert found < clean(trainer.network) - 0.02


def test_it_is_logged_when_due_and_not_a_number_otherwise(project, results, start):
    trainer = make_trainer(project, nnUNetTrainerSAT, num_epochs=5, robust_every=2)
    with quiet():
        trainer.initialize()
        trainer.network.load_state_dict(start)
        trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging["robust_dice"]
    assert [math.isnan(value) for value in logged] == [True, False, True, False, False]  # and at the end
    assert (Path(trainer.output_folder) / "progress.png").is_file()


def test_the_best_checkpoint_has_the_highest_geometric_mean(project, results, start, monkeypatch):
    trainer = make_trainer(project, nnUNetTrainerSAT, num_epochs=4, robust_every=1)
    values = itertools.chain([0.2, 0.5, 0.4, 0.1])
    monkeypatch.setattr("nnunet_ima.robust_dice.RobustDice.__call__", lambda *_: next(values))
    log = trainer.logger.log

    def fixed_pseudo_dice(key: str, value: Any, step: int) -> None:
        log(key, 0.8 if key == "mean_fg_dice" else value, step)

    monkeypatch.setattr(trainer.logger, "log", fixed_pseudo_dice)
    with quiet():
        trainer.run_training()
    best = torch.load(Path(trainer.output_folder) / "checkpoint_best_robust.pth", weights_only=False)
    assert best["current_epoch"] == 2
    assert best["init_args"][KEY]["best_robust"] == pytest.approx(math.sqrt(0.8 * 0.5))
    assert trainer.best_robust == pytest.approx(math.sqrt(0.8 * 0.5))
    again = make_trainer(project, nnUNetTrainerSAT, resume=True, num_epochs=5, robust_every=1)
    with quiet():
        again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        again.on_train_start()
    assert again.best_robust == pytest.approx(math.sqrt(0.8 * 0.5))


def test_a_measurement_that_fails_is_logged_and_does_not_end_the_training(project, results, monkeypatch):
    def refuse(*_: object) -> float:
        raise UserError("the output is NaN.")

    monkeypatch.setattr("nnunet_ima.robust_dice.RobustDice.__call__", refuse)
    trainer = make_trainer(project, nnUNetTrainerSAT, num_epochs=1, robust_every=1)
    with quiet():
        trainer.run_training()
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text(encoding="utf-8")
    assert "No robust Dice: the output is NaN." in log
    assert trainer.best_robust is None


def test_a_pseudo_dice_that_is_no_number_does_not_stand_in_the_way_of_later_ones(project, results, monkeypatch):
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", robust_every=1)
    monkeypatch.setattr("nnunet_ima.robust_dice.RobustDice.__call__", lambda *_: 0.5)
    monkeypatch.setattr(nnUNetTrainer, "on_validation_epoch_end", lambda *_: None)
    monkeypatch.setattr(trainer.logger, "get_value", lambda *_, **__: float("nan"))
    with quiet():
        trainer.on_validation_epoch_end([])
    assert trainer.best_robust is None
    monkeypatch.setattr(trainer.logger, "get_value", lambda *_, **__: 0.5)
    with quiet():
        trainer.on_validation_epoch_end([])
    assert trainer.best_robust == pytest.approx(0.5)


def test_a_new_training_removes_what_an_earlier_one_chose(project, results):
    trainer = make_trainer(project, nnUNetTrainerSAT)
    folder = Path(trainer.output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint_best_robust.pth", "checkpoint_selected.pth"):
        (folder / name).write_bytes(b"old")
    with quiet():
        trainer.on_train_start()
    assert list(folder.glob("*.pth")) == []


@pytest.mark.parametrize("settings", [{"robust_every": 0}, {"epsilon": 0.0}])
def test_it_can_be_left_out(project, results, settings):
    trainer = make_trainer(project, nnUNetTrainerIMA, num_epochs=1, **settings)
    with quiet():
        trainer.run_training()
    assert not (Path(trainer.output_folder) / "checkpoint_best_robust.pth").exists()


def test_stock_training_has_no_such_thing(project, results):
    trainer = make_trainer(project, nnUNetTrainerSTD, num_epochs=1)
    with quiet():
        trainer.run_training()
    assert "robust_dice" not in trainer.logger.local_logger.my_fantastic_logging


# ---- snapshots


def grown(trainer: Any, largest: float) -> None:
    """Margins that have grown so far, and the end of an epoch."""
    trainer.margins.update([("case", 0)], torch.tensor([largest]))
    trainer._keep_snapshot()
    trainer.current_epoch += 1


def test_a_snapshot_is_kept_each_time_the_largest_margin_reaches_the_next_step(project, results):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0, snapshots=4)
    for largest in (1.0, 1.9, 2.0, 3.9, 3.0, 4.1, 8.0, 8.0):
        grown(trainer, largest)
    assert trainer.snapshots == [(2, 2.0), (5, pytest.approx(4.1)), (6, 8.0)]
    files = sorted(file.name for file in Path(trainer.output_folder).glob("snapshot*"))
    assert files == ["snapshot_epoch_0002.pth", "snapshot_epoch_0005.pth", "snapshot_epoch_0006.pth"]


def test_a_snapshot_is_a_light_model_that_predicts(project, results, start):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", start, epsilon=8.0, snapshots=4)
    grown(trainer, 8.0)
    folder = Path(trainer.output_folder)
    with quiet():
        trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert (folder / "snapshot_epoch_0000.pth").stat().st_size < (folder / "checkpoint_latest.pth").stat().st_size
    model = load_model(folder.parent, 0, "snapshot_epoch_0000.pth", torch.device("cpu"))
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, start[name])


def test_without_margins_or_with_none_wanted_there_is_no_snapshot(project, results):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0, snapshots=0)
    grown(trainer, 8.0)
    assert trainer.snapshots == []
    other = started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0)
    other._keep_snapshot()
    assert other.snapshots == []


def test_after_a_crash_snapshots_are_those_of_the_checkpoint(project, results):
    """A snapshot of an epoch that was lost goes; the others stay, and the next comes when it is due again."""
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0, snapshots=4)
    folder = Path(trainer.output_folder)
    grown(trainer, 2.0)
    with quiet():
        trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    grown(trainer, 4.0)
    assert len(list(folder.glob("snapshot*"))) == 2
    again = make_trainer(project, nnUNetTrainerIMA, resume=True, epsilon=8.0, snapshots=4)
    with quiet():
        again.load_checkpoint(str(folder / "checkpoint_latest.pth"))
        again.on_train_start()
    assert again.snapshots == [(0, 2.0)]
    assert [file.name for file in folder.glob("snapshot*")] == ["snapshot_epoch_0000.pth"]
    grown(again, 4.0)
    assert len(list(folder.glob("snapshot*"))) == 2


def test_a_new_training_in_the_same_folder_starts_without_the_old_ones(project, results):
    trainer = started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0, snapshots=4)
    grown(trainer, 8.0)
    started(project, nnUNetTrainerIMA, "2d_tiny", epsilon=8.0, snapshots=4)
    assert list(Path(trainer.output_folder).glob("snapshot*")) == []


def test_a_real_training_keeps_snapshots_of_weights_of_its_epochs(project, results, start, tmp_path):
    trainer = make_trainer(project, nnUNetTrainerIMA, num_epochs=3, epsilon=3.0, delta_epsilon=1.0, snapshots=3)
    with quiet():
        trainer.initialize()
        trainer.network.load_state_dict(start)
        trainer.run_training()
    assert trainer.snapshots
    folder = Path(trainer.output_folder)
    for epoch, largest in trainer.snapshots:
        assert 0 < largest <= 3.0
        assert weights_of(folder / f"snapshot_epoch_{epoch:04d}.pth").keys() == start.keys()
    shutil.rmtree(tmp_path / "results", ignore_errors=True)
