"""The benchmark of speed: its straightforward references do the same work, and its figures mean what they say."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nnunet_project import PLANS
from tiny_networks import make_problem, seeded
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import attack_passes
import speed
import speed_attacks
import speed_clock
import speed_memory
import speed_models
import speed_plain
import speed_savings
import speed_table
import speed_trainers
from speed_clock import ATTACK_PASSES, BOOKKEEPING, TRAINING_PASSES, Clock
from speed_memory import RESET, peak, reset_peak
from speed_models import Ground
from speed_plain import Ball, PlainNetwork, plain_gen_adv, plain_pgd

from nnunet_ima.attacks import PGD
from nnunet_ima.attacks.bpgd import generate_adversarial
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import Ascent, Oracle, undisturbed
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.pipeline import Method, Pipeline, SmallNetwork
from nnunet_ima.threat import ThreatModel

CPU = torch.device("cpu")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device on this machine")
STEPS, BISECTIONS = 8, 6
# Of the tiny networks, which learned for seconds.
TINY = {"dice_threshold": 0.3, "robust_every": 0}
SHORT = {**TINY, "steps": 4, "bisections": 3}


def in_double(kind: str, seed: int, samples: int = 8) -> Any:
    problem = make_problem(kind, seed, samples, wrong=0.1)
    problem.network.double()
    return replace(problem, images=problem.images.double(), targets=problem.targets.double())


def plain_network(problem: Any) -> PlainNetwork:
    return PlainNetwork(problem.network, problem.targets, double_loss, problem.criterion, nullcontext)


def double_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Cross entropy; nnU-Net's loss is computed in single precision, and rounding would grow from step to step."""
    return functional.cross_entropy(outputs, targets[:, 0].long(), reduction="none").flatten(1).mean(1)


# ---- the references


@pytest.mark.parametrize("path", [True, False])
@pytest.mark.parametrize("kind", ["2d classes", "3d classes"])
def test_straightforward_gen_adv_finds_what_ours_finds(kind, path):
    some_crossed = some_not = 0
    for seed in range(6):
        problem = in_double(kind, seed)
        images, count = problem.images, len(problem.images)
        low, high = images.amin((1, *range(2, images.ndim)), True), images.amax((1, *range(2, images.ndim)), True)
        margins = torch.rand(count, generator=seeded(seed), dtype=torch.float64) * 8 + 0.5
        ball = Ball(images, margins, low, high)
        start = ball.project(images + 0.05 * torch.randn(images.shape, generator=seeded(seed), dtype=torch.float64))
        network = plain_network(problem)
        points, crossed = plain_gen_adv(network, ball, start, STEPS, 4.0, BISECTIONS, path)
        assert network.forward_passes == count * (STEPS + 1 + BISECTIONS)
        assert network.backward_passes == count * STEPS
        with undisturbed(problem.network):
            oracle = Oracle(problem.network, problem.targets, double_loss, problem.criterion)
            ours = generate_adversarial(
                oracle,
                problem.criterion,
                ThreatModel("l2", margins, low, high),
                images,
                start,
                torch.arange(count),
                STEPS,
                4.0,
                BISECTIONS,
                "path" if path else "origin",
            )
        assert torch.equal(crossed, ours.crossed)
        torch.testing.assert_close(points, ours.images, rtol=0, atol=1e-9)
        if crossed.any():
            assert int(oracle.backward_passes.sum()) < network.backward_passes
        some_crossed, some_not = some_crossed + int(crossed.sum()), some_not + int((~crossed).sum())
    # Both ways out of GenAdv were gone.
    assert some_crossed
    assert some_not


def test_straightforward_pgd_finds_what_ours_finds_although_ours_leaves_samples_out():
    fewer = False
    for seed in range(4):
        problem = in_double("2d classes", seed)
        # The lowest Dice of the classes reaches 0 soon, where PGD is done with a sample.
        problem = replace(problem, criterion=replace(problem.criterion, reduction="min"))
        threat = ThreatModel("l2", 30.0, float(problem.images.min()), float(problem.images.max()))
        attack = PGD(threat, problem.criterion, double_loss, steps=40)
        low, high = threat.bounds(problem.images)
        ball = Ball(problem.images, threat.radius(problem.images).flatten(), low, high)
        lowest = plain_pgd(plain_network(problem), ball, attack.steps, attack.step_size)
        found = attack(problem.network, problem.images, problem.targets)
        torch.testing.assert_close(found.dice, lowest, rtol=0, atol=1e-9, check_dtype=False)
        fewer = fewer or bool((found.forward_passes < attack.steps + 2).any())
    assert fewer


# ---- the clock


def test_a_part_within_another_one_counts_for_itself_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speed_clock.time, "perf_counter", lambda: now[0])
    clock = Clock(torch.device("cpu"))
    with clock.part("outer"):
        now[0] += 1
        with clock.part("inner"):
            now[0] += 10
            with clock.part("outer"):
                now[0] += 100
        now[0] += 1000
    now[0] += 10_000
    assert clock.seconds == {"outer": 1101, "inner": 10}


class FakeTrainer:
    """Costs so many stock steps; the machine gets slower with every step of anyone."""

    device = torch.device("cpu")

    def __init__(self, cost: float) -> None:
        self.cost = cost
        self.dataloader_train = itertools.repeat({})


def measured_with_fabricated_clocks(monkeypatch, costs: dict[str, float], warm_up: int) -> dict[str, Any]:
    """The rows of :func:`speed_trainers.measure`; in the warm-up all but stock steps take a thousand times as long."""
    now = itertools.count(10)

    def step_of(trainer: FakeTrainer, _: object, step: int) -> tuple[float, dict[str, float]]:
        slow = 1000 if step < warm_up and trainer.cost != 1 else 1
        return trainer.cost * next(now) * slow, {"samples": 4, "forward_passes": 4 * trainer.cost}

    monkeypatch.setattr(speed_trainers, "step_of", step_of)
    monkeypatch.setattr(speed_trainers, "where_time_goes", lambda *_: {})
    trainers = {name: FakeTrainer(cost) for name, cost in costs.items()}
    found: dict[str, Any] = speed_trainers.measure(trainers, itertools.repeat({}), 7, warm_up, "")["rows"]
    return found


@pytest.mark.parametrize("warm_up", [0, 2])
def test_a_ratio_is_to_the_stock_steps_beside_a_step(monkeypatch, warm_up):
    """So that a machine that gets slower changes none: to the mean of two neighbours each step is what it costs."""
    costs = {speed_trainers.STOCK: 1.0, "IMA": 4.0, "SAT": 20.0}
    rows = measured_with_fabricated_clocks(monkeypatch, costs, warm_up)
    for name, cost in costs.items():
        assert rows[name]["ratio"]["median"] == pytest.approx(cost)
        assert rows[name]["passes_per_sample"] == cost
        assert "ratio_to_compiled" not in rows[name]
    assert rows["SAT"]["ratio"]["low"] == rows["SAT"]["ratio"]["high"] == 20.0


def test_with_a_compiled_stock_step_every_ratio_is_given_to_both(monkeypatch):
    costs = {speed_trainers.STOCK: 1.0, speed_trainers.COMPILED: 0.5, "IMA": 4.0}
    rows = measured_with_fabricated_clocks(monkeypatch, costs, 1)
    assert rows["IMA"]["ratio"]["median"] == pytest.approx(4)
    to_compiled = {name: row["ratio_to_compiled"]["median"] for name, row in rows.items()}
    assert to_compiled == pytest.approx({speed_trainers.STOCK: 2, speed_trainers.COMPILED: 1, "IMA": 8})


@pytest.mark.parametrize("by_timing", [True, False])
def test_cudnn_is_left_as_it_was(by_timing):
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.deterministic
    with speed_clock.cudnn_chooses(by_timing):
        assert (cudnn.benchmark, cudnn.deterministic) == (by_timing, not by_timing)
    assert (cudnn.benchmark, cudnn.deterministic) == before


def test_an_interval_of_a_median_needs_six_values():
    assert speed_clock.summary([1.0, 3.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "low": None, "high": None}
    assert speed_clock.summary([float(i) for i in range(1, 11)]) == {"median": 5.5, "low": 2.0, "high": 9.0}


@pytest.mark.skipif(not RESET.exists(), reason="only Linux tells a process's peak and lets it be reset")
def test_the_peak_of_memory_is_what_was_held_at_most_since_it_was_reset():
    held = reset_peak()
    if held is None:
        pytest.skip("this system does not let the peak be reset")
    something = bytearray(b"x" * (80 << 20))
    with_it = speed_memory._status("VmRSS")
    del something
    # Not "80 more than before": where memory is short, the system takes as much back from this process meanwhile.
    assert with_it - 10 < peak() < max(held, with_it) + 300
    held = reset_peak()
    assert held is not None
    assert peak() - held < 40


def test_the_peak_and_what_is_held_are_told_in_mib_as_the_kernel_notes_them(tmp_path, monkeypatch):
    status, reset = tmp_path / "status", tmp_path / "clear_refs"
    status.write_text("Name:\tpython\nVmHWM:\t  307200 kB\nVmRSS:\t  204800 kB\n", encoding="ascii")
    monkeypatch.setattr(speed_memory, "STATUS", status)
    monkeypatch.setattr(speed_memory, "RESET", reset)
    assert (reset_peak(), peak()) == (200.0, 300.0)
    assert reset.read_text(encoding="ascii") == "5"  # proc(5): "Resets the peak resident set size"
    monkeypatch.setattr(speed_memory, "RESET", tmp_path / "no folder" / "clear_refs")
    assert reset_peak() is None


# ---- with nnU-Net


@dataclass(frozen=True)
class ProjectGround(Ground):
    """The tests' project, with a model that found the structure."""

    name: str = "2d_tiny"
    weights: Path = Path()

    @property
    def configuration(self) -> str:
        return self.name

    @property
    def checkpoint(self) -> Path:
        return self.weights


@pytest.fixture
def ground(project, results, configuration, request) -> ProjectGround:
    pipeline = Pipeline(project.root, PLANS, SmallNetwork("tiny"), "cpu", make_folders=False)
    model = request.getfixturevalue(f"std_{configuration[:2]}")
    checkpoint = model / "fold_0" / "checkpoint_final.pth"
    return ProjectGround(
        pipeline, project.preprocessed, Method("stock", "", {}), name=configuration, weights=checkpoint
    )


@pytest.mark.parametrize("configuration", ["2d_tiny", pytest.param("3d_tiny", marks=pytest.mark.slow)])
def test_the_straightforward_step_does_imas_work(ground, monkeypatch):
    device = torch.device("cpu")
    # So far that samples cross in the first batches, in 3D too.
    monkeypatch.setattr(speed_trainers, "MARGIN", 12.0)
    with speed_trainers.at_work(ground):
        names = (speed_trainers.IMA, speed_trainers.PLAIN, speed_trainers.TE)
        trainers = {name: speed_trainers.make(speed_trainers.KINDS[name], ground, device, **SHORT) for name in names}
        before = {name: value.clone() for name, value in trainers[speed_trainers.IMA].network.state_dict().items()}
        found = speed_trainers.check(trainers, tries=20)
        assert found.attacked >= found.crossed > 0
        for name, value in trainers[speed_trainers.IMA].network.state_dict().items():
            assert torch.equal(value, before[name])
        assert not len(trainers[speed_trainers.IMA].margins)
        # One bisection less is other work.
        inner = speed_plain.plain_gen_adv
        monkeypatch.setattr(speed_plain, "plain_gen_adv", lambda *args: inner(*args[:-2], args[-2] - 1, args[-1]))
        with pytest.raises(RuntimeError, match="do not do the same work"):
            speed_trainers.check(trainers, tries=20)


class RecordingGraphs:
    """In place of CUDA graphs: answers at once, and notes for how many images."""

    sizes, refused = (1, 3, 4), None

    def __init__(self) -> None:
        self.asked: set[tuple[str, int]] = set()

    def size_for(self, samples: int) -> int:
        return next((size for size in self.sizes if size >= samples), self.sizes[-1])

    def ask(self, kind: Any, question: Any, _: object, inputs: Any) -> Any:
        self.asked.add((str(kind[0][0] if isinstance(kind[0], tuple) else kind[0]), len(inputs[0])))
        return question(*inputs)


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_graphs_of_all_sizes_are_captured_before_anything_is_timed(ground):
    with speed_trainers.at_work(ground):
        assert torch.backends.cudnn.benchmark
        trainer = speed_trainers.make(speed_trainers.KINDS[speed_trainers.IMA], ground, torch.device("cpu"), **SHORT)
        batch = next(trainer.dataloader_train)
        speed_trainers.capture_graphs(trainer, batch)
        trainer._graphs = RecordingGraphs()
        speed_trainers.capture_graphs(trainer, batch)
    assert trainer._graphs.asked == {(kind, size) for kind in ("ascent", "dice") for size in RecordingGraphs.sizes}


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_graphs_are_kept_for_ima_and_none_for_the_straightforward_step(ground, monkeypatch):
    """It never replays them; they would be called its memory, and its precision."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(name="GPU", total_memory=2**30))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (2**30, 2**30))
    for name in ("max_memory_reserved", "memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: 0)
    for kind in (speed_trainers.IMA, speed_trainers.PLAIN):
        with speed_trainers.at_work(ground):
            trainer = speed_trainers.make(speed_trainers.KINDS[kind], ground, CPU, **SHORT)
            with patch.object(trainer, "device", torch.device("cuda")):
                trainer.note_memory()
                trainer._keep_graphs()
        assert (trainer._graphs is None) is (kind == speed_trainers.PLAIN)


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_nothing_is_attacked_to_load_batches_for_memory(ground, monkeypatch):
    """A CPU with AMX would measure its precision with attacks of its own, in the memory that is measured."""
    made: list[tuple[Any, str]] = []
    make = speed_trainers.make

    def noted(kind: Any, *arguments: Any, **settings: Any) -> Any:
        trainer = make(kind, *arguments, **{**settings, **TINY})
        made.append((kind, trainer.settings.attack_precision if hasattr(trainer, "settings") else ""))
        return trainer

    monkeypatch.setattr(speed_memory, "make", noted)
    monkeypatch.setattr(speed_memory, "STEPS", 1)
    speed_memory.peak_of(ground, "STD", "cpu")
    assert made[1] == (speed_trainers.KINDS[speed_trainers.TE], "single")


def test_each_size_and_precision_is_compiled_for_itself(monkeypatch):
    """torch compiles eight variants of a function, and runs the others eagerly under the name of compiled ones."""
    calls: list[str] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: calls.append("reset"))
    monkeypatch.setattr(torch, "compile", lambda network, **_: calls.append("compile") or network)
    monkeypatch.setattr(attack_passes, "timed", lambda *_: calls.append("timed") or 1.0)
    problem = make_problem("2d classes", 0, 4)
    options = argparse.Namespace(compile=True, sizes=[4, 2], repeats=1)
    precisions = {"fp32": nullcontext, "bf16": nullcontext}
    found = attack_passes.costs(problem.network, problem.images, problem.targets, double_loss, precisions, options)
    assert [key for key in found if key.startswith("compiled")] == [
        f"compiled, {precision}, {size}" for size in (4, 2) for precision in ("fp32", "bf16")
    ]
    # The forms are eager, channels last, compiled.
    assert calls == ["reset", "compile", "timed", "timed", "timed"] * 4


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_the_program_writes_ratios_of_all_trainers_and_attacks(ground, tmp_path, monkeypatch):
    problem = make_problem("2d classes", 0, 4)
    threat = ThreatModel("l2", 2.0, float(problem.images.min()), float(problem.images.max()))

    def prepared(*_: Any) -> Any:
        return problem.network, problem.images, problem.targets, lambda kind: kind(threat, problem.criterion, chunk=4)

    measure = speed.measure_trainers
    monkeypatch.setattr(speed, "find_ground", lambda *_: ground)
    monkeypatch.setattr(speed, "measure_trainers", lambda *args: measure(*args, **TINY))
    monkeypatch.setattr(speed_attacks, "prepared", prepared)
    chosen = ["pgd", "square", "autoattack fast, threshold"]
    command = ["speed.py", "--parts", "trainers", "attacks", "--dimensions", "2d", "--steps", "1", "--samples", "4"]
    command += ["--warm-up", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--results", str(tmp_path), "--contended", "--attacks", *chosen])
    speed.main()
    result = json.loads((tmp_path / "speed_cpu.json").read_text())["2d"]
    rows = result["trainers"]["rows"]
    assert list(rows) == list(speed_trainers.KINDS)
    assert rows["STD"]["passes_per_sample"] == 1
    assert rows["SAT"]["passes_per_sample"] == 21
    assert rows["IMA, straightforward"]["passes_per_sample"] == 1 + 20 + 1 + 10 + 1
    assert rows["IMA"]["passes_per_sample"] < 33
    # No step is without a forward and a backward pass, and an update.
    assert all(row["parts"][TRAINING_PASSES] > 0 for row in rows.values())
    assert rows["STD"]["parts"][ATTACK_PASSES] == 0
    assert rows["SAT"]["parts"][ATTACK_PASSES] > rows["SAT"]["parts"][BOOKKEEPING]
    attacks = {row["attack"]: row for row in result["attacks"]["rows"]}
    assert list(attacks) == [*chosen, speed_attacks.PLAIN_PGD]
    assert attacks["pgd"]["forward_passes"] <= attacks[speed_attacks.PLAIN_PGD]["forward_passes"] == 42
    assert attacks["square"]["backward_passes"] == 0
    page = (tmp_path / "speed_cpu.md").read_text()
    assert "Other processes ran beside it" in page
    for name in (*rows, *chosen):
        assert f"| {name} |" in page


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_without_its_one_difference_a_change_is_ima_as_it_is(ground, monkeypatch):
    """Momentum of 0 leaves each L2 step where it goes; a start that keeps the noise is no warm one."""
    inner = speed_savings.make
    monkeypatch.setattr(speed_savings, "make", lambda *args, **settings: inner(*args, **{**settings, **TINY}))
    monkeypatch.setattr(speed_savings, "MOMENTUM", 0.0)
    momentum, warm = "20 ascents with momentum", "start where an attack on the same patch ended"
    fewer = "10 ascents instead of 20"
    on_cuda = ("no CUDA graphs", "CUDA graphs of four sizes", "CUDA graphs of four sizes, compiled")
    chosen = {name: speed_savings.SAVINGS[name] for name in (momentum, warm, fewer, *on_cuda)}
    monkeypatch.setattr(speed_savings, "SAVINGS", chosen)
    found = speed_savings.measure_savings(ground, CPU, 1, 0, "")
    rows = {row["change"]: row for row in found["rows"]}
    assert list(rows) == ["IMA", momentum, warm, fewer]
    assert list(found["left_out"]) == list(on_cuda)
    page = speed_table._savings(found)
    for name in on_cuda:
        assert f"{name} (IMA's attack passes are no CUDA graphs here)" in page
    strength = ("loss", "distance", "margin")
    assert [rows["IMA"][key] for key in strength] == [1, 1, 1]
    assert [rows[momentum][key] for key in strength] == pytest.approx([1, 1, 1], abs=1e-4)
    assert rows[fewer]["passes_per_sample"] <= rows["IMA"]["passes_per_sample"]
    for other in (warm, fewer):
        assert [rows[other][key] for key in strength] != pytest.approx([1, 1, 1], abs=1e-4)
    monkeypatch.setattr(speed_savings._WarmStart, "attack_before", lambda *_: None)
    monkeypatch.setattr(speed_savings, "SAVINGS", {warm: chosen[warm]})
    rows = {row["change"]: row for row in speed_savings.measure_savings(ground, CPU, 1, 0, "")["rows"]}
    assert [rows[warm][key] for key in strength] == pytest.approx([1, 1, 1], abs=1e-4)


def summed_sample_by_sample(gradients: list[torch.Tensor], chosen: list[list[int]]) -> list[torch.Tensor]:
    """MI-FGSM's sums as one writes them down."""
    sums: dict[int, torch.Tensor] = {}
    answers = []
    for gradient, index in zip(gradients, chosen, strict=True):
        unit = gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
        for row, sample in enumerate(index):
            sums[sample] = unit[row] = unit[row] + speed_savings.MOMENTUM * sums.get(sample, 0 * unit[row])
        answers.append(unit)
    return answers


@given(st.lists(st.lists(st.integers(0, 5), min_size=1, unique=True), min_size=1, max_size=5), st.integers(0, 99))
def test_momentum_is_each_samples_own_whichever_are_still_attacked(chosen, seed):
    generator = seeded(seed)
    gradients = [torch.randn((len(index), 2, 3, 3), generator=generator, dtype=torch.float64) for index in chosen]
    answers = iter([Ascent(torch.zeros(len(one)), one, torch.zeros(len(one))) for one in gradients])
    asked = SimpleNamespace(target=torch.zeros(6, 1, 3, 3), ascent=lambda *_, **__: next(answers))
    oracle = speed_savings._Momentum(asked)
    found = [oracle.ascent(torch.zeros(len(i), 2, 3, 3), torch.tensor(i)).gradient for i in chosen]
    for one, other in zip(found, summed_sample_by_sample(gradients, chosen), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


ONE_BY_ONE = "each crossing bisected in passes of its own"
WEIGHTS = "gradients for the weights in attack passes, too"


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_a_step_without_one_of_imas_savings_does_the_same_work_at_greater_cost(ground, monkeypatch):
    one_by_one, weights = (
        "each crossing bisected in passes of its own",
        "gradients for the weights in attack passes, too",
    )
    chosen = {name: speed_savings.SAVINGS[name] for name in (one_by_one, weights)}
    inner = speed_savings.make
    monkeypatch.setattr(speed_savings, "make", lambda *args, **settings: inner(*args, **{**settings, **TINY}))
    monkeypatch.setattr(speed_savings, "SAVINGS", chosen)
    rows = speed_savings.measure_savings(ground, CPU, 2, 0, "")["rows"]
    assert [row["change"] for row in rows] == ["IMA", ONE_BY_ONE, WEIGHTS]
    assert len({row["passes_per_sample"] for row in rows}) == 1
    for row in rows:
        assert [row[key] for key in ("loss", "distance", "margin")] == pytest.approx([1, 1, 1], abs=1e-4)


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_a_step_without_one_of_imas_savings_asks_what_its_name_says(ground, monkeypatch):
    gradients, dice = torch.autograd.grad, Oracle.dice
    # So far that samples cross in the first batches.
    monkeypatch.setattr(speed_trainers, "MARGIN", 12.0)
    asked: dict[str, list[int]] = {"gradients": [], "dice": []}

    def noted_gradients(outputs: Any, inputs: Any, **options: Any) -> Any:
        asked["gradients"].append(len(inputs) if isinstance(inputs, list) else 1)
        return gradients(outputs, inputs, **options)

    def noted_dice(self: Oracle, images: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        asked["dice"].append(len(index))
        return dice(self, images, index)

    monkeypatch.setattr(torch.autograd, "grad", noted_gradients)
    monkeypatch.setattr(Oracle, "dice", noted_dice)
    with speed_trainers.at_work(ground):
        trainers = {
            name: speed_trainers.make(speed_trainers.KINDS["IMA"], ground, CPU, **TINY)
            for name in ("IMA", ONE_BY_ONE, WEIGHTS)
        }
        for name in (ONE_BY_ONE, WEIGHTS):
            change = speed_savings.SAVINGS[name].change
            assert change is not None
            change(trainers[name])
        loader = speed_trainers.make(speed_trainers.KINDS["TE"], ground, CPU, **TINY).dataloader_train
        for batch in itertools.islice(loader, 20):
            crossed = int(speed_trainers.step_of(trainers["IMA"], batch, 0)[1]["crossed"])
            if crossed > 1:
                break
        found = {}
        for name, trainer in trainers.items():
            asked.update(gradients=[], dice=[])
            speed_trainers.step_of(trainer, batch, 0)
            found[name] = asked["gradients"], asked["dice"]
            # The update needs gradients after the attack, and gets them.
            assert all(weight.requires_grad for weight in trainer.bare_network.parameters())
        tensors, halvings = len(list(trainer.bare_network.parameters())), trainer.settings.bisections
    assert crossed > 1
    assert found["IMA"][1][-halvings:] == [crossed] * halvings
    assert found[ONE_BY_ONE][1][-halvings * crossed :] == [1] * halvings * crossed
    assert set(found["IMA"][0]) == {1}
    assert found[WEIGHTS][0] == [1 + tensors] * len(found["IMA"][0])


NO_HEADS = "no deep supervision heads in passes that only give the Dice"
FULL_ONLY = "attack passes climb the loss of the full resolution alone"
HALVED = "10 ascents instead of 20, steps halved on the way"


def test_long_steps_come_first_and_are_halved_twice():
    assert [speed_savings.halved(step, 10) for step in range(10)] == [2.0] * 4 + [1.0] * 3 + [0.5] * 3
    assert [speed_savings.halved(step, 2) for step in range(2)] == [2.0, 1.0]


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_halved_steps_are_steps_of_their_length(ground, monkeypatch):
    """And where none is longer or shorter, the attack is that of the fewer ascents."""
    fewer = "10 ascents instead of 20"
    monkeypatch.setattr(speed_savings, "SAVINGS", {name: speed_savings.SAVINGS[name] for name in (fewer, HALVED)})
    inner = speed_savings.make
    monkeypatch.setattr(speed_savings, "make", lambda *args, **settings: inner(*args, **{**settings, **TINY}))
    asked: list[float] = []
    ascend = speed_savings.ascend

    def noted(*arguments: Any) -> torch.Tensor:
        asked.append(arguments[-1])
        return ascend(*arguments)

    monkeypatch.setattr(speed_savings, "ascend", noted)
    rows = {row["change"]: row for row in speed_savings.measure_savings(ground, CPU, 1, 0, "")["rows"]}
    strength = ("loss", "distance", "margin")
    assert [rows[HALVED][key] for key in strength] != pytest.approx([rows[fewer][key] for key in strength], abs=1e-4)
    # 4 / K is 0.4; each attack begins anew.
    assert asked[:4] == pytest.approx([0.8] * 4)
    assert set(asked) == {0.8, 0.4, 0.2}
    monkeypatch.setattr(speed_savings, "HALVED", (1.0, 1.0, 1.0))
    rows = {row["change"]: row for row in speed_savings.measure_savings(ground, CPU, 1, 0, "")["rows"]}
    assert [rows[HALVED][key] for key in strength] == pytest.approx([rows[fewer][key] for key in strength], abs=1e-4)


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_without_heads_an_attack_asks_for_the_full_resolution_alone(ground):
    heads: dict[str, int] = {}
    with speed_trainers.at_work(ground):
        for name in ("IMA", NO_HEADS, FULL_ONLY):
            single = {**TINY, "attack_precision": "single"}
            trainer = speed_trainers.make(speed_trainers.KINDS["IMA"], ground, CPU, **single)
            change = speed_savings.SAVINGS[name].change if name != "IMA" else None
            if change is not None:
                change(trainer)
            batch = next(trainer.dataloader_train)
            images, targets = batch["data"], list(batch["target"])
            network, index = trainer.bare_network, torch.arange(len(images))
            calls: list[str] = []
            note = partial(lambda noted, *_: noted.append("a head"), calls)
            hooks = [head.register_forward_hook(note) for head in network.decoder.seg_layers]
            with undisturbed(network):
                oracle = trainer.attack_oracle(targets, trainer.sample_loss, trainer.criterion)
                found = oracle.ascent(images, index)
                heads[f"{name}, ascent"] = len(calls)
                assert torch.equal(oracle.dice(images, index), found.dice)
                heads[f"{name}, dice"] = len(calls) - heads[f"{name}, ascent"]
                assert network.decoder.deep_supervision
                clean = images.clone().requires_grad_(True)
                outputs = network(clean)
                outputs = outputs[0] if name == FULL_ONLY else outputs
                (gradient,) = torch.autograd.grad(trainer.sample_loss(outputs, targets).sum(), clean)
                torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-7)
            for hook in hooks:
                hook.remove()
    several = heads["IMA, ascent"]
    assert several > 1
    assert heads == {
        "IMA, ascent": several,
        "IMA, dice": several,
        f"{NO_HEADS}, ascent": several,
        f"{NO_HEADS}, dice": 1,
        f"{FULL_ONLY}, ascent": 1,
        f"{FULL_ONLY}, dice": 1,
    }


class Noting(torch.nn.Module):
    """In place of a compiled network: notes for how many images it answers."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.asked: list[int] = []

    def forward(self, images: torch.Tensor) -> Any:
        self.asked.append(len(images))
        return self.inner(images)


@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_changes_to_cuda_graphs_are_what_their_names_say(ground, monkeypatch):
    compiled: list[Noting] = []
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled.append(Noting(network)) or compiled[-1])
    with speed_trainers.at_work(ground):
        trainer = speed_trainers.make(speed_savings.CompiledIMA, ground, CPU, **SHORT)
        batch = next(trainer.dataloader_train)
        trainer._graphs = RecordingGraphs()
        assert speed_savings._has_no_graphs(trainer) is None
        assert speed_savings._not_captured(trainer, batch) is None
        # Each size once for the gradient and once for the Dice, and what the step before them asked.
        (network,) = compiled
        assert network.asked[-6:] == [1, 1, 3, 3, 4, 4]
        trainer._graphs.refused = "no kernel"
        assert speed_savings._not_captured(trainer, batch) == speed_savings._has_no_graphs(trainer) == "no kernel"
        monkeypatch.setattr(trainer._graphs, "ask", lambda *_: raise_(RuntimeError("no\n compiler")))
        assert speed_savings._not_captured(trainer, batch) == "no compiler"
    trainer._graphs = CudaGraphs(366, 12)
    speed_savings.SAVINGS["CUDA graphs of four sizes, compiled"].change(trainer)
    assert trainer._graphs.sizes == CudaGraphs(trainer.batch_size, 4).sizes
    speed_savings.SAVINGS["no CUDA graphs"].change(trainer)
    assert trainer._graphs is None


def raise_(error: Exception) -> None:
    raise error


@needs_gpu
@pytest.mark.parametrize("configuration", ["2d_tiny"])
def test_changes_to_cuda_graphs_are_measured_on_a_gpu(ground, monkeypatch):
    inner = speed_savings.make
    monkeypatch.setattr(speed_savings, "make", lambda *args, **settings: inner(*args, **{**settings, **TINY}))
    chosen = {name: saving for name, saving in speed_savings.SAVINGS.items() if "CUDA graphs" in name}
    monkeypatch.setattr(speed_savings, "SAVINGS", chosen)
    found = speed_savings.measure_savings(ground, torch.device("cuda"), 1, 0, "")
    assert found["left_out"] == {}
    assert [row["change"] for row in found["rows"]] == ["IMA", *chosen]
    for row in found["rows"]:
        assert [row[key] for key in ("loss", "distance", "margin")] == pytest.approx([1, 1, 1], abs=0.05)


@pytest.mark.parametrize(("device", "cores", "workers"), [("cuda", 16, 15), ("cuda", 1, 1), ("cpu", 16, 1)])
def test_what_is_trained_on_a_gpu_is_augmented_on_all_cores(device, cores, workers, tmp_path, monkeypatch):
    given_workers: list[int] = []

    def pipeline(output: Path, plans: str, network: object, device: str, workers: int = 1, **_: object) -> None:
        given_workers.append(workers)
        raise UserError("that will do")

    monkeypatch.setattr(speed_models, "available_cores", lambda: cores)
    monkeypatch.setattr(speed_models, "Pipeline", pipeline)
    with pytest.raises(UserError, match="that will do"):
        speed_models.find_ground("3d", None, None, tmp_path, device)
    assert given_workers == [workers]


def test_the_first_straightforward_pgd_is_not_timed(monkeypatch):
    """It is slower than all others, and would stand beside the first attack."""
    problem = make_problem("2d classes", 0, 4)
    threat = ThreatModel("l2", 2.0, float(problem.images.min()), float(problem.images.max()))
    monkeypatch.setattr(
        speed_attacks, "prepared",
        lambda *_: (problem.network, problem.images, problem.targets, lambda kind: kind(threat, problem.criterion)),
    )  # fmt: skip
    monkeypatch.setattr(speed_attacks, "disagreement", lambda *_: 0.0)
    monkeypatch.setattr(speed_attacks, "run_attack", lambda *_: {"seconds": 6.0})
    runs: list[int] = []
    monkeypatch.setattr(speed_attacks, "run_plain", lambda *_: runs.append(len(runs)))

    def seconds_of(call: Any, _: object) -> float:
        call()
        return 100.0 if runs[-1] == 0 else float(runs[-1])

    monkeypatch.setattr(speed_attacks, "seconds_of", seconds_of)
    pipeline = SimpleNamespace(folders={})
    models: Any = {"stock": (pipeline, None)}
    rows = speed_attacks.measure_attacks(models, ["pgd", "square"], "5", 4, torch.device("cpu"))
    # Beside them 1 and 2, then 2 and 3.
    assert [row["ratio"] for row in rows] == [4.0, 2.4, 1.0]
    assert rows[-1]["seconds_per_sample"] == 2.0 / 4


def test_an_unknown_attack_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"no attack 'gpd'.*bpgd"):
        speed_attacks.known(["gpd"])
