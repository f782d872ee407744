"""Mixed precision and torch.compile: attack gradients match those in single precision; few graphs are compiled.

On CUDA nnU-Net trains under fp16 autocast with a GradScaler; the CPU knows the same types.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet
from test_trainers import foreground_batch, started
from torch import Tensor

from nnunet_ima.attack_strength import LEAST_STRENGTH, attack_strength
from nnunet_ima.attacks.oracle import Oracle
from nnunet_ima.gradient_error import gradient_error
from nnunet_ima.losses import first
from nnunet_ima.precision import faster_autocast, training_autocast
from nnunet_ima.settings import KEY
from nnunet_ima.threat import ThreatModel
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
        for name in ("Adversarial.training", "Adversarial.faster", "TRADES.training"):
            monkeypatch.setattr(f"nnunet_ima.trainers.nnUNetTrainer{name}_autocast", lambda _: mixed)
    yield device, dtype
    torch.set_autocast_dtype("cuda", before)


EVERYWHERE = [
    pytest.param(("cpu", torch.float16), id="cpu-fp16"),
    pytest.param(("cpu", torch.bfloat16), id="cpu-bf16"),
    pytest.param(("cuda", torch.float16), marks=needs_gpu, id="cuda-fp16"),
    pytest.param(("cuda", torch.bfloat16), marks=needs_gpu, id="cuda-bf16"),
]


def slow_errors(trainer: Any, mixed: Any) -> tuple[float, float]:
    """Of a patch at a time, without the oracle: largest relative error of the gradient, share of zeros in it."""
    images, targets, _ = trainer._patches
    differences, lost = [], []
    for i in range(len(images)):
        gradients = []
        for autocast in (nullcontext, mixed):
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
    return max(differences), sum(lost) / len(lost)


@pytest.mark.parametrize("mixed_precision", EVERYWHERE, indirect=True)
def test_attacks_in_mixed_precision_find_what_single_precision_finds(
    project, results, configuration, start, mixed_precision
):
    """Or they are not in mixed precision; the log tells what was measured, and what follows from it."""
    device, dtype = mixed_precision
    trainer = started(project, nnUNetTrainerSAT, configuration, start, device=device, robust_patches=6)
    with quiet():
        trainer.on_train_epoch_start()
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    measured = re.search(
        r"finds ([\d.]+)% of what it finds in single precision \(gradients are off by ([\d.]+)% at most, "
        r"([\d.]+)% of voxels lost\); attacks run in (\w+) precision",
        log.read_text(),
    )
    assert measured is not None
    trainer.network.eval()
    error, lost = slow_errors(trainer, partial(torch.autocast, device, dtype=dtype))
    assert float(measured[2]) == pytest.approx(100 * error, rel=0.05, abs=0.01)
    assert float(measured[3]) == pytest.approx(100 * lost, rel=0.05, abs=0.01)
    single = trainer.attack_autocast is nullcontext
    assert measured[4] == ("single" if single else "mixed")
    assert single == (float(measured[1]) < 100 * LEAST_STRENGTH)
    assert trainer.attack_chunk == (max(1, trainer.batch_size // 2) if single else None)
    if dtype == torch.float16:
        # With gradients scaled against underflow; without, an attack would find next to nothing.
        assert not single


@given(st.integers(1, 4), st.floats(0, 2), st.integers(0, 2**31))
def test_strength_is_the_share_of_the_loss_that_is_found(samples, noise, seed):
    """Against a linear network, whose worst perturbation and its loss are known in closed form."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn((samples, 1, 4, 4), generator=generator).double()
    wrong = weights + noise * torch.randn(weights.shape, generator=generator)
    low = [False]

    @contextmanager
    def autocast():
        low[0] = True
        yield
        low[0] = False

    class Linear(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images * (wrong if low[0] else weights)

    def total(outputs: Any, _: Any) -> Tensor:
        return outputs.flatten(1).sum(1)

    images = torch.randn(weights.shape, generator=generator).double()
    oracle, exact = (Oracle(Linear(), images, total, None, autocast=one) for one in (autocast, nullcontext))
    threat = ThreatModel("l2", torch.full((samples,), 0.5))
    found = attack_strength(oracle, exact, threat, images, images, 5, 0.5)
    directions = wrong / wrong.flatten(1).norm(dim=1)[:, None, None, None]
    expected = (directions * weights).sum() / weights.flatten(1).norm(dim=1).sum()
    assert found == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_where_single_precision_finds_nothing_nothing_is_known_of_mixed_precision():
    flat = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.zeros_(flat.weight)
    images = torch.ones((2, 1, 3, 3))
    oracle = Oracle(flat, images, lambda o, _: o.flatten(1).sum(1), None)
    assert attack_strength(oracle, oracle, ThreatModel("l2", torch.ones(2)), images, images, 2, 0.5) == 0.0


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
def test_attacks_are_in_single_precision_where_none_is_faster(project, results, start, device, monkeypatch):
    """And as long as nothing was measured."""
    monkeypatch.setattr("nnunet_ima.precision._has_amx", lambda: False)
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", start, device=device)
    assert trainer.attack_autocast is nullcontext
    with quiet():
        trainer.on_train_epoch_start()
    assert (training_autocast(trainer.device) is nullcontext) == (device == "cpu")
    assert (faster_autocast(trainer.device) is nullcontext) == (device == "cpu")
    if device == "cpu":
        assert trainer.attack_autocast is nullcontext


@pytest.fixture
def amx(monkeypatch) -> None:
    """A CPU with units for bfloat16 matrices; others can do the same, slowly."""
    monkeypatch.setattr("nnunet_ima.precision._has_amx", lambda: True)


@pytest.mark.parametrize("kind", METHODS)
def test_a_cpu_with_matrix_units_attacks_in_bfloat16_and_trains_in_single_precision(
    project, results, configuration, start, kind, amx
):
    """Where bfloat16 finds what single precision finds."""
    trainer = started(project, kind, configuration, start, te_start=0.0, dice_threshold=0.0)
    with quiet():
        trainer.on_train_epoch_start()
    (log,) = Path(trainer.output_folder).glob("training_log_*.txt")
    measured = re.search(r"\(bfloat16\) finds ([\d.]+)%.*attacks run in (\w+) precision", log.read_text())
    assert measured is not None
    assert (measured[2] == "mixed") == (float(measured[1]) >= 100 * LEAST_STRENGTH)
    # Whatever was measured of this tiny network.
    trainer.attack_autocast = faster_autocast(trainer.device)
    seen: list[tuple[bool, torch.dtype]] = []
    hook = trainer.bare_network.register_forward_hook(
        lambda network, _, outputs: seen.append((network.training, first(outputs).dtype))
    )
    with quiet():
        loss = trainer.train_step(foreground_batch(trainer))["loss"]
    hook.remove()
    assert np.isfinite(loss)
    assert {dtype for training, dtype in seen if training} == {torch.float32}
    attacked = {dtype for training, dtype in seen if not training}
    # The first step of TRADES is in single precision everywhere.
    assert attacked == {torch.bfloat16, *([torch.float32] if kind is nnUNetTrainerTRADES else [])}
    assert {weight.dtype for weight in trainer.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("mixed_in", ["float16", "bfloat16"])
def test_a_measurement_of_another_type_is_made_again(project, results, start, amx, monkeypatch, mixed_in):
    """From a GPU to a CPU: what was found of fp16 says nothing of bfloat16."""
    left = [1.0, 0.5]
    strengths(monkeypatch, left)

    def other_type(ours: dict[str, Any]) -> None:
        assert ours["attacks_mixed_in"] == "bfloat16"
        ours["attacks_mixed_in"] = mixed_in

    again = measured_saved_and_continued(project, results, start, other_type)
    with quiet():
        again.on_train_epoch_start()
    measured = mixed_in == "float16"
    assert len(left) == (0 if measured else 1)
    assert (again.attack_autocast is nullcontext) == measured


def test_who_wants_single_precision_gets_it(project, results, start, amx, monkeypatch):
    """Also a training that goes on from one that attacked in another."""
    left = [1.0]
    strengths(monkeypatch, left)
    measured_saved_and_continued(project, results, start, lambda _: None)
    assert left == []
    again = continued(project, results / "there.pth", attack_precision="single", robust_every=2, robust_patches=2)
    with quiet():
        again.on_train_epoch_start()
        again.save_checkpoint(str(results / "single.pth"))
    assert again.attack_autocast is nullcontext
    noted = torch.load(results / "single.pth", weights_only=False)["init_args"][KEY]
    assert noted["attacks_mixed"] is None


def measured_saved_and_continued(
    project: Any, results: Path, start: Any, change: Callable[[dict[str, Any]], object]
) -> Any:
    """A SAT trainer that goes on from what another one noted after a measurement, once ``change`` was made to it."""
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", start, robust_every=2, robust_patches=2)
    with quiet():
        trainer.on_train_epoch_start()
        trainer.save_checkpoint(str(results / "here.pth"))
    checkpoint = torch.load(results / "here.pth", weights_only=False)
    change(checkpoint["init_args"][KEY])
    torch.save(checkpoint, results / "there.pth")
    return continued(project, results / "there.pth", robust_every=2, robust_patches=2)


ON_THE_CPU = [pytest.param(("cpu", torch.float16), id="cpu-fp16")]


def continued(project: Any, checkpoint: Path, **settings: Any) -> Any:
    """A SAT trainer that goes on from a checkpoint, right before its next epoch."""
    trainer = make_trainer(project, nnUNetTrainerSAT, resume=True, num_epochs=9, **settings)
    with quiet():
        trainer.load_checkpoint(str(checkpoint))
        trainer.on_train_start()
    return trainer


def strengths(monkeypatch, values: list[float]) -> None:
    """Let the measurements find these, one after the other."""
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerAdversarial.attack_strength", lambda *_: values.pop(0))


@pytest.mark.parametrize("mixed_precision", ON_THE_CPU, indirect=True)
@pytest.mark.parametrize("found", [0.9, 1.0])
def test_a_continued_training_attacks_in_the_precision_of_the_uninterrupted_one(
    project, results, start, mixed_precision, monkeypatch, found
):
    """Between two measurements the last one counts, on whichever side of a stop it was made."""
    left = [found, 1.9 - found]
    strengths(monkeypatch, left)
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", start, robust_every=2, robust_patches=2)
    with quiet():
        trainer.on_train_epoch_start()
        checkpoint = results / "after_the_first.pth"
        trainer.save_checkpoint(str(checkpoint))
        again = continued(project, checkpoint, robust_every=2, robust_patches=2)
        assert again.current_epoch == 1
        again.on_train_epoch_start()
    assert len(left) == 1, "measured though it was not due"
    single = found < LEAST_STRENGTH
    assert [one.attack_autocast is nullcontext for one in (trainer, again)] == [single, single]
    again.current_epoch = 2
    with quiet():
        again.on_train_epoch_start()
    assert left == []
    assert (again.attack_autocast is nullcontext) is not single


@pytest.mark.parametrize("mixed_precision", ON_THE_CPU, indirect=True)
def test_a_checkpoint_that_says_nothing_of_the_precision_is_continued_with_a_measurement(
    project, results, start, mixed_precision, monkeypatch
):
    """An older one."""
    left = [1.0, 1.0]
    strengths(monkeypatch, left)
    again = measured_saved_and_continued(project, results, start, lambda ours: ours.pop("attacks_mixed"))
    assert again.attack_autocast is nullcontext
    with quiet():
        again.on_train_epoch_start()
    assert left == []
    assert again.attack_autocast is not nullcontext


@pytest.mark.parametrize("mixed_precision", ON_THE_CPU, indirect=True)
def test_where_trainings_are_in_single_precision_a_continued_one_attacks_in_it_too(
    project, results, start, mixed_precision, monkeypatch
):
    """From a GPU to a CPU."""
    strengths(monkeypatch, [1.0])
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", start, robust_patches=2)
    with quiet():
        trainer.on_train_epoch_start()
        trainer.save_checkpoint(str(results / "from_a_gpu.pth"))
    for name in ("training", "faster"):
        monkeypatch.setattr(f"nnunet_ima.trainers.nnUNetTrainerAdversarial.{name}_autocast", lambda _: nullcontext)
    again = continued(project, results / "from_a_gpu.pth", robust_patches=2)
    with quiet():
        again.on_train_epoch_start()
    assert again.attack_autocast is nullcontext


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
def test_trades_begins_in_single_precision(project, results, start, mixed_precision, monkeypatch):
    """Its ascent starts closer to the clean image than half precision resolves, whatever else mixed precision finds."""
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerAdversarial.attack_strength", lambda *_: 1.0)
    device, _ = mixed_precision
    trainer = started(project, nnUNetTrainerTRADES, "2d_tiny", start, device=device)
    with quiet():
        trainer.on_train_epoch_start()
    assert trainer.attack_autocast is not nullcontext
    seen = []
    hook = trainer.bare_network.register_forward_hook(
        lambda _, inputs, outputs: seen.append((inputs[0].detach(), first(outputs).dtype))
    )
    batch = foreground_batch(trainer)
    with quiet():
        counts = trainer.train_step(batch)["counts"][0]
    hook.remove()
    clean = batch["data"].to(device)
    near = [dtype for images, dtype in seen if images.shape == clean.shape and 0 < (images - clean).abs().max() < 0.02]
    # On the CPU the batch of six goes through in two halves.
    halves = [dtype for images, dtype in seen if len(images) < len(clean)]
    assert near == []
    assert halves
    assert {*halves} == {torch.float32}
    assert counts["forward_passes"] == len(clean) * (2 + 1 + trainer.settings.steps)
