"""``nnunet_ima evaluate`` on tiny models: each figure is what its label says, and the same figure every time."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from datetime import date, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from hypothesis import given
from hypothesis import strategies as st
from nnunet_project import make_trainer, quiet, read, write
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.inference.export_prediction import export_prediction_from_logits
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from tiny_networks import seeded

from nnunet_ima.attacks import AttackResult, AutoAttackResult
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import models
from nnunet_ima.evaluation.attack_choice import AttackChoice, parse_attack
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import Case, ValidationCases
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.finished import asked_for
from nnunet_ima.evaluation.metrics import CaseScore
from nnunet_ima.evaluation.models import TrainedModel, load_model
from nnunet_ima.evaluation.outcomes import CLEAN, Condition, SampleScore
from nnunet_ima.evaluation.protocols import Protocol, parse_level, read_levels
from nnunet_ima.evaluation.records import Records
from nnunet_ima.evaluation.run import Evaluation, Runner, Selection, select_samples
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD

TABLES = {"summary.json", "samples.csv", "cases.csv", "table.md", "dice_against_level.png", "worst_samples.png"}
FILES = {*TABLES, "run.json", "records"}
ENSEMBLE = "autoattack:version=fast"
ALONE = {"apgd-dice-ce": "apgd:loss=dice-ce,steps=50", "apgd-balanced-ce": "apgd:loss=balanced-ce,steps=50"}
CPU = torch.device("cpu")
Rows = list[dict[str, str]]


class Report:
    """What one evaluation wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.summary: dict[str, Any] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        self.samples, self.cases = (self._rows(name) for name in ("samples.csv", "cases.csv"))

    def _rows(self, name: str) -> Rows:
        with (self.folder / name).open(encoding="utf-8", newline="") as stream:
            return list(csv.DictReader(stream))

    def tables(self) -> tuple[bytes, bytes]:
        return (self.folder / "samples.csv").read_bytes(), (self.folder / "cases.csv").read_bytes()

    def conditions(self) -> Iterator[tuple[dict[str, Any], Rows, Rows]]:
        """Each condition's figures with its rows of both tables."""
        named = [("clean", "0", self.summary["clean"])]
        if "clamp_only" in self.summary:
            named.append(("clamp-only", "0", self.summary["clamp_only"]))
        named += [(result["attack"], result["level"], result) for result in self.summary["results"]]
        for attack, level, figures in named:
            mine = [
                [row for row in rows if (row["attack"], row["level"]) == (attack, level)]
                for rows in (self.samples, self.cases)
            ]
            yield figures, mine[0], mine[1]


def run(output: Path, *arguments: str) -> Report:
    with pytest.MonkeyPatch().context() as patch:
        patch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
        with quiet():
            assert main(["evaluate", "-device", "cpu", "-o", str(output), *arguments]) == 0
    return Report(output)


@pytest.fixture(scope="module")
def report(project, std_2d, tmp_path_factory) -> Report:
    """The complete evaluation of the 2D model, found as nnU-Net finds it."""
    return run(
        tmp_path_factory.mktemp("report"), "-d", "901", "-c", "2d_tiny", "-tr", "nnUNetTrainerSTD",
        "-p", "nnUNetPlansTiny", "--levels", "2", "8", "--attacks", "white-noise:draws=3", "apgd:steps=4",
    )  # fmt: skip


@pytest.fixture(scope="module")
def report_3d(std_3d, tmp_path_factory) -> Report:
    return run(
        tmp_path_factory.mktemp("report_3d"), "-m", str(std_3d), "--max-samples", "14", "--levels", "8",
        "--attacks", "pgd:steps=3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def paper(std_2d, tmp_path_factory) -> Report:
    return run(
        tmp_path_factory.mktemp("paper"), "-m", str(std_2d), "--protocol", "paper", "--max-samples", "18",
        "--levels", "1", "5", "--attacks", "white-noise:draws=3", "pgd:steps=3", "apgd:steps=3", "bpgd:steps=3",
    )  # fmt: skip


@pytest.fixture(scope="module")
def ensemble(std_2d, tmp_path_factory) -> Report:
    """With each of its members alone."""
    return run(
        tmp_path_factory.mktemp("ensemble"), "-m", str(std_2d), "--max-samples", "18", "--levels", "1", "10",
        "--attacks", ENSEMBLE, *ALONE.values(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(project, std_2d) -> TrainedModel:
    return load_model(std_2d, 0, "checkpoint_final.pth", CPU)


@pytest.fixture(scope="module")
def model_3d(project, std_3d) -> TrainedModel:
    return load_model(std_3d, 0, "checkpoint_final.pth", CPU)


# ---- what is written


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
def test_all_files_are_there_and_nothing_else(which, request):
    of_members = {"members.csv"} if which == "ensemble" else set()
    assert {file.name for file in request.getfixturevalue(which).folder.iterdir()} == FILES | of_members


def test_the_summary_has_every_field(report):
    summary = report.summary
    assert {"schema", "model", "protocol", "seed", "versions", "clean", "results"} <= summary.keys()
    assert {"name", "norm", "range", "unit"} <= summary["protocol"].keys()
    assert "clamp_only" not in summary
    assert {"nnunet_ima", "nnunet_ima's sources", "nnunetv2", "torch", "python"} <= summary["versions"].keys()
    assert {"sha256", "plans.json", "dataset.json"} <= summary["model"].keys()
    assert summary["training"]["num_iterations_per_epoch"] == 120
    assert {name: about["attack"] for name, about in summary["attacks"].items()} == {
        "white-noise:draws=3": "white-noise",
        "apgd:steps=4": "apgd",
    }
    assert summary["attacks"]["apgd:steps=4"]["loss"] == "dice-ce"
    assert abs(date.fromisoformat(summary["date"]) - date.today()) <= timedelta(days=1)
    figures = {"tvdi", "adi", "case_dice", "robust_share", "n_samples", "n_cases"}
    assert figures <= summary["clean"].keys()
    assert [(result["attack"], result["level"], result["epsilon"]) for result in summary["results"]] == [
        ("white-noise:draws=3", "2", 2.0), ("white-noise:draws=3", "8", 8.0),
        ("apgd:steps=4", "2", 2.0), ("apgd:steps=4", "8", 8.0),
    ]  # fmt: skip
    assert all(figures <= result.keys() for result in summary["results"])
    assert summary["model"]["trainer"] == "nnUNetTrainerSTD"
    assert summary["model"]["fold"] == 0
    assert summary["classes"] == ["anterior", "posterior"]
    assert summary["seed"] == 0
    assert not summary["trained_on_these_cases"]


def test_the_model_is_worth_attacking_and_the_attack_works(report):
    """Otherwise the tests below would state little."""
    clean, attacked = report.summary["clean"], report.summary["results"][-1]
    assert clean["tvdi"] > 0.5
    assert attacked["tvdi"] < clean["tvdi"] - 0.1


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
def test_the_figures_are_those_of_the_tables(which, request):
    """Slowly and obviously: Eq. 9 and 10 of the paper's earlier version, and nnU-Net's mean over cases."""
    for figures, samples, cases in request.getfixturevalue(which).conditions():
        assert figures["n_samples"] == len(samples) > 0
        assert figures["n_cases"] == len(cases) > 0
        per_class = []
        for label in (1, 2):
            tp, fp, fn = (sum(int(row[f"tvdi_{kind}_{label}"]) for row in samples) for kind in ("tp", "fp", "fn"))
            if tp + fp + fn:
                per_class.append(2 * tp / (2 * tp + fp + fn))
        assert figures["tvdi"] == pytest.approx(sum(per_class) / len(per_class))
        dice = [float(row["dice"]) for row in samples]
        assert figures["adi"] == pytest.approx(sum(dice) / len(dice), abs=1e-6)
        assert figures["robust_share"] == pytest.approx(sum(d > 0.6 for d in dice) / len(dice))
        means = []
        for label in (1, 2):
            values = [float(row[f"dice_{label}"]) for row in cases if row[f"dice_{label}"]]
            means.append(sum(values) / len(values))
        assert figures["case_dice"] == pytest.approx(sum(means) / 2, abs=1e-6)


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
def test_a_samples_dice_is_that_of_its_counts(which, request):
    for row in request.getfixturevalue(which).samples:
        values = []
        for label in (1, 2):
            tp, fp, fn = (int(row[f"{kind}_{label}"]) for kind in ("tp", "fp", "fn"))
            if tp + fp + fn:
                values.append(2 * tp / (2 * tp + fp + fn))
        assert float(row["dice"]) == pytest.approx(sum(values) / len(values), abs=1e-6)


def test_the_table_shows_the_summary(report):
    lines = (report.folder / "table.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    expected = [("none (clean)", "0", report.summary["clean"])]
    expected += [(result["attack"], result["level"], result) for result in report.summary["results"]]
    for row, (attack, level, figures) in zip(rows, expected, strict=True):
        assert row[:2] == [attack, level]
        shares = [figures[key] for key in ("tvdi", "adi", "robust_share", "case_dice")]
        assert row[2:6] == [f"{100 * share:.1f}" for share in shares]


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
@pytest.mark.parametrize("picture", ["dice_against_level.png", "worst_samples.png"])
def test_the_pictures_show_something(which, picture, request):
    pixels = plt.imread(request.getfixturevalue(which).folder / picture)
    assert min(pixels.shape[:2]) > 300
    assert len(np.unique(pixels[::5, ::5, :3].reshape(-1, 3), axis=0)) > 20


# ---- the same numbers every time


VARIANTS = (
    "--batch-size 1",
    "--batch-size 3",
    "--batch-size 64",
    "--batch-size 64 --seed 0",
    "--batch-size 64 --samples-seed 1",
    "--batch-size 3 --seed 1",
)


@pytest.fixture(scope="module")
def variants(std_2d, tmp_path_factory) -> dict[str, Report]:
    return {
        options: run(
            tmp_path_factory.mktemp("variant"), "-m", str(std_2d), "--max-samples", "20", "--levels", "6",
            "--attacks", "white-noise:draws=2", "apgd:steps=3", *options.split(),
        )
        for options in VARIANTS
    }  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS[1:4])
def test_no_number_depends_on_the_batch_size_or_the_run(variants, options):
    assert variants[options].tables() == variants[VARIANTS[0]].tables()


def test_another_seed_gives_other_noise(variants):
    noise = [
        [row["dice"] for row in variants[options].samples if row["attack"].startswith("white-noise")]
        for options in (VARIANTS[0], VARIANTS[-1])
    ]
    assert noise[0] != noise[1]


def test_another_seed_attacks_the_same_samples_unless_others_are_asked_for(variants):
    first, others, other_noise = (
        [(row["case"], row["tile"]) for row in variants[options].samples]
        for options in (VARIANTS[0], "--batch-size 64 --samples-seed 1", VARIANTS[-1])
    )
    assert first == other_noise
    assert first != others


# ---- protocols and budgets


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
def test_no_sample_gains_from_an_attack(which, request):
    report = request.getfixturevalue(which)
    unperturbed = "clamp-only" if "clamp_only" in report.summary else "clean"
    before = {(r["case"], r["tile"]): float(r["dice"]) for r in report.samples if r["attack"] == unperturbed}
    attacked = [row for row in report.samples if row["attack"] not in ("clean", "clamp-only")]
    assert attacked
    for row in attacked:
        assert float(row["dice"]) <= before[row["case"], row["tile"]] + 1e-6


@pytest.mark.parametrize("which", ["report", "report_3d", "paper", "ensemble"])
def test_no_perturbation_is_larger_than_its_level(which, request):
    for row in request.getfixturevalue(which).samples:
        allowed = 0.0 if row["attack"] in ("clean", "clamp-only") else float(row["level"])
        assert float(row["epsilon"]) == pytest.approx(allowed)
        assert float(row["norm"]) <= allowed * 1.0001


def test_the_paper_protocol_says_what_it_is_and_shows_the_clamp_alone(paper, report):
    assert paper.summary["protocol"]["name"] == "paper"
    assert "[0, 1]" in paper.summary["protocol"]["range"]
    assert paper.summary["clamp_only"]["n_samples"] == 18
    # The clamp harms on its own: that is why it is always shown.
    assert paper.summary["clamp_only"]["adi"] != pytest.approx(paper.summary["clean"]["adi"], abs=1e-3)
    assert "clamp" in (paper.folder / "table.md").read_text(encoding="utf-8")


def test_linf_levels_are_shares_of_each_cases_own_range(model, tmp_path):
    report = run(
        tmp_path, "-m", str(model.folder), "--norm", "linf", "--levels", "2/255", "8/255", "--no-cases",
        "--max-samples", "20", "--attacks", "pgd:steps=2",
    )  # fmt: skip
    cases = ValidationCases(model)
    spreads = {name: float(cases.load(name).high[0] - cases.load(name).low[0]) for name in cases.names}
    assert len(set(spreads.values())) == 2
    attacked = [row for row in report.samples if row["attack"] != "clean"]
    assert {row["case"] for row in attacked} == set(cases.names)
    for row in attacked:
        share = int(row["level"].partition("/")[0]) / 255
        assert float(row["epsilon"]) == pytest.approx(share * spreads[row["case"]], rel=1e-4)
        assert float(row["norm"]) <= float(row["epsilon"]) * 1.0001


def test_an_ensembles_tvdi_is_at_or_below_that_of_each_member_run_alone(ensemble):
    """Of its own choice, too; where the ensemble asked a member about every sample, by itself that found the same."""
    results = {(item["attack"], item["level"]): item for item in ensemble.summary["results"]}
    compared = 0
    for level in ("1", "10"):
        together = results[ENSEMBLE, level]
        assert together["tvdi"] <= together["tvdi_of_lowest_dice"]
        assert together["tvdi"] < ensemble.summary["clean"]["tvdi"]
        for name, attack in ALONE.items():
            part, alone = together["by_attack"][name], results[attack, level]
            assert together["tvdi"] <= part["tvdi"]
            if part["attacked_samples"] == together["by_attack"]["apgd-dice-ce"]["attacked_samples"]:
                assert part["tvdi"] == alone["tvdi"]
                compared += name == "apgd-balanced-ce"
    assert compared


def rows_of_members(ensemble: Report) -> tuple[Rows, dict[tuple[str, ...], dict[str, str]]]:
    """Those of members.csv; and those of samples.csv by attack, level, case and tile."""
    with (ensemble.folder / "members.csv").open(encoding="utf-8", newline="") as stream:
        of_members = list(csv.DictReader(stream))
    names = ("attack", "level", "case", "tile")
    return of_members, {tuple(row[name] for name in names): row for row in ensemble.samples}


def test_members_points_are_those_of_their_own_images(ensemble):
    """A member run alone ends with the same counts: they are not the ensemble's, and not another member's."""
    of_members, samples = rows_of_members(ensemble)
    counts = [f"{kind}_{label}" for label in (1, 2) for kind in ("tp", "fp", "fn")]
    different = 0
    for row in of_members:
        where = row["level"], row["case"], row["tile"]
        own, kept = samples[(ALONE[row["member"]], *where)], samples[(ENSEMBLE, *where)]
        assert [row[name] for name in ("dice", *counts)] == [own[name] for name in ("dice", *counts)]
        different += [row[name] for name in counts] != [kept[name] for name in counts]
        assert float(kept["dice"]) <= float(row["dice"])
    assert len(of_members) > 20
    assert different > 5


class Scripted:
    """Stands for an attack that ends with given images (n, C, *patch) of its members; ``None`` where it did not ask."""

    def __init__(self, members: dict[str, list[torch.Tensor | None]]) -> None:
        self.members = members

    def make(self, **_: object) -> Callable[..., AttackResult]:
        return self.result

    def result(self, _: object, images: torch.Tensor, __: object) -> AttackResult:
        none = torch.zeros(len(images), dtype=torch.long)
        found = {}
        for name, own in self.members.items():
            dice = torch.tensor([math.nan if one is None else 0.5 for one in own])
            ends = torch.stack([image if one is None else one for image, one in zip(images, own, strict=True)])
            found[name] = AttackResult(ends, dice, dice, none, none)
        last = list(found.values())[-1]
        if len(found) == 1:
            return last
        return AutoAttackResult(last.images, last.dice, last.dice, none, none, found)


def test_each_members_counts_are_of_its_own_image_of_that_sample(model, tmp_path):
    """Whichever samples a member was not asked about; against the same images as the result of a single attack."""
    cases = ValidationCases(model)
    samples = select_samples(cases, 12, 0, progress=False).samples[:9]
    images = torch.stack([cases.patch(cases.load(s.case).image, s.place) for s in samples])
    noisy = [images + size * torch.randn(images.shape, generator=seeded(7)) for size in (0.3, 0.6)]
    members = {
        "first": [None if i in (2, 8) else noisy[0][i] for i in range(9)],
        "second": [None if i in (0, 3, 4) else noisy[1][i] for i in range(9)],
        "third": [None] * 9,
    }
    asked = evaluation(model, Protocol("sound", "l2"), "pgd")
    clean, attacked = Condition(CLEAN, None), Condition("scripted", parse_level("50", "l2"))
    records = Records(tmp_path, [clean, attacked], "")
    runner = Runner(asked, cases, Selection(samples, frozenset(), []), records)

    def scores(script: dict[str, list[torch.Tensor | None]]) -> list[SampleScore]:
        return [one.score for one in runner.attack(cast(AttackChoice, Scripted(script)), attacked, samples)]

    with records.writing():
        records.add_samples(clean, [one.score for one in runner.attack(None, clean, samples)])
    together = scores(members)
    for name, own in members.items():
        alone = scores({name: own})
        for one, image, by_itself in zip(together, own, alone, strict=True):
            part = one.by_attack[name]
            assert (part is None) == (image is None)
            if part is not None:
                assert np.array_equal(part.counts, by_itself.counts)
                assert part.dice == by_itself.dice
    assert len({one.counts.tobytes() for one in together}) > 4


def test_scoring_members_is_not_counted_as_passes_of_the_attack(ensemble):
    """The ensemble spends what its members spend, less one pass for the clean image that each asks about alone."""
    of_members, samples = rows_of_members(ensemble)
    asked = [[(r["level"], r["case"], r["tile"]) for r in of_members if r["member"] == member] for member in ALONE]
    by_both = set(asked[0]) & set(asked[1])
    assert by_both
    # At the larger level some samples are at 0 before the second member: it was not asked about them.
    assert len(asked[1]) < len(asked[0])
    for where in by_both:
        spent = sum(int(samples[(attack, *where)]["forward_passes"]) for attack in ALONE.values())
        assert int(samples[(ENSEMBLE, *where)]["forward_passes"]) == spent - 1


@pytest.mark.parametrize("mode", ["dice", "threshold"])
def test_an_ensemble_shows_what_each_member_did(model, tmp_path, mode):
    report = run(
        tmp_path, "-m", str(model.folder), "--levels", "20", "--max-samples", "6", "--no-cases", "--attacks",
        f"autoattack:version=fast,mode={mode}", "apgd:steps=50,loss=dice-ce",
    )  # fmt: skip
    ensemble, alone = report.summary["results"]
    assert list(ensemble["by_attack"]) == list(VERSIONS["fast"])
    first, *others = ensemble["by_attack"].values()
    if mode == "dice":
        assert first["adi"] == pytest.approx(alone["adi"])
        assert all(ensemble["adi"] <= part["adi"] + 1e-9 for part in ensemble["by_attack"].values())
    # In threshold mode the later members left samples out; there the kept image stands.
    assert all(ensemble["tvdi"] <= part["tvdi"] for part in ensemble["by_attack"].values())
    assert ensemble["tvdi"] <= ensemble["tvdi_of_lowest_dice"]
    assert first["attacked_samples"] >= others[0]["attacked_samples"]
    assert ensemble["robust_share"] <= first["robust_share"]
    table = (tmp_path / "table.md").read_text(encoding="utf-8")
    assert f"Members of autoattack:version=fast,mode={mode} at 20" in table
    names = {item["name"] for item in report.summary["trust"]}
    assert {"same_output_twice", "gradients_do_not_vanish", "huge_epsilon_leaves_nothing"} <= names


def test_a_model_that_hides_its_gradients_is_marked(model, tmp_path):
    """Its last layer is scaled up: the segmentation stays the same, every probability becomes 0 or 1."""
    folder = tmp_path / model.folder.name
    shutil.copytree(model.folder, folder)
    file = folder / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    for name, value in checkpoint["network_weights"].items():
        if "seg_layers" in name:
            value *= 1e6
    torch.save(checkpoint, file)
    arguments = ("--levels", "5", "--max-samples", "6", "--no-cases", "--attacks", "apgd:steps=3")
    honest = run(tmp_path / "honest", "-m", str(model.folder), *arguments)
    hidden = run(tmp_path / "hidden", "-m", str(folder), *arguments)
    assert hidden.summary["clean"] == honest.summary["clean"]
    assert not hidden.summary["trusted"]
    failed = {item["name"] for item in hidden.summary["trust"] if not item["passed"]}
    assert "outputs_are_not_saturated" in failed
    assert "outputs_are_not_saturated" not in {i["name"] for i in honest.summary["trust"] if not i["passed"]}
    table = (tmp_path / "hidden" / "table.md").read_text(encoding="utf-8")
    assert "**These figures are not to be trusted: a check failed.**" in table
    assert "apgd:loss=dlr" in table


def evaluation(model: TrainedModel, protocol: Protocol, attack: str, batch_size: int = 8) -> Evaluation:
    return Evaluation(
        model, protocol, [parse_attack(attack)], [], 12, batch_size, 0, CPU, DiceCriterion(labels=model.labels),
        case_level=False, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize(("norm", "level"), [("l2", "20"), ("linf", "64/255")])
@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_sound_perturbations_stay_in_the_cases_range_and_off_the_padding(
    model, model_3d, norm, level, dimensions, tmp_path
):
    trained = model if dimensions == "2d" else model_3d
    cases = ValidationCases(trained)
    selection = select_samples(cases, 12 if dimensions == "2d" else 2, 0, progress=False)
    asked = evaluation(trained, Protocol("sound", norm), "pgd:steps=3")
    clean, attacked = Condition(CLEAN, None), Condition("pgd:steps=3", parse_level(level, norm))
    records = Records(tmp_path, [clean, attacked], "")
    runner = Runner(asked, cases, selection, records)
    with records.writing():
        records.add_samples(clean, [one.score for one in runner.attack(None, clean, selection.samples)])
    for sample, perturbed, score, _ in runner.attack(asked.attacks[0], attacked, selection.samples):
        case = cases.load(sample.case)
        image, fixed = cases.patch(case.image, sample.place), cases.patch(case.fixed, sample.place)
        raw, _, _, _ = raw_case(trained, sample.case)
        assert float(case.low[0]) == raw.min()
        assert float(case.high[0]) == raw.max()
        assert float(perturbed.min()) >= min(raw.min(), float(image[fixed].min()) if fixed.any() else np.inf)
        assert float(perturbed.max()) <= max(raw.max(), float(image[fixed].max()) if fixed.any() else -np.inf)
        assert torch.equal(perturbed[fixed], image[fixed])
        assert not torch.equal(perturbed[~fixed], image[~fixed]) or score.dice == 0 or score.norm == 0
        assert score.norm > 0 or score.clean_dice == 0
    if dimensions == "2d":
        assert any(bool(cases.load(name).fixed.any()) for name in cases.names)


@pytest.mark.parametrize("name", ["paper", "sound"])
def test_whole_cases_stay_in_the_range_of_the_protocol(model, name, tmp_path, monkeypatch):
    """Also where no tile was attacked, or several were put together."""
    scored: list[tuple[Case, torch.Tensor]] = []
    original = CaseLevel.score

    def watched(self: CaseLevel, case: Case, image: torch.Tensor) -> CaseScore:
        scored.append((case, image))
        return original(self, case, image)

    monkeypatch.setattr(CaseLevel, "score", watched)
    run(tmp_path, "-m", str(model.folder), "--protocol", name, "--max-samples", "20", "--levels", "30",
        "--attacks", "pgd:steps=2")  # fmt: skip
    (_, clean), *perturbed = scored
    assert len(perturbed) == (2 if name == "paper" else 1)
    for case, image in perturbed:
        assert torch.equal(clean, case.image)
        assert not torch.equal(image, clean)
        low, high = (0.0, 1.0) if name == "paper" else (float(case.low[0]), float(case.high[0]))
        scan = image[(slice(None), *case.unpad)] if name == "sound" else image
        assert float(scan.min()) >= low - 1e-5
        assert float(scan.max()) <= high + 1e-5


# ---- cases and tiles are nnU-Net's


def raw_case(model: TrainedModel, name: str) -> tuple[np.ndarray, np.ndarray, Any, dict[str, Any]]:
    """A preprocessed case as nnU-Net stores it."""
    folder = str(ValidationCases(model).folder)
    image, segmentation, previous, properties = infer_dataset_class(folder)(folder, [name]).load_case(name)
    return np.asarray(image[:]), np.asarray(segmentation[:]), previous, properties


@pytest.mark.parametrize("dimensions", ["2d", "3d"])
def test_samples_are_the_tiles_of_nnunets_predictor_that_hold_foreground(model, model_3d, dimensions):
    trained = model if dimensions == "2d" else model_3d
    cases = ValidationCases(trained)
    predictor = nnUNetPredictor(device=CPU, allow_tqdm=False)
    predictor.manual_initialization(
        trained.network, trained.plans, trained.configuration, None, trained.dataset_json, trained.trainer, None
    )
    found = 0
    for name in cases.names:
        image, segmentation, _, _ = raw_case(trained, name)
        patch = trained.configuration.patch_size
        padded = torch.from_numpy(pad_nd_image(image, patch, "constant", {"constant_values": 0}))
        truth = torch.from_numpy(pad_nd_image(segmentation, patch, "constant", {"constant_values": 0}))
        with quiet():
            slicers = predictor._internal_get_sliding_window_slicers(padded.shape[1:])
        expected = {number: place for number, place in enumerate(slicers) if (truth[place] > 0).any()}
        samples = list(cases.samples([name]))
        assert [sample.tile for sample in samples] == list(expected)
        case = cases.load(name)
        for sample in samples:
            assert torch.equal(cases.patch(case.image, sample.place), padded[expected[sample.tile]])
            assert torch.equal(
                cases.patch(case.target, sample.place).long(), truth[expected[sample.tile]].clamp_min(0).long()
            )
        found += len(samples)
    assert found > 10


def nnunets_case_dice(model_folder: Path, name: str, project: Any, folder: Path) -> list[float]:
    """Predict a preprocessed case with stock nnUNetPredictor and score it with nnU-Net's compute_metrics."""
    predictor = nnUNetPredictor(device=CPU, perform_everything_on_device=False, allow_tqdm=False)
    with quiet():
        predictor.initialize_from_trained_model_folder(str(model_folder), (0,), "checkpoint_final.pth")
        data = project.preprocessed / predictor.configuration_manager.data_identifier
        image, _, _, properties = infer_dataset_class(str(data))(str(data), [name]).load_case(name)
        logits = predictor.predict_logits_from_preprocessed_data(torch.from_numpy(image[:]))
        export_prediction_from_logits(
            logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
            str(folder / name), save_probabilities=False,
        )  # fmt: skip
    reader = predictor.plans_manager.image_reader_writer_class()
    truth, prediction = project.preprocessed / "gt_segmentations" / f"{name}.nii.gz", folder / f"{name}.nii.gz"
    manager = predictor.plans_manager.get_label_manager(predictor.dataset_json)
    regions = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    metrics = compute_metrics(str(truth), str(prediction), reader, regions, manager.ignore_label)["metrics"]
    return [metrics[region]["Dice"] for region in regions]


def assert_nnunets_dice(report: Report, model_folder: Path, project: Any, folder: Path) -> None:
    clean = [row for row in report.cases if row["attack"] == "clean"]
    assert clean
    for row in clean:
        expected = nnunets_case_dice(model_folder, row["case"], project, folder)
        found = [float(value) for key, value in row.items() if key.startswith("dice_")]
        assert found == pytest.approx(expected, abs=1e-6)


def test_the_clean_dice_of_a_2d_case_is_nnunets(report, std_2d, project, nnunet_finds_our_trainers, tmp_path):
    assert len({row["case"] for row in report.cases}) == 2
    assert_nnunets_dice(report, std_2d, project, tmp_path)


def test_the_clean_dice_of_a_3d_case_is_nnunets(report_3d, std_3d, project, nnunet_finds_our_trainers, tmp_path):
    assert_nnunets_dice(report_3d, std_3d, project, tmp_path)


# ---- other models and options


def test_a_checkpoint_of_stock_nnunet_can_be_attacked(stock_2d, report, tmp_path):
    stock = run(
        tmp_path, "-d", "Dataset901_Phantom", "-c", "2d_tiny", "-p", "nnUNetPlansTiny", "--max-samples", "3",
        "--no-cases", "--levels", "8", "--attacks", "apgd:steps=2",
    )  # fmt: skip
    assert stock.summary["model"]["trainer"] == "nnUNetTrainer"
    same = {(r["case"], r["tile"]): r["dice"] for r in report.samples if r["attack"] == "clean"}
    clean = [row for row in stock.samples if row["attack"] == "clean"]
    assert [row["dice"] for row in clean] == [same[row["case"], row["tile"]] for row in clean]


def test_an_ima_model_can_be_attacked_and_its_best_checkpoint_too(ima_2d, project, tmp_path):
    report = run(
        tmp_path, "-m", str(project.model("nnUNetTrainerIMA", "2d_tiny")), "-chk", "checkpoint_best.pth",
        "--max-samples", "2", "--no-cases", "--levels", "8", "--attacks", "bpgd:steps=2",
    )  # fmt: skip
    assert report.summary["model"]["trainer"] == "nnUNetTrainerIMA"
    assert report.summary["model"]["checkpoint"] == "checkpoint_best.pth"


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_max_samples_is_an_upper_limit_and_only_whole_cases_count(model, count):
    cases = ValidationCases(model)
    everything = list(cases.samples(cases.names))
    selection = select_samples(cases, count, 0, progress=False)
    assert len(selection.samples) == min(count, len(everything))
    assert set(selection.samples) <= set(everything)
    for name in cases.names:
        whole = [s for s in everything if s.case == name] == [s for s in selection.samples if s.case == name]
        assert (name in selection.complete_cases) == whole


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_without_a_case_level_samples_are_drawn_from_all_cases(model, count):
    """Slices of one case resemble each other."""
    cases = ValidationCases(model)
    everything = list(cases.samples(cases.names))
    selection = select_samples(cases, count, 0, progress=False, whole_cases=False)
    assert len(selection.samples) == min(count, len(everything))
    assert selection.samples == sorted(set(selection.samples) & set(everything), key=lambda s: (s.case, s.tile))
    assert not selection.complete_cases
    assert selection.all_cases == sorted({sample.case for sample in selection.samples})
    if count == 7:
        assert len(selection.all_cases) > 1
        other = select_samples(cases, count, 1, progress=False, whole_cases=False)
        assert other.samples != selection.samples


def test_parts_share_the_cases_whichever_way_samples_are_chosen(model):
    cases = ValidationCases(model)
    for count, whole in ((None, True), (None, False), (17, True), (17, False)):
        alone = select_samples(cases, count, 0, progress=False, whole_cases=whole)
        parts = [select_samples(cases, count, 0, False, 3, part, whole) for part in range(3)]
        assert [sample for part in parts for sample in part.samples if sample.case in cases.names[0:1]] == [
            sample for sample in alone.samples if sample.case in cases.names[0:1]
        ]
        assert sorted((s.case, s.tile) for part in parts for s in part.samples) == [
            (s.case, s.tile) for s in alone.samples
        ]
        assert all(part.all_cases == alone.all_cases for part in parts)
        assert not parts[0].complete_cases & parts[1].complete_cases


def test_without_cases_the_case_level_is_empty_and_said_to_be(std_2d, tmp_path):
    report = run(tmp_path, "-m", str(std_2d), "--no-cases", "--max-samples", "2", "--levels", "1", "--attacks",
                 "pgd:steps=1")  # fmt: skip
    assert report.cases == []
    assert report.summary["clean"]["n_cases"] == 0
    assert report.summary["clean"]["case_dice"] is None
    assert report.summary["clean"]["n_samples"] == 2


def test_the_default_output_lies_in_the_folds_folder(std_2d, monkeypatch):
    monkeypatch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
    arguments = ["--no-cases", "--max-samples", "1", "--levels", "1", "--attacks", "pgd:steps=1", "-device", "cpu"]
    with quiet():
        assert main(["evaluate", "-m", str(std_2d), *arguments]) == 0
    assert {f.name for f in (std_2d / "fold_0/nnunet_ima/checkpoint_final_sound_l2").iterdir()} == FILES


def test_regions_are_attacked_and_scored_as_nnunet_scores_them(
    project, monkeypatch, nnunet_finds_our_trainers, tmp_path
):
    """The whole structure and its anterior part, as overlapping sigmoid regions."""
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))

    def with_regions(dataset_json: dict[str, Any]) -> None:
        dataset_json["labels"] = {"background": 0, "whole": [1, 2], "anterior": 1}
        dataset_json["regions_class_order"] = [2, 1]

    folder = untrained_model(project, with_regions)
    report = run(tmp_path / "out", "-m", str(folder), "--max-samples", "20", "--levels", "5", "--attacks",
                 "apgd:steps=2")  # fmt: skip
    assert report.summary["classes"] == ["whole", "anterior"]
    assert_nnunets_dice(report, folder, project, tmp_path)
    assert report.summary["clean"]["case_dice"] > 0
    for row in (row for row in report.samples if row["attack"] == "clean"):
        assert int(row["tp_1+2"]) + int(row["fn_1+2"]) >= int(row["tp_1"]) + int(row["fn_1"])


def untrained_model(project: Any, change: Callable[[dict[str, Any]], None]) -> Path:
    """A model folder with random weights, whose dataset.json was changed."""
    original = project.preprocessed / "dataset.json"
    kept = original.read_bytes()
    changed = read(original)
    change(changed)
    write(original, changed)
    try:
        trainer = make_trainer(project, nnUNetTrainerSTD)
        with quiet():
            trainer.on_train_start()
            torch.manual_seed(1)
            for parameter in trainer.network.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
            trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    finally:
        original.write_bytes(kept)
    return Path(trainer.output_folder_base)


def test_fold_all_warns_that_the_model_has_seen_the_cases(std_2d, tmp_path):
    (tmp_path / "model" / "fold_all").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        (tmp_path / "model" / name.replace("fold_0", "fold_all")).write_bytes((std_2d / name).read_bytes())
    report = run(tmp_path / "out", "-m", str(tmp_path / "model"), "-f", "all", "--no-cases", "--max-samples", "1",
                 "--levels", "1", "--attacks", "pgd:steps=1")  # fmt: skip
    assert report.summary["trained_on_these_cases"]
    assert "trained on these very cases" in (report.folder / "table.md").read_text(encoding="utf-8")


def test_a_model_that_started_from_another_folds_is_known_to_have_seen_the_cases(project, std_2d, tmp_path):
    with project.in_force(), quiet():
        first = make_trainer(project, nnUNetTrainerSTD, fold=1)
        first.on_train_start()
        first.save_checkpoint(str(tmp_path / "fold_1.pth"))
        second = make_trainer(project, nnUNetTrainerSTD, start_from=str(tmp_path / "fold_1.pth"))
        second.on_train_start()
        (tmp_path / "model" / "fold_0").mkdir(parents=True)
        second.save_checkpoint(str(tmp_path / "model" / "fold_0" / "checkpoint_final.pth"))
    for name in ("plans.json", "dataset.json"):
        (tmp_path / "model" / name).write_bytes((std_2d / name).read_bytes())
    report = run(tmp_path / "out", "-m", str(tmp_path / "model"), "--no-cases", "--max-samples", "1",
                 "--levels", "1", "--attacks", "pgd:steps=1")  # fmt: skip
    assert report.summary["trained_on_these_cases"]
    logs = [file.read_text(encoding="utf-8") for file in Path(second.output_folder).glob("training_log_*.txt")]
    assert any("validation flatters it" in log for log in logs)


def test_the_network_always_runs_on_the_same_number_of_samples(std_2d, tmp_path, monkeypatch):
    """What makes the numbers independent of the batch size; on a tiny network rounding would not show it."""
    sizes = set()
    build = models._build_network

    def watched(*arguments):
        network = build(*arguments)
        network.register_forward_pre_hook(lambda _, inputs: sizes.add((inputs[0].device.type, len(inputs[0]))))
        return network

    monkeypatch.setattr(models, "_build_network", watched)
    run(tmp_path, "-m", str(std_2d), "--no-cases", "--max-samples", "11", "--levels", "2", "--batch-size", "5",
        "--attacks", "white-noise:draws=2", "pgd:steps=2", "apgd:steps=3", "bpgd:steps=2")  # fmt: skip
    assert len({size for device, size in sizes if device == "cpu"}) == 1


def test_bad_data_leaves_no_empty_folder_behind(std_2d, tmp_path, monkeypatch):
    def refuse(*_):
        raise UserError("no.")

    monkeypatch.setattr("nnunet_ima.evaluation.run.Evaluation.run", refuse)
    assert main(["evaluate", "-m", str(std_2d), "-o", str(tmp_path / "out"), "-device", "cpu"]) == 2
    assert not (tmp_path / "out").exists()


def test_a_level_that_is_written_in_two_ways_is_one(std_2d, tmp_path):
    report = run(tmp_path, "-m", str(std_2d), "--no-cases", "--max-samples", "1", "--levels", "1", "1.0", "2", "1e0",
                 "--attacks", "pgd:steps=1")  # fmt: skip
    assert [result["level"] for result in report.summary["results"]] == ["1", "2"]
    # A study that gave the same command knows it for what it made.
    assert asked_for(["nnunet_ima", "evaluate", "-m", "m", "--levels", "1", "1.0", "2", "1e0"])["levels"] == ["1", "2"]


@given(st.lists(st.tuples(st.integers(1, 255), st.booleans()), min_size=1))
def test_of_levels_each_value_counts_once_as_it_was_written_first(found):
    texts = [repr(number / 255) if as_decimal else f"{number}/255" for number, as_decimal in found]
    first = {number: text for (number, _), text in zip(reversed(found), reversed(texts), strict=True)}
    numbers = list(dict.fromkeys(number for number, _ in found))
    assert [(level.text, level.value) for level in read_levels(texts, "linf")] == [
        (first[number], number / 255) for number in numbers
    ]


def test_a_model_of_unknown_weights_says_so(project, std_2d, tmp_path):
    """As -pretrained_weights does it: nnU-Net initialises the trainer and loads weights before the training starts."""
    with project.in_force(), quiet():
        trainer = make_trainer(project, nnUNetTrainerSTD)
        trainer.initialize()
        trainer.on_train_start()
        (tmp_path / "model" / "fold_0").mkdir(parents=True)
        trainer.save_checkpoint(str(tmp_path / "model" / "fold_0" / "checkpoint_final.pth"))
    for name in ("plans.json", "dataset.json"):
        (tmp_path / "model" / name).write_bytes((std_2d / name).read_bytes())
    report = run(tmp_path / "out", "-m", str(tmp_path / "model"), "--no-cases", "--max-samples", "1",
                 "--levels", "1", "--attacks", "pgd:steps=1")  # fmt: skip
    assert report.summary["started_from_unknown_weights"]
    assert not report.summary["trained_on_these_cases"]
    assert "is not known" in (report.folder / "table.md").read_text(encoding="utf-8")


def test_a_model_trained_from_random_weights_is_known(report):
    assert not report.summary["started_from_unknown_weights"]


# ---- odd names


def copied(std_2d: Path, project: Any, folder: Path, rename: Mapping[str, str], monkeypatch: Any) -> Path:
    """Model folder of a copy, with its data, below ``folder``; cases are renamed, and those are the fold's."""
    model, data = folder / "model", folder / "preprocessed" / project.dataset
    (model / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json", "fold_0/checkpoint_final.pth"):
        shutil.copyfile(std_2d / name, model / name)
    for part in ("nnUNetPlans_2d", "gt_segmentations"):
        (data / part).mkdir(parents=True)
        for old, new in rename.items():
            for file in (project.preprocessed / part).glob(f"{old}*"):
                shutil.copyfile(file, data / part / f"{new}{file.name.removeprefix(old)}")
    write(data / "splits_final.json", [{"train": [], "val": list(rename.values())}])
    monkeypatch.setenv("nnUNet_preprocessed", str(data.parent))
    return model


def test_paths_with_spaces_and_umlauts(std_2d, project, tmp_path, monkeypatch, capsys):
    odd, (first, *_) = tmp_path / "Prüfung der Geräte", project.names()
    model = copied(std_2d, project, odd, {first: first}, monkeypatch)
    raw = odd / "Rohdaten von Jürgen"
    shutil.copytree(project.root / "nnUNet_raw" / project.dataset, raw / project.dataset)
    monkeypatch.setenv("nnUNet_raw", str(raw))
    way = ["-m", str(model), "-device", "cpu"]
    run_folder, scans = odd / "Läufe 1", odd / "gestörte Bilder"
    level = ["--max-samples", "3", "--levels", "8", "--attacks", "pgd:steps=1"]
    assert main(["evaluate", *way, *level, "-o", str(run_folder)]) == 0
    assert f"Written to {run_folder}" in capsys.readouterr().out
    assert {file.name for file in run_folder.iterdir()} == FILES
    with quiet():
        assert (
            main(["attack", *way, "--level", "8", "--attack", "pgd:steps=1", "--cases", first, "-o", str(scans)]) == 0
        )
    assert (scans / "images" / f"{first}_0000.nii.gz").is_file()
    assert [case["case"] for case in read(scans / "attack.json")["cases"]] == [first]


@pytest.mark.skipif(os.name == "nt", reason="a file cannot have such a name there")
def test_a_case_whose_name_is_html_is_shown_by_a_report_and_not_run(std_2d, project, tmp_path, monkeypatch):
    name = "<img src=x onerror=alert(1)>&\"'é {{ 7 * 7 }}"
    model = copied(std_2d, project, tmp_path, {project.names()[0]: name}, monkeypatch)
    report = run(
        tmp_path / "run", "-m", str(model), "--max-samples", "1000", "--levels", "8", "--attacks", "pgd:steps=1"
    )
    assert {row["case"] for row in report.samples} == {row["case"] for row in report.cases} == {name}
    with quiet():
        assert main(["report", str(report.folder), "-o", str(tmp_path / "out")]) == 0
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert not [attributes for _, attributes in page.tags if "onerror" in attributes]
    assert name in page.text


class Page(HTMLParser):
    """Tags with the names of their attributes, and the text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[str]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, [name for name, _ in attrs]))

    def handle_data(self, data: str) -> None:
        self.text += data
