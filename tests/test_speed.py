"""The benchmark of speed: its straightforward references do the same work, and its figures mean what they say."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_project import PLANS
from tiny_networks import make_problem, seeded
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import speed
import speed_attacks
import speed_clock
import speed_memory
import speed_plain
import speed_trainers
from speed_clock import ATTACK_PASSES, BOOKKEEPING, PARTS, Clock
from speed_memory import RESET, peak, reset_peak
from speed_models import Ground
from speed_plain import Ball, PlainNetwork, plain_gen_adv, plain_pgd

from nnunet_ima.attacks import PGD
from nnunet_ima.attacks.bpgd import generate_adversarial
from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.pipeline import Method, Pipeline, SmallNetwork
from nnunet_ima.threat import ThreatModel

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
    return ProjectGround(pipeline, project.preprocessed, Method("stock", "", {}), configuration, checkpoint)


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
    assert all(set(row["parts"]) == set(PARTS) for row in rows.values())
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


def test_an_unknown_attack_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=r"no attack 'gpd'.*bpgd"):
        speed_attacks.known(["gpd"])
