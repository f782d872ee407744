"""Mixed precision and torch.compile: attack gradients match those in single precision; few graphs are compiled.

On CUDA nnU-Net trains under fp16 autocast with a GradScaler; the CPU knows the same types.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet
from test_trainers import foreground_batch, started
from torch import Tensor

from nnunet_ima.gradient_error import LARGEST_ERROR, GradientError, gradient_error
from nnunet_ima.precision import training_autocast
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

MOST_GRAPHS = 4
METHODS = (nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")


@pytest.fixture
def mixed_precision(request, monkeypatch) -> Iterator[tuple[str, torch.dtype]]:
    """Training in mixed precision; on the CPU, which knows the same types, nnU-Net itself has none."""
    device, dtype = request.param
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", dtype)
    if device == "cpu":
        mixed = partial(torch.autocast, "cpu", dtype=dtype)
        for name in ("Adversarial", "TRADES"):
            monkeypatch.setattr(f"nnunet_ima.trainers.nnUNetTrainer{name}.training_autocast", lambda _: mixed)
    yield device, dtype
    torch.set_autocast_dtype("cuda", before)


EVERYWHERE = [
    pytest.param(("cpu", torch.float16), id="cpu-fp16"),
    pytest.param(("cpu", torch.bfloat16), id="cpu-bf16"),
    pytest.param(("cuda", torch.float16), marks=needs_gpu, id="cuda-fp16"),
    pytest.param(("cuda", torch.bfloat16), marks=needs_gpu, id="cuda-bf16"),
]


def slow_errors(trainer: Any) -> tuple[float, float]:
    """Of a patch at a time, without the oracle: largest relative error of the gradient, share of zeros in it."""
    images, targets = trainer._patches
    differences, lost = [], []
    for i in range(len(images)):
        gradients = []
        for autocast in (nullcontext, trainer.attack_autocast):
            point = images[i : i + 1].clone().requires_grad_(True)
            with autocast():
                outputs = trainer.network(point)
            # Scaled against underflow, as GradScaler does.
            loss = trainer.sample_loss(outputs, [target[i : i + 1] for target in targets])
            (gradient,) = torch.autograd.grad(loss.sum() * 2.0**11, point)
            gradients.append(gradient)
        exact, found = gradients
        differences.append(float((found - exact).norm() / exact.norm()))
        lost.append(float(((found == 0) & (exact != 0)).float().mean()))
    return max(differences), max(lost)


@pytest.mark.parametrize("mixed_precision", EVERYWHERE, indirect=True)
def test_attack_gradients_are_those_of_single_precision(project, results, configuration, start, mixed_precision):
    """To 1 %, in whatever precision nnU-Net trains; the log tells what was measured, and what follows from it."""
    device, dtype = mixed_precision
    trainer = started(project, nnUNetTrainerSAT, configuration, start, device=device, robust_patches=6)
    with quiet():
        trainer.on_train_epoch_start()
    trainer.network.eval()
    error, lost = slow_errors(trainer)
    assert error < LARGEST_ERROR
    assert lost < 1e-3
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    measured = re.search(
        r"off by ([\d.]+)% at most, ([\d.]+)% of voxels lost; attacks run in (\w+) precision", log.read_text()
    )
    assert measured is not None
    images, targets = trainer._patches
    mixed = partial(torch.autocast, device, dtype=dtype)
    found = gradient_error(trainer.network, images, targets, trainer.sample_loss, mixed)
    assert float(measured[1]) == pytest.approx(100 * found.relative, rel=0.05, abs=1e-3)
    assert float(measured[2]) == pytest.approx(100 * found.zeros, rel=0.05, abs=1e-3)
    single = trainer.attack_autocast is nullcontext
    assert measured[3] == ("single" if single else "mixed")
    # Nothing at the limit is asked for: there a rounding decides.
    assert single or found.relative < 1.05 * LARGEST_ERROR
    assert not single or found.relative > 0.95 * LARGEST_ERROR
    assert trainer.attack_chunk == (max(1, trainer.batch_size // 2) if single else None)
    if dtype == torch.bfloat16:
        assert single  # its eight bits are too few for any real network


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.floats(0, 0.5), st.integers(0, 2**31), st.integers(0, 16))
def test_the_gradient_error_is_that_of_the_worst_sample(samples, noise, seed, lost):
    """Against a network whose gradients are known in closed form."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((samples, 1, 4, 4), generator=generator).double()
    wrong = weights * (1 + noise * torch.randn(weights.shape, generator=generator))
    wrong.flatten(1)[:, :lost] = 0
    low = [False]

    @contextmanager
    def autocast():
        low[0] = True
        yield
        low[0] = False

    class Linear(torch.nn.Module):
        place = 0

        def forward(self, images: Tensor) -> Tensor:
            # One sample at a time, each in its turn.
            row = weights[self.place % samples] if not low[0] else wrong[self.place % samples]
            self.place += 1
            return images * row

    found = gradient_error(
        Linear(), torch.zeros_like(weights), torch.zeros_like(weights), lambda o, _: o.flatten(1).sum(1), autocast
    )
    # Gradients are compared as what they are kept in, single precision.
    wrong, weights = wrong.float(), weights.float()
    errors = (wrong - weights).flatten(1).norm(dim=1) / weights.flatten(1).norm(dim=1)
    assert found.relative == pytest.approx(float(errors.max()), rel=1e-5, abs=1e-12)
    assert found.zeros == pytest.approx(lost / 16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_attacks_are_in_single_precision_where_training_is(project, results, start, device):
    """And as long as nothing was measured."""
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", start, device=device)
    assert trainer.attack_autocast is nullcontext
    with quiet():
        trainer.on_train_epoch_start()
    assert (training_autocast(trainer.device) is nullcontext) == (device == "cpu")
    if device == "cpu":
        assert trainer.attack_autocast is nullcontext


@pytest.mark.parametrize("kind", METHODS)
def test_few_graphs_are_compiled_however_many_samples_are_perturbed(project, results, start, kind):
    """The attack runs on the bare network; the training pass meets batches of every size.

    PyTorch compiles for the first size it meets, for one sample, and for any number of them.
    """
    trainer = started(project, kind, "2d_tiny", start, te_start=0.0, dice_threshold=0.0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    trainer.network = torch.compile(trainer.network, backend="eager")
    perturbed = set()
    for foreground in [*range(trainer.batch_size + 1)] * 2:
        batch = foreground_batch(trainer)
        for target in batch["target"]:
            target[foreground:] = 0  # what has no foreground IMA does not perturb
        with quiet():
            counts = trainer.train_step(batch)["counts"][0]
        perturbed.add(counts.get("perturbed"))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    if kind is nnUNetTrainerIMA:
        assert len(perturbed) > MOST_GRAPHS  # with a graph for each, the bound would not hold
    assert 0 < graphs <= MOST_GRAPHS


@needs_gpu
@pytest.mark.parametrize("kind", METHODS)
def test_a_training_on_a_gpu_scales_its_loss_logs_and_continues(project, results, start, kind):
    trainer = make_trainer(project, kind, device="cuda", te_start=0.0)
    with quiet():
        trainer.initialize()
        trainer.network.load_state_dict(start)
        trainer.run_training()
    assert trainer.grad_scaler is not None
    assert trainer.grad_scaler.get_scale() > 1
    logged = trainer.logger.local_logger.my_fantastic_logging["train_losses"]
    assert all(value == value for value in logged)
    again = make_trainer(project, kind, resume=True, device="cuda", num_epochs=3, te_start=0.0)
    with quiet():
        again.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
        again.on_train_start()
    assert again.current_epoch == 2


def test_a_flat_loss_has_no_wrong_direction():
    flat = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.zeros_(flat.weight)
    images = torch.ones((2, 1, 3, 3))
    assert gradient_error(flat, images, images, lambda o, _: o.flatten(1).sum(1), nullcontext) == (0.0, 0.0)


@pytest.mark.parametrize("mixed_precision", EVERYWHERE, indirect=True)
def test_trades_attacks_in_single_precision_and_compares_in_it(project, results, start, mixed_precision, monkeypatch):
    """Its ascent starts closer to the clean image than half precision resolves, whatever the gradients' error."""
    monkeypatch.setattr(
        "nnunet_ima.trainers.nnUNetTrainerAdversarial.gradient_error", lambda *_: GradientError(0.0, 0.0)
    )
    device, _ = mixed_precision
    trainer = started(project, nnUNetTrainerTRADES, "2d_tiny", start, device=device)
    with quiet():
        trainer.on_train_epoch_start()
    assert trainer.attack_autocast is nullcontext
    batch = foreground_batch(trainer)
    outputs = trainer.forward(batch["data"].to(device))
    fixed, _ = trainer._fixed(outputs, batch["data"].to(device))
    assert {part.dtype for part in fixed} == {torch.float32}
