"""``nnunet_ima evaluate --end-to-end``: whole cases attacked through nnU-Net's sliding window, on tiny models."""

from __future__ import annotations

import csv
import json
import multiprocessing
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunet_project import quiet, read
from test_evaluate import untrained_model
from test_sliding_window import regions, with_patch

from nnunet_ima.attacks.oracle import undisturbed
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.case_network import CaseNetwork
from nnunet_ima.evaluation.cases import Case, Sample, ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.end_to_end import (
    CARRIED_OVER,
    OWN,
    UNPERTURBED,
    Carried,
    EndToEndAttack,
    to_the_edge,
    whole_case_threat,
)
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.outcomes import Condition, EndToEndScore, Outcome
from nnunet_ima.evaluation.protocols import Protocol, parse_level
from nnunet_ima.evaluation.records import Records, part_folders
from nnunet_ima.evaluation.run import Evaluation
from nnunet_ima.evaluation.sliding_window import SlidingWindow
from nnunet_ima.evaluation.trust import check

CPU = torch.device("cpu")
TABLES = ("samples.csv", "cases.csv", "end_to_end.csv", "table.md")
# Two cases of few slices; of the attacks one draws, one climbs.
WAY = ("--levels", "8", "--attacks", "white-noise:draws=1", "apgd:steps=2", "-device", "cpu")


@pytest.fixture(autouse=True)
def _one_core(monkeypatch):
    monkeypatch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)


def evaluate(model: Path, output: Path, *more: str, status: int = 0) -> Path:
    with quiet():
        assert main(["evaluate", "-m", str(model), "-o", str(output), *more]) == status
    return output


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", "-device", "cpu", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.splitlines()[-1]


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / name).open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def tables(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in TABLES]


@pytest.fixture(scope="module")
def whole(project, std_2d, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        return evaluate(std_2d, tmp_path_factory.mktemp("whole") / "run", *WAY, "--end-to-end")


@pytest.fixture(scope="module")
def whole_3d(project, std_3d, tmp_path_factory) -> Path:
    way = ("--levels", "8", "--attacks", "pgd:steps=1", "-device", "cpu", "--max-samples", "14")
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        return evaluate(std_3d, tmp_path_factory.mktemp("whole_3d") / "run", *way, "--end-to-end")


# ---- the case as one image of one network


@pytest.fixture(params=["2d", "2d padded", "2d overlapping", "2d regions", "3d overlapping", "3d padded"])
def model(request, project, results, nnunet_finds_our_trainers) -> TrainedModel:
    dimensions, _, kind = request.param.partition(" ")
    folder = untrained_model(project, regions) if kind == "regions" else request.getfixturevalue(f"std_{dimensions}")
    loaded = load_model(folder, 0, "checkpoint_final.pth", CPU)
    patches = {
        "2d overlapping": [16, 24],
        "2d padded": [64, 72],
        "3d overlapping": [16, 16, 24],
        "3d padded": [40, 32, 24],
    }
    return with_patch(loaded, patches[request.param]) if request.param in patches else loaded


def a_case(model: TrainedModel, tiles: int = 2) -> tuple[Case, list[Sample]]:
    cases = ValidationCases(model)
    return cases.load(cases.names[0]), list(cases.samples([cases.names[0]]))[:tiles]


def unpadded(case: Case, volume: torch.Tensor) -> torch.Tensor:
    z, y, x = case.unpad
    return volume[None, :, z, y, x]


def inside(case: Case, samples: list[Sample]) -> torch.Tensor:
    """Voxels of the samples, (1, 1, z, y, x)."""
    where = torch.zeros_like(case.fixed[:1])
    for sample in samples:
        where[(slice(None), *sample.place)] = True
    return unpadded(case, where & ~case.fixed[:1])


@pytest.mark.parametrize("mirroring", [False, True])
def test_its_logits_are_those_of_the_sliding_window_wherever_an_attack_may_be(model, mirroring):
    case, samples = a_case(model)
    window = SlidingWindow(model, CPU, 3, mirroring)
    network = CaseNetwork(window, case, case.image, [sample.place for sample in samples])
    noise = torch.randn(unpadded(case, case.image).shape, generator=torch.Generator().manual_seed(0))
    noise = noise * inside(case, samples)
    volume = case.image.clone()
    z, y, x = case.unpad
    volume[:, z, y, x] += noise[0]
    with torch.no_grad():
        found = network(unpadded(case, case.image) + noise)
        expected = unpadded(case, window(volume))
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
    assert len(network.windows) <= len(window.places(case.image.shape[1:]))
    # The windows hold every voxel that may change, and are no larger than the case.
    covered = torch.zeros(found.shape[2:], dtype=torch.bool)
    for place in network.windows:
        assert all(0 <= axis.start < axis.stop <= size for axis, size in zip(place, found.shape[2:], strict=True))
        covered[place] = True
    assert bool(covered[inside(case, samples)[0, 0]].all())


@pytest.mark.parametrize("model", ["2d", "2d padded", "2d overlapping", "2d regions", "3d overlapping"], indirect=True)
def test_its_gradient_is_that_of_finite_differences(model):
    """Through overlaps, padding and mirror images, in double precision."""
    case, samples = a_case(model, tiles=1)
    model.network.double()
    window = SlidingWindow(model, CPU, 2, mirroring=True)
    network = CaseNetwork(window, case, case.image.double(), [sample.place for sample in samples])
    image, where = unpadded(case, case.image.double()), inside(case, samples)
    draws = torch.Generator().manual_seed(0)
    direction = torch.randn(image.shape, generator=draws, dtype=torch.double) * where
    with torch.no_grad():
        weights = torch.randn(network(image).shape, generator=draws, dtype=torch.double)

    def value(point: torch.Tensor) -> torch.Tensor:
        return (weights * torch.tanh(network(point))).sum()

    with undisturbed(network):
        point = image.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(value(point), point)
        with torch.no_grad():
            # So short that hardly an activation crosses its kink.
            difference = float(value(image + 1e-8 * direction) - value(image - 1e-8 * direction)) / 2e-8
    assert abs(difference) > 1e-3
    assert float((gradient * direction).sum()) == pytest.approx(difference, rel=1e-4)


def test_activations_are_computed_again_instead_of_kept(project, std_2d):
    model = load_model(std_2d, 0, "checkpoint_final.pth", CPU)
    case, samples = a_case(model, tiles=8)
    calls: list[int] = []
    network = CaseNetwork(SlidingWindow(model, CPU, 2, False), case, case.image, [s.place for s in samples])
    model.network.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    image = unpadded(case, case.image).requires_grad_(True)
    with undisturbed(network):
        output = network(image)
        assert sum(calls) == 8
        assert max(calls) == 2
        torch.autograd.grad(output.sum(), image)
    assert sum(calls) == 16


# ---- what an attacker may do


def carried_over(model: TrainedModel, level: str, norm: str, protocol: str = "sound") -> Carried:
    """A case after a weak attack on its samples."""
    cases = ValidationCases(model)
    case, samples = a_case(model, tiles=1000)
    case_level, way = CaseLevel(cases, CPU), Protocol(protocol, norm)
    from nnunet_ima.evaluation.batch import load_batch

    images, targets, threat = load_batch(cases, samples, way, parse_level(level, norm), CPU)
    attack = parse_attack("pgd:steps=2").make(threat=threat, criterion=DiceCriterion(labels=model.labels), chunk=4)
    tiles = attack(model.network, images, targets).images
    places = [sample.place for sample in samples]
    volume = way.clamp(case_level.merge(case, list(zip(places, tiles, strict=True))))
    clean = case_level.score(case, way.clamp(case.image))
    return Carried(case, places, volume, clean, case_level.score(case, volume))


def asked(model: TrainedModel, attack: str, norm: str, protocol: str = "sound", **more: Any) -> Evaluation:
    return Evaluation(
        model, Protocol(protocol, norm), [parse_attack(attack)], [], None, 8, 0, CPU,
        DiceCriterion(labels=model.labels), progress=False, **{"end_to_end": "window", **more},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "norm", "level", "protocol"),
    [
        ("2d padded", "l2", "6", "sound"),
        ("2d padded", "linf", "32/255", "paper"),
        ("2d overlapping", "l2", "6", "paper"),
        ("2d overlapping", "linf", "32/255", "sound"),
        ("3d overlapping", "l2", "6", "sound"),
        ("3d overlapping", "linf", "32/255", "paper"),
    ],
)
def test_nothing_outside_the_samples_changes_and_no_window_holds_more_than_it_may(
    request, project, std_2d, std_3d, norm, level, protocol, kind
):
    folder = std_2d if kind[:2] == "2d" else std_3d
    patch = {"2d padded": [64, 72], "2d overlapping": [16, 24], "3d overlapping": [24, 16, 24]}[kind]
    model = with_patch(load_model(folder, 0, "checkpoint_final.pth", CPU), patch)
    carried = carried_over(model, level, norm, protocol)
    case, strength = carried.case, parse_level(level, norm)
    way = Protocol(protocol, norm)
    window = SlidingWindow(model, CPU, 4, False)
    network = CaseNetwork(window, case, way.clamp(case.image), carried.places)
    image, start = unpadded(case, case.image), unpadded(case, to_the_edge(way, carried.volume))
    threat = whole_case_threat(way, strength, carried, network.windows, image, start)
    assert bool(threat.contains(start, image))
    criterion = DiceCriterion(labels=model.labels)
    attack = parse_attack("apgd:steps=2").make(threat=threat, criterion=criterion, start=start)
    found = attack(network, image, unpadded(case, case.target)).images
    change = found - way.clamp(image)
    assert bool(change.any())
    assert not bool(change[~inside(case, [Sample("", 0, place) for place in carried.places])].any())
    low, high = (0.0, 1.0) if protocol == "paper" else (float(case.low[0]), float(case.high[0]))
    assert float(found.min()) >= low - 1e-5
    assert float(found.max()) <= high + 1e-5
    if protocol == "paper":
        return
    if norm == "linf":
        assert float(change.abs().max()) <= strength.value * (high - low) * 1.0001
        return
    already = (start - image)[0]
    for z, y, x in network.windows:
        most = max(strength.value, float(already[:, z, y, x].norm()))
        assert float(change[0, :, z, y, x].norm()) <= most * 1.0001
    if kind == "2d padded":  # slices: each has the ball of its sample, and no more
        assert float(threat.distance(found, image)) <= strength.value * 1.0001


@pytest.mark.parametrize("kind", ["2d", pytest.param("3d", marks=pytest.mark.slow)])
def test_an_attack_that_knows_of_the_mirroring_finds_what_nnunet_scores(request, project, kind):
    """What it counts on is what nnU-Net's own predictor and scorer say of the volume it found."""
    model = load_model(request.getfixturevalue(f"std_{kind}"), 0, "checkpoint_final.pth", CPU)
    cases = ValidationCases(model)
    carried = carried_over(model, "6", "l2")
    case, way = carried.case, Protocol("sound", "l2")
    network = CaseNetwork(SlidingWindow(model, CPU, 4, True), case, case.image, carried.places)
    image, start = unpadded(case, case.image), unpadded(case, carried.volume)
    threat = whole_case_threat(way, parse_level("6", "l2"), carried, network.windows, image, start)
    attack = parse_attack("apgd:steps=3").make(threat=threat, criterion=DiceCriterion(labels=model.labels), start=start)
    found = attack(network, image, unpadded(case, case.target))
    volume = case.image.clone()
    z, y, x = case.unpad
    volume[:, z, y, x] = found.images[0]
    dice = CaseLevel(cases, CPU).score(case, volume).dice
    assert float(found.dice) == pytest.approx(float(np.mean(dice)), abs=0.003)
    assert float(found.dice) < float(np.mean(carried.score.dice)) < float(np.mean(carried.unperturbed.dice))


@pytest.mark.parametrize("lowest", [OWN, CARRIED_OVER, UNPERTURBED])
def test_of_all_that_is_known_of_a_case_the_lowest_dice_is_reported(project, std_2d, monkeypatch, lowest):
    model = load_model(std_2d, 0, "checkpoint_final.pth", CPU)
    carried = carried_over(model, "6", "l2")
    case_level = CaseLevel(ValidationCases(model), CPU)
    low = replace(carried.score, dice=(0.0, 0.0))
    if lowest == UNPERTURBED:
        carried = replace(carried, unperturbed=low)
    elif lowest == CARRIED_OVER:
        carried = replace(carried, score=low)
    attack = EndToEndAttack(asked(model, "pgd:steps=1", "l2"), case_level)
    found = attack(parse_attack("pgd:steps=1"), parse_level("6", "l2"), carried, 4)
    assert found.found_by == lowest
    assert np.mean(found.score.dice) <= min(np.mean(carried.score.dice), np.mean(carried.unperturbed.dice))


def test_a_case_without_foreground_stays_as_it_is(project, std_2d):
    model = load_model(std_2d, 0, "checkpoint_final.pth", CPU)
    carried = carried_over(model, "6", "l2")
    empty = Carried(carried.case, [], carried.case.image, carried.unperturbed, carried.unperturbed)
    attack = EndToEndAttack(asked(model, "pgd:steps=1", "l2"), CaseLevel(ValidationCases(model), CPU))
    found = attack(parse_attack("pgd:steps=1"), parse_level("6", "l2"), empty, 4)
    assert (found.score, found.found_by, found.forward_passes) == (carried.unperturbed, UNPERTURBED, 0)


# ---- what is written


@pytest.mark.parametrize("which", ["whole", pytest.param("whole_3d", marks=pytest.mark.slow)])
def test_no_case_keeps_more_than_under_what_is_carried_over(which, request):
    folder = request.getfixturevalue(which)
    carried = {(r["attack"], r["level"], r["case"]): r for r in rows(folder, "cases.csv")}
    found = rows(folder, "end_to_end.csv")
    assert {(r["attack"], r["level"], r["case"]) for r in found} == {key for key in carried if key[0] != "clean"}
    won = 0
    for row in found:
        key = row["attack"], row["level"], row["case"]
        own, other, clean = (
            np.mean([float(one[f"dice_{label}"]) for label in (1, 2)])
            for one in (row, carried[key], carried["clean", "0", row["case"]])
        )
        assert own <= other + 1e-6
        assert own <= clean + 1e-6
        assert (row["found_by"] == OWN) == (own < min(other, clean) - 1e-9)
        won += row["found_by"] == OWN
        assert float(row["norm"]) <= max(float(row["level"]), float(row["norm_carried_over"])) * 1.0001
        assert int(row["forward_passes"]) > 0
    assert won > 0


@pytest.mark.parametrize("which", ["whole", pytest.param("whole_3d", marks=pytest.mark.slow)])
def test_the_figures_are_those_of_the_tables(which, request):
    """Slowly and obviously: what survives is (C₀ − C) / (S₀ − S)."""
    folder = request.getfixturevalue(which)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    samples, cases, found = (rows(folder, name) for name in ("samples.csv", "cases.csv", "end_to_end.csv"))

    def mean(table: list[dict[str, str]], attack: str, level: str) -> float:
        mine = [row for row in table if (row["attack"], row["level"]) == (attack, level)]
        return float(np.mean([[float(row[f"dice_{label}"]) for label in (1, 2)] for row in mine]))

    def of_samples(attack: str, level: str) -> float:
        names = sorted({row["case"] for row in found})
        dice = []
        for name in names:
            mine = [r for r in samples if (r["attack"], r["level"], r["case"]) == (attack, level, name)]
            for label in (1, 2):
                tp, fp, fn = (sum(int(row[f"{kind}_{label}"]) for row in mine) for kind in ("tp", "fp", "fn"))
                dice.append(2 * tp / (2 * tp + fp + fn))
        return float(np.mean(dice))

    told = 0
    for result in summary["results"]:
        key, figures = (result["attack"], result["level"]), result["end_to_end"]
        assert figures["case_dice"] == pytest.approx(mean(found, *key), abs=1e-6)
        assert figures["samples_dice"] == pytest.approx(of_samples(*key))
        effect = of_samples("clean", "0") - of_samples(*key)
        for name, table in (("carried_over", cases), ("end_to_end", found)):
            if effect < 0.01:
                assert figures[f"survives_{name}"] is None
                continue
            lost = mean(cases, "clean", "0") - mean(table, *key)
            assert figures[f"survives_{name}"] == pytest.approx(lost / effect, abs=1e-3)
            told += 1
        assert sum(figures["found_by"].values()) == figures["n_cases"] == len({row["case"] for row in found})
        assert figures["surface_dice"] is not None
        # Of which structures are these: what is in the reference or was found, and what is in both.
        mine = [row for row in found if (row["attack"], row["level"]) == key]
        for name, column in (("n_hd95", "hd95_mm_"), ("n_structures", "surface_dice_1mm_")):
            cells = [row[one] for row in mine for one in row if one.startswith(column)]
            assert figures[name] == sum(cell != "" for cell in cells)
        assert 0 < figures["n_hd95"] <= figures["n_structures"]
        told_of = f"({figures['n_hd95']} of {figures['n_structures']})"
        assert told_of in (folder / "table.md").read_text(encoding="utf-8")
    assert told > 0
    assert not summary["end_to_end"]["mirroring_known_to_the_attack"]
    assert summary["end_to_end"]["mirrored_axes"]
    names = {item["name"] for item in summary["trust"]}
    assert "end_to_end_is_no_weaker" in names


def test_the_table_shows_both_beside_each_other(whole):
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    lines = (whole / "table.md").read_text(encoding="utf-8").splitlines()
    assert any("not through its mirroring" in line for line in lines)
    table = [line for line in lines if line.startswith("|") and line.count("|") == 10]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2][:2] == ["none", "0"]
    for row, result in zip(cells[3:], summary["results"], strict=True):
        figures = result["end_to_end"]
        shares = (figures["samples_dice"], result["case_dice"], figures["case_dice"])
        assert row[:5] == [result["attack"], result["level"], *(f"{100 * share:.1f}" for share in shares)]
        shown = figures["survives_end_to_end"]
        assert row[6] == ("–" if shown is None else f"{100 * shown:.1f}")


def test_what_the_sample_level_says_does_not_depend_on_it(whole, std_2d, tmp_path):
    plain = evaluate(std_2d, tmp_path / "plain", *WAY)
    assert not (plain / "end_to_end.csv").exists()
    for name in ("samples.csv", "cases.csv"):
        assert (plain / name).read_bytes() == (whole / name).read_bytes()
    assert "end_to_end" not in read(plain / "summary.json")
    assert "end to end" not in read(plain / "run.json")["identity"]


def test_under_the_paper_protocol_the_clamp_alone_is_what_counts_as_unperturbed(std_2d, tmp_path):
    folder = evaluate(
        std_2d, tmp_path / "run", "--protocol", "paper", "--max-samples", "18", "--levels", "20", "--attacks",
        "apgd:steps=4", "-device", "cpu", "--end-to-end",
    )  # fmt: skip
    summary = read(folder / "summary.json")
    (result,) = summary["results"]
    figures = result["end_to_end"]
    assert figures["samples_dice_unperturbed"] < 0.99 * summary["clean"]["tvdi"]
    assert figures["survives_carried_over"] == pytest.approx(
        (summary["clamp_only"]["case_dice"] - result["case_dice"])
        / (figures["samples_dice_unperturbed"] - figures["samples_dice"])
    )
    assert figures["case_dice"] <= result["case_dice"]


def test_linf_and_regions_go_through_too(project, results, nnunet_finds_our_trainers, tmp_path):
    folder = evaluate(
        untrained_model(project, regions), tmp_path / "run", "--norm", "linf", "--max-samples", "18", "--levels",
        "8/255", "--attacks", "apgd:steps=2", "-device", "cpu", "--end-to-end-mirroring",
    )  # fmt: skip
    summary = read(folder / "summary.json")
    assert summary["end_to_end"]["mirroring_known_to_the_attack"]
    (result,) = summary["results"]
    assert result["end_to_end"]["case_dice"] <= result["case_dice"]
    (row,) = rows(folder, "end_to_end.csv")
    assert {"dice_1+2", "dice_1"} <= row.keys()


# ---- killed, split, continued


STOPS: dict[str, tuple[str, bool]] = {
    "before it is noted": ("add_end_to_end", False),
    "after it is noted": ("add_end_to_end", True),
    "before the case is": ("add_case", False),
}


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_at_a_case_it_goes_on_to_the_same_tables(std_2d, whole, tmp_path, monkeypatch, stop):
    output, (name, noted) = tmp_path / "run", STOPS[stop]
    original: Callable[..., None] = getattr(Records, name)

    def stopping(self: Records, condition: Condition, *more: Any) -> None:
        if condition.level is None:
            original(self, condition, *more)
            return
        if noted:
            original(self, condition, *more)
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(Records, name, stopping)
            evaluate(std_2d, output, *WAY, "--end-to-end", status=130)
    evaluate(std_2d, output, *WAY, "--end-to-end")
    assert tables(output) == tables(whole)
    assert not list(output.rglob("tiles"))


def test_what_is_noted_is_not_attacked_again_and_what_is_lost_is(std_2d, whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    for name in (*TABLES, "summary.json"):
        (output / name).unlink()
    with monkeypatch.context() as patch:
        patch.setattr("nnunet_ima.attacks.attack.Attack.__call__", None)
        evaluate(std_2d, output, *WAY, "--end-to-end")
    assert tables(output) == tables(whole)
    # Both lines about one case under one condition. Its tiles are gone, so they are made again.
    (part,) = part_folders(output)
    journal = part / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    lost = next(i for i, line in enumerate(lines) if b'"kind": "end to end"' in line)
    assert lines.count(lines[lost]) == 2
    journal.write_bytes(b"\n".join(line for line in lines if line != lines[lost]))
    evaluate(std_2d, output, *WAY, "--end-to-end")
    assert tables(output) == tables(whole)


def test_any_number_of_parts_and_any_batch_size_give_the_same_tables(std_2d, whole, tmp_path):
    output = tmp_path / "run"
    for part in (1, 0):
        evaluate(
            std_2d, output, *WAY, "--end-to-end", "-num_parts", "2", "-part_id", str(part), "--batch-size", "5"
        )  # fmt: skip
    with quiet():
        assert main(["evaluate", "--merge", "-o", str(output)]) == 0
    assert tables(output) == tables(whole)


def test_a_part_without_its_whole_cases_is_not_complete(std_2d, whole, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(whole, output)
    (part,) = part_folders(output)
    journal = part / "journal.jsonl"
    lines = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join(line for line in lines if b'"kind": "end to end"' not in line))
    assert "is not complete: 2 cases" in refused(capsys, "--merge", "-o", output)


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_same_tables(std_2d, whole, tmp_path):
    moments, output, done = random.Random(0), tmp_path / "run", 0
    started = time.monotonic()
    evaluate(std_2d, tmp_path / "timed", *WAY, "--end-to-end")
    took = time.monotonic() - started
    while done < 10:
        child = multiprocessing.get_context("fork").Process(
            target=evaluate, args=(std_2d, output, *WAY, "--end-to-end")
        )
        child.start()
        time.sleep(moments.uniform(0.02, took / 3))
        if child.is_alive():
            child.kill()
            done += 1
            child.join()
        else:
            child.join()
            assert tables(output) == tables(whole)
            shutil.rmtree(output)
    evaluate(std_2d, output, *WAY, "--end-to-end")
    assert tables(output) == tables(whole)
    assert not list(output.rglob("*.tmp"))


def test_when_memory_is_short_fewer_windows_go_at_once(std_2d, whole, tmp_path, monkeypatch):
    output = tmp_path / "run"
    original, tried = EndToEndAttack.__call__, []

    def hungry(
        self: EndToEndAttack, choice: Any, level: Any, carried: Carried, chunk: int, *more: Any
    ) -> EndToEndScore:
        tried.append(chunk)
        if chunk > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return original(self, choice, level, carried, chunk, *more)

    monkeypatch.setattr(EndToEndAttack, "__call__", hungry)
    evaluate(std_2d, output, *WAY, "--end-to-end")
    assert tried[0] > 3 >= tried[-1]
    assert "memory was not enough" in (output / "table.md").read_text(encoding="utf-8")
    found, expected = (
        {(r["attack"], r["level"], r["case"]): float(r["dice_1"]) for r in rows(folder, "end_to_end.csv")}
        for folder in (output, whole)
    )
    assert found == pytest.approx(expected, abs=0.05)


# ---- what is asked


def test_what_does_not_go_together_is_said(std_2d, whole, tmp_path, capsys):
    ask = ("-m", std_2d, "-o", tmp_path / "run", "--end-to-end")
    assert "--no-cases leaves out" in refused(capsys, *ask, "--no-cases")
    for attack in ("fab", "square", "bpgd", "spsa", "autoattack"):
        said = refused(capsys, *ask, "--attacks", attack)
        assert f"The attack {attack} cannot go through the sliding window" in said
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit):
        main(["evaluate", "--end-to-end", "--end-to-end-mirroring"])
    capsys.readouterr()
    said = refused(capsys, "-m", std_2d, "-o", whole, *WAY[:-2], "--end-to-end-mirroring")
    assert "end to end: window there, mirroring here" in said


def test_a_check_fails_when_a_case_keeps_more_or_noise_does_more():
    from nnunet_ima.evaluation.metrics import CaseScore

    def outcome(attack: str, dice: float, own: float) -> Outcome:
        scores = [CaseScore((value,), (1.0,), (1.0,)) for value in (dice, own)]
        level = None if attack == "clean" else parse_level("5", "l2")
        ours = {} if level is None else {"a": EndToEndScore(scores[1], OWN, 5.0, 5.0, 1, 1)}
        return Outcome(attack, level, [], {"a": scores[0]}, ours)

    def failed(*attacked: Outcome) -> set[str]:
        return {item["name"] for item in check(outcome("clean", 0.9, 0.9), attacked) if not item["passed"]}

    assert failed(outcome("white-noise", 0.8, 0.8), outcome("pgd", 0.5, 0.4)) == set()
    assert failed(outcome("pgd", 0.5, 0.6)) == {"end_to_end_is_no_weaker"}
    assert failed(outcome("pgd", 0.95, 0.92)) == {"end_to_end_is_no_weaker"}
    assert "end_to_end_gradients_beat_noise" in failed(outcome("white-noise", 0.5, 0.3), outcome("pgd", 0.5, 0.4))
