"""SAT, TRADES, TE and IMA: each step against a slow, obvious one, with nnU-Net's own losses, a sample at a time."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_project import SETTINGS, make_trainer, quiet
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from test_trainers import foreground_batch, leave_as_sentence, started
from torch import Tensor

from nnunet_ima.evaluation.models import load_model
from nnunet_ima.settings import KEY
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import START, nnUNetTrainerTRADES

METHODS = (nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES)
EPSILON = 6.0


# ---- the slow way


def slow_loss(trainer: Any, image: Tensor, targets: list[Tensor]) -> Tensor:
    """nnU-Net's own loss of one sample (1, C, *spatial), with its deep-supervision weights."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    plain = DC_and_CE_loss(dice, {}, ignore_label=None, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(plain, trainer.loss.weight_factors)(trainer.network(image), targets)


def slow_kl(trainer: Any, clean: list[Tensor], image: Tensor) -> Tensor:
    """KL(clean ‖ perturbed) of one sample: torch's own, mean over voxels, weighted over outputs."""
    total = torch.zeros(())
    for weight, c, p in zip(trainer.loss.weight_factors, clean, trainer.network(image), strict=True):
        summed = torch.nn.functional.kl_div(p.log_softmax(1), c.softmax(1), reduction="sum")
        total = total + weight * summed / c[0, 0].numel()
    return total


def clamp_to_own_range(image: Tensor, clean: Tensor) -> Tensor:
    low = [float(channel.min()) for channel in clean[0]]
    high = [float(channel.max()) for channel in clean[0]]
    channels = [image[0, c].clamp(low[c], high[c]) for c in range(len(low))]
    return torch.stack(channels)[None]


def pulled_back(point: Tensor, clean: Tensor, epsilon: float) -> Tensor:
    delta = point - clean
    length = float(delta.double().norm())
    if length > epsilon:
        delta = delta * (epsilon / length)
    return clamp_to_own_range(clean + delta, clean)


def slow_pgd(clean: Tensor, point: Tensor, epsilon: float, steps: int, factor: float, objective: Any) -> Tensor:
    """Steps of factor · ε / K along the normalised gradient, projected."""
    for _ in range(steps):
        point = point.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(objective(point), point)
        direction = gradient / gradient.double().norm().float()
        point = pulled_back(point.detach() + factor * epsilon / steps * direction, clean, epsilon)
    return point


def slow_ball_noise(like: Tensor, epsilon: float, generator: torch.Generator) -> Tensor:
    """A random direction, a random length: drawn for the whole batch, lengths first."""
    shares = torch.rand((len(like), 1), generator=generator)
    noise = torch.randn(like.shape, generator=generator)
    return torch.stack([n / n.norm() * epsilon * share for n, share in zip(noise, shares[:, 0], strict=True)])


def one(values: list[Tensor], i: int) -> list[Tensor]:
    return [value[i : i + 1] for value in values]


def compared(trainer: Any, batch: dict[str, Any]) -> tuple[list[Tensor], float, dict[str, float]]:
    """A real step: the images that training passes saw, the loss, the counts."""
    seen: list[Tensor] = []
    forward = trainer.forward

    def noted(images: Tensor) -> Any:
        seen.append(images.detach().clone())
        return forward(images)

    trainer.forward = noted
    trainer.generator.manual_seed(3)
    found = trainer.train_step(batch)
    trainer.forward = forward
    return seen, float(found["loss"]), found["counts"][0]


def close(found: Tensor, expected: Tensor) -> None:
    """Images of a few gradient steps in single precision."""
    assert (found - expected).norm() < 2e-3 * max(1.0, float(expected.norm()))


def prepared(trainer: Any) -> tuple[dict[str, Any], Tensor, list[Tensor]]:
    batch = foreground_batch(trainer)
    return batch, batch["data"].clone(), [target.clone() for target in batch["target"]]


def test_sat_is_pgd_and_the_loss_on_what_it_finds(project, results, configuration, start):
    trainer = started(project, nnUNetTrainerSAT, configuration, start, epsilon=EPSILON)
    before = copy.deepcopy(trainer.network.state_dict())
    batch, images, targets = prepared(trainer)
    (seen,), loss, counts = compared(trainer, batch)
    trainer.network.load_state_dict(before)
    noise = slow_ball_noise(images, EPSILON, torch.Generator().manual_seed(3))
    expected = []
    for i in range(len(images)):
        clean = images[i : i + 1]
        point = pulled_back(clean + noise[i : i + 1], clean, EPSILON)
        objective = lambda p, i=i: slow_loss(trainer, p, one(targets, i))  # noqa: E731 (one line a sample)
        expected.append(slow_pgd(clean, point, EPSILON, SETTINGS["steps"], 4.0, objective))
    close(seen, torch.cat(expected))
    with torch.no_grad():
        slow = float(trainer.loss(trainer.network(seen), targets))
    assert loss == pytest.approx(slow, rel=1e-4, abs=1e-5)
    assert (seen - images).flatten(1).norm(dim=1).max() > 0.5 * EPSILON
    assert counts["forward_passes"] == len(images) * (SETTINGS["steps"] + 1)


def test_trades_climbs_the_divergence_and_adds_it_to_the_clean_loss(
    project, results, configuration, start, monkeypatch
):
    """From further away than it starts: 0.001 apart the divergence is little more than rounding, one sample at a time.

    That beginning of the climb then leads both the same way only up to what the network makes of the rounding.
    """
    assert START == 0.001
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerTRADES.START", 0.1)
    settings = {"epsilon": EPSILON, "steps": 4, "step_factor": 2.0, "trades_beta": 3.0}
    trainer = started(project, nnUNetTrainerTRADES, configuration, start, **settings)
    before = copy.deepcopy(trainer.network.state_dict())
    batch, images, targets = prepared(trainer)
    (clean_seen, seen), loss, counts = compared(trainer, batch)
    trainer.network.load_state_dict(before)
    assert torch.equal(clean_seen, images)
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(3))
    expected, divergences = [], []
    for i in range(len(images)):
        clean = images[i : i + 1]
        with torch.no_grad():
            fixed = trainer.network(clean)
        objective = lambda p, fixed=fixed: slow_kl(trainer, fixed, p)  # noqa: E731 (one line a sample)
        point = pulled_back(clean + noise[i : i + 1], clean, EPSILON)
        expected.append(slow_pgd(clean, point, EPSILON, 4, 2.0, objective))
        divergences.append(float(slow_kl(trainer, fixed, seen[i : i + 1]).detach()))
    close(seen, torch.cat(expected))
    # At the images that the step found: they agree only to a few roundings, and the two terms nearly cancel.
    with torch.no_grad():
        clean_loss = float(trainer.loss(trainer.network(images), targets))
    assert loss == pytest.approx(clean_loss + 3.0 * float(np.mean(divergences)), rel=1e-4, abs=1e-4)
    assert min(divergences) > 0.01
    assert counts["forward_passes"] == len(images) * (4 + 2)


def test_te_is_sat_with_a_pull_to_the_average_of_clean_predictions(project, results, configuration, start):
    settings = {"epsilon": EPSILON, "te_start": 0.0, "te_end": 0.0, "te_weight": 50.0, "te_momentum": 0.5}
    trainer = started(project, nnUNetTrainerTE, configuration, start, **settings)
    batch, images, targets = prepared(trainer)
    # An older prediction, of another network, already stands in the averages.
    old = {}
    for (case, _), coordinates in zip(trainer.samples_of(batch), batch["coordinates"], strict=True):
        old[case] = torch.tensor([0.2, 0.5, 0.3])
        everywhere = torch.stack(torch.meshgrid(*map(torch.arange, trainer.training_shapes[case]), indexing="ij"))
        for _ in range(1 if case not in trainer.averages.state_dict() else 0):
            prediction = old[case].reshape(3, 1, 1, 1).expand(3, *everywhere.shape[1:])
            trainer.averages.update(case, everywhere.float(), prediction)
        assert coordinates.shape[0] == 3
    before = copy.deepcopy(trainer.network.state_dict())
    averages = copy.deepcopy(trainer.averages)
    (seen,), loss, counts = compared(trainer, batch)
    trainer.network.load_state_dict(before)
    noise = slow_ball_noise(images, EPSILON, torch.Generator().manual_seed(3))
    expected, pulls = [], []
    for i, (case, _) in enumerate(trainer.samples_of(batch)):
        clean, coordinates = images[i : i + 1], batch["coordinates"][i]
        with torch.no_grad():
            averages.update(case, coordinates, trainer.network(clean)[0].softmax(1)[0])
        average, known = averages.read(case, coordinates)

        def pull(p: Tensor, average: Tensor = average, known: Tensor = known) -> Tensor:
            difference = (trainer.network(p)[0].softmax(1)[0] - average)[:, known[0]]
            return 50.0 * (difference**2).sum() / difference.numel() if difference.numel() else torch.zeros(())

        objective = lambda p, i=i, pull=pull: slow_loss(trainer, p, one(targets, i)) + pull(p)  # noqa: E731 (one line)
        point = pulled_back(clean + noise[i : i + 1], clean, EPSILON)
        expected.append(slow_pgd(clean, point, EPSILON, SETTINGS["steps"], 4.0, objective))
        pulls.append(float(pull(seen[i : i + 1]).detach()))
    close(seen, torch.cat(expected))
    with torch.no_grad():
        slow = float(trainer.loss(trainer.network(seen), targets)) + float(np.mean(pulls))
    assert loss == pytest.approx(slow, rel=1e-4, abs=1e-4)
    assert np.mean(pulls) > 0.1
    assert counts["forward_passes"] == len(images) * (SETTINGS["steps"] + 2)


def test_ima_trains_on_half_clean_and_half_boundary_samples(project, results, configuration, start):
    """Lines 2 to 17 of Algorithm 1 with Algorithm 2 written out: noise, PGD until wrong, bisection."""
    trainer = started(project, nnUNetTrainerIMA, configuration, start, epsilon=EPSILON, delta_epsilon=1.5)
    before = copy.deepcopy(trainer.network.state_dict())
    batch, images, targets = prepared(trainer)
    samples = trainer.samples_of(batch)
    generator = torch.Generator().manual_seed(5)
    trainer.margins.update(samples, 4 * torch.rand(len(samples), generator=generator))
    margins = trainer.margins.margins(samples)
    seen, loss, _ = compared(trainer, batch)
    trainer.network.load_state_dict(before)

    def correct(image: Tensor, i: int) -> bool:
        predicted, truth = trainer.network(image)[0].argmax(1), targets[0][i : i + 1, 0].long()
        dices = []
        for label in (1, 2):
            p, t = predicted == label, truth == label
            if int(p.sum() + t.sum()):
                dices.append(2 * float((p & t).sum()) / float(p.sum() + t.sum()))
        return bool(np.mean(dices) > SETTINGS["dice_threshold"]) if dices else True

    drawn = [i for i in range(len(images)) if correct(images[i : i + 1], i) and bool((targets[0][i] > 0).any())]
    assert len(drawn) > 1
    noise = torch.randn((len(drawn), *images.shape[1:]), generator=torch.Generator().manual_seed(3))
    mixed = images.clone()
    for row, i in enumerate(drawn):
        clean, margin = images[i : i + 1], float(margins[i])
        radius = min(max(margin - 1.5, 1.5), margin)
        point = pulled_back(clean + noise[row] / noise[row].norm() * radius, clean, margin)
        last = clean
        for step in range(SETTINGS["steps"] + 1):
            if not correct(point, i):
                wrong = point
                for _ in range(SETTINGS["bisections"]):
                    middle = (last + wrong) / 2
                    last, wrong = (middle, wrong) if correct(middle, i) else (last, middle)
                point = (last + wrong) / 2
                break
            last = point
            if step < SETTINGS["steps"]:
                objective = lambda p, i=i: slow_loss(trainer, p, one(targets, i))  # noqa: E731 (one line)
                point = point.detach().requires_grad_(True)
                (gradient,) = torch.autograd.grad(objective(point), point)
                direction = gradient / gradient.double().norm().float()
                point = pulled_back(point.detach() + 4 * margin / SETTINGS["steps"] * direction, clean, margin)
        mixed[i] = point[0].detach()
    close(seen[1], mixed[drawn])
    mixed[drawn] = seen[1]
    with torch.no_grad():
        slow = [float(trainer.loss(trainer.network(which), targets)) for which in (images, mixed)]
    assert loss == pytest.approx(sum(slow) / 2, rel=1e-4, abs=1e-5)


# ---- where a method is stock training


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (nnUNetTrainerIMA, {"epsilon": 0.0}),
        (nnUNetTrainerSAT, {"epsilon": 0.0}),
        (nnUNetTrainerTRADES, {"trades_beta": 0.0}),
        (nnUNetTrainerTE, {"epsilon": 0.0, "te_weight": 0.0, "te_start": 0.0}),
    ],
)
def test_without_its_own_part_a_method_is_stock_training(project, results, configuration, start, kind, settings):
    ours = started(project, kind, configuration, start, **settings)
    stock = started(project, nnUNetTrainer, configuration, start)
    stock.initial_lr = ours.initial_lr
    for _ in range(2):
        batch = next(ours.dataloader_train)
        losses = [float(trainer.train_step(copy.deepcopy(batch))["loss"]) for trainer in (ours, stock)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, value in stock.network.state_dict().items():
        torch.testing.assert_close(ours.network.state_dict()[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", METHODS)
def test_a_step_leaves_the_network_ready_to_learn(project, results, start, kind):
    trainer = started(project, kind, "2d_tiny", start, te_start=0.0)
    with quiet():
        trainer.train_step(next(trainer.dataloader_train))
    assert trainer.network.training
    assert all(parameter.requires_grad for parameter in trainer.network.parameters())


# ---- whole trainings


@pytest.mark.parametrize("kind", [nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES])
@pytest.mark.parametrize("dimension", ["2d_tiny", "3d_tiny"])
def test_a_training_runs_logs_saves_and_continues(project, results, kind, dimension):
    trainer = make_trainer(project, kind, dimension, te_start=0.0, te_end=1.0)
    with quiet():
        trainer.run_training()
    folder = Path(trainer.output_folder)
    logged = trainer.logger.local_logger.my_fantastic_logging
    for panel in kind.panels:
        for key in panel.curves:
            assert len(logged[key]) == SETTINGS["num_epochs"]
            assert all(math.isfinite(value) for value in logged[key]), key
    assert logged["passes_per_sample"][-1] >= SETTINGS["steps"] + 1
    described = trainer.configured.in_force
    assert set(kind.reads) <= set(described)
    assert "delta_epsilon" not in described
    again = make_trainer(project, kind, dimension, resume=True, num_epochs=3, te_start=0.0, te_end=1.0)
    with quiet():
        again.load_checkpoint(str(folder / "checkpoint_final.pth"))
        assert again.current_epoch == 2
        again.on_train_start()
        if kind is nnUNetTrainerTE:
            states = [t.averages.state_dict() for t in (trainer, again)]
            assert states[0].keys() == states[1].keys() != set()
            for case, stored in states[0].items():
                assert all(torch.equal(tensor, states[1][case][name]) for name, tensor in stored.items())
        again.run_training()
    assert again.current_epoch == 3
    model = load_model(folder.parent, 0, "checkpoint_final.pth", torch.device("cpu"))
    assert model.trainer == kind.__name__


@pytest.mark.parametrize("kind", [nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES])
def test_a_checkpoint_of_another_method_is_refused_for_continuing(project, results, ima_2d, kind):
    trainer = make_trainer(project, kind, resume=True, num_epochs=3)
    with quiet():
        trainer.load_checkpoint(str(Path(ima_2d.output_folder) / "checkpoint_final.pth"))
    with pytest.raises(SystemExit) as left, quiet():
        trainer.run_training()
    assert "-pretrained_weights" in leave_as_sentence(left)


def test_settings_of_other_methods_are_allowed_and_said_to_have_no_effect(project, results):
    trainer = started(project, nnUNetTrainerSAT, "2d_tiny", trades_beta=2.0)
    log = next(Path(trainer.output_folder).glob("training_log_*.txt")).read_text(encoding="utf-8")
    assert "of no effect here: " in log
    assert "trades_beta" in log.split("of no effect here: ")[1].splitlines()[0]
    assert "trades_beta" not in trainer.described()["settings"]


# ---- TE


def test_the_pull_grows_over_the_middle_of_the_training(project, results):
    trainer = started(project, nnUNetTrainerTE, "2d_tiny", num_epochs=50)
    weights = []
    for epoch in range(50):
        trainer.current_epoch = epoch
        weights.append(trainer.pull_weight())
    assert weights[:25] == [None] * 25
    assert weights[25] == pytest.approx(300 * math.exp(-5))
    assert weights[30] == pytest.approx(300 * math.exp(-5 / 4))
    assert weights[35:] == [300.0] * 15
    assert all(a < b for a, b in pairwise(weights[25:36]))


def test_te_keeps_no_average_before_it_pulls(project, results):
    trainer = started(project, nnUNetTrainerTE, "2d_tiny", te_start=1.0, te_end=1.0)
    with quiet():
        trainer.train_step(next(trainer.dataloader_train))
    assert len(trainer.averages) == 0


def test_averages_that_do_not_fit_into_memory_are_refused(project, results, monkeypatch):
    """The memory that the job was given, of a machine that may have more."""
    monkeypatch.setattr("nnunet_ima.trainers.nnUNetTrainerTE.memory_limit", lambda: 3 << 10)
    trainer = make_trainer(project, nnUNetTrainerTE)
    with pytest.raises(SystemExit) as left, quiet():
        trainer.run_training()
    assert "memory of this machine or job" in leave_as_sentence(left)


def test_a_checkpoint_of_te_holds_averages_as_half_precision_tensors(project, results):
    trainer = started(project, nnUNetTrainerTE, "2d_tiny", te_start=0.0)
    file = Path(trainer.output_folder) / "checkpoint_latest.pth"
    with quiet():
        trainer.train_step(next(trainer.dataloader_train))
        trainer.save_checkpoint(str(file))
    saved = torch.load(file, weights_only=False)["init_args"][KEY]["state"]["averages"]
    assert saved
    assert {t.dtype for stored in saved.values() for t in stored.values()} == {torch.float16}
