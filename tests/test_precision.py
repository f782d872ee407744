"""Mixed precision and torch.compile: attack gradients match those in single precision; few graphs are compiled.

On CUDA nnU-Net trains under fp16 autocast with a GradScaler; without a GPU bf16 on the CPU takes the same way.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_project import SETTINGS, make_trainer, quiet
from test_trainers import foreground_batch, started
from torch import Tensor

from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.fixed_patches import fixed_patches
from nnunet_ima.losses import SegmentationLoss, first
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

LARGEST_ERROR = 0.01
METHODS = (nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


def under(device: str, dtype: torch.dtype) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.autocast(device, dtype=dtype)


def gradients(trainer: Any, device: str, autocast: Any = None) -> Tensor:
    """Of a real network's loss on real patches, as the attacks ask for them."""
    images, targets = fixed_patches(trainer.dataloader_val.data_loader, 6)
    network = trainer.network.to(device)
    named = {} if autocast is None else {"autocast": autocast}
    loss = SegmentationLoss(trainer.labels)
    oracle = Oracle(network, first(targets).to(device), loss, trainer.criterion, **named)
    with undisturbed(network):
        return oracle.ascent(images.to(device), torch.arange(len(images), device=device)).gradient.float().cpu()


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        # About 4 % off at the median on the CPU: pending, not excused.
        pytest.param("cpu", torch.bfloat16, marks=pytest.mark.pending),
        pytest.param("cuda", torch.float16, marks=needs_gpu),
        pytest.param("cuda", torch.bfloat16, marks=needs_gpu),
    ],
)
def test_attack_gradients_match_single_precision(
    project, results, configuration, start, record_property, device, dtype
):
    """Their direction is what an attack uses: relative error of the gradient, and no voxel lost to underflow."""
    trainer = started(project, nnUNetTrainerSAT, configuration, start)
    exact = gradients(trainer, device)
    found = gradients(trainer, device, under(device, dtype))
    errors = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    zeros = [float(((g == 0) & (exact != 0)).float().mean()) for g in (exact, found)]
    record_property("relative_error", float(errors.max()))
    record_property("share_of_zero_gradients", zeros[1])
    assert errors.max() < LARGEST_ERROR
    assert zeros[1] < 1e-3


# How many samples IMA perturbs is random here, and so is when the last graph is compiled: it needs fixed draws.
@pytest.mark.parametrize("kind", [pytest.param(nnUNetTrainerIMA, marks=pytest.mark.pending), *METHODS[1:]])
def test_few_graphs_are_compiled_however_many_samples_are_perturbed(project, results, start, kind, monkeypatch):
    """The attack runs on the bare network; the training pass meets batches of every size."""
    trainer = started(project, kind, "2d_tiny", start, te_start=0.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.network = torch.compile(trainer.network, backend="eager")
    perturbed = set()
    graphs = []
    for _ in range(8):
        batch = foreground_batch(trainer)
        with quiet():
            counts = trainer.train_step(batch)["counts"][0]
        perturbed.add(counts.get("perturbed", counts["samples"]))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[-1] <= 8
    assert graphs[-1] == graphs[-3]  # the last steps compile nothing
    if kind is nnUNetTrainerIMA:
        assert len(perturbed) > 1
    torch._dynamo.reset()


@needs_gpu
@pytest.mark.parametrize("kind", METHODS)
def test_a_training_on_a_gpu_scales_its_loss_logs_and_continues(project, results, start, kind):
    settings = {**SETTINGS, "te_start": 0.0}
    plans = project.plans()
    plans["configurations"]["2d_tiny"]["nnunet_ima"] = settings
    plans["continue_training"] = False
    with quiet():
        trainer = kind(plans, "2d_tiny", 0, copy.deepcopy(trainer_dataset(project)), torch.device("cuda"))
        trainer.initialize()
        trainer.network.load_state_dict(start)
        trainer.run_training()
    assert trainer.grad_scaler is not None
    assert trainer.grad_scaler.get_scale() > 1
    logged = trainer.logger.local_logger.my_fantastic_logging["train_losses"]
    assert all(value == value for value in logged)
    again = make_trainer(project, kind, resume=True, num_epochs=3, te_start=0.0)
    with quiet():
        again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        again.on_train_start()
    assert again.current_epoch == 2


def trainer_dataset(project: Any) -> dict[str, Any]:
    from nnunet_project import read

    return read(project.preprocessed / "dataset.json")
