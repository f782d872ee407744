"""Every attack on a 3D nnU-Net and real scans: hippocampus, patches of 40 × 56 × 40, classes, regions, ignore label."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from nnunet_project import PLANS, Project, make_project, make_trainer, quiet, read, tiny, write
from test_attacks import SMALL_BUDGET, tensors_of, threat_for
from test_hippocampus import TASK
from tiny_networks import IGNORE, Problem
from torch import Tensor, nn

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.labels import Labels
from nnunet_ima.threat import ThreatModel

CASES = 8
PATCH = (40, 56, 40)
LENGTH = {"num_epochs": 1, "num_iterations_per_epoch": 250, "num_val_iterations_per_epoch": 1, "initial_lr": 0.3}
ATTACKS = (
    "white-noise:draws=3", "fgsm", "ifgsm:steps=3", "pgd:steps=4,restarts=2", "bpgd:steps=4,bisections=3",
    "apgd:steps=6", "apgd:steps=10,schedule=shrinking,loss=balanced-ce", "apgd-t:steps=3", "fab:steps=3",
    "spsa:steps=2,samples=6", "square:n_queries=12", "autoattack:version=fast",
)  # fmt: skip
KINDS = {
    "classes": Labels(),
    "classes, ignore label": Labels(ignore_label=IGNORE),
    "regions": Labels(regions=True),
    "regions, ignore label": Labels(regions=True, ignore_label=IGNORE),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TASK.is_dir(), reason=f"the real hippocampus scans are not there ({TASK.name} in ../shared)"
    ),
]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A few cases, and a small 3D network that found the structure in them, by the real trainer."""
    from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD

    root = tmp_path_factory.mktemp("hippocampus")
    few = root / TASK.name
    for part in ("imagesTr", "labelsTr"):
        (few / part).mkdir(parents=True)
        for scan in sorted((TASK / part).glob("hippocampus_*.nii.gz"))[:CASES]:
            (few / part / scan.name).symlink_to(scan.resolve())
    (few / "dataset.json").write_text(json.dumps({**read(TASK / "dataset.json"), "numTraining": CASES}))
    project = make_project(root, few)
    plans = project.plans()
    planned = plans["configurations"]["3d_fullres"]
    assert planned["patch_size"] == list(PATCH)  # what nnU-Net itself plans
    plans["configurations"]["3d_tiny"] = tiny(planned, "3d_fullres", [8, 16, 32, 32], 2, PATCH)
    plans["configurations"]["3d_tiny"]["nnunet_ima"].update(LENGTH)
    write(project.preprocessed / f"{PLANS}.json", plans)
    with project.in_force():
        with quiet():
            torch.manual_seed(0)
            make_trainer(project, nnUNetTrainerSTD, "3d_tiny").run_training()
        yield project


def test_the_command_runs_every_attack(scans: Project, tmp_path: Path) -> None:
    for norm, level in (("l2", "10"), ("linf", "4/255")):
        out = tmp_path / norm
        scans.command(
            "nnunet_ima", "evaluate", "-d", scans.number, "-c", "3d_tiny", "-tr", "nnUNetTrainerSTD", "-p", PLANS,
            "-device", "cpu", "-o", str(out), "--max-samples", "1", "--levels", level, "--norm", norm, "--no-cases",
            "--attacks", *ATTACKS,
        )  # fmt: skip
        summary = read(out / "summary.json")
        assert summary["clean"]["adi"] > 0.3
        assert [result["attack"] for result in summary["results"]] == list(ATTACKS)
        by_attack = {result["attack"]: result["adi"] for result in summary["results"]}
        assert max(by_attack.values()) <= summary["clean"]["adi"]
        # Those that go for the lowest Dice found something.
        assert by_attack["apgd:steps=6"] < summary["clean"]["adi"] - 0.1
        assert by_attack["autoattack:version=fast"] <= by_attack["apgd:steps=6"] + 0.02
        with (out / "samples.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["attack"] != "clean"]
        assert len(rows) == len(ATTACKS)
        assert all(float(row["norm"]) <= float(row["epsilon"]) * (1 + 1e-4) for row in rows)


class AsRegions(nn.Module):
    """The same network as two regions, whole structure and its second part, by their log odds."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        out = self.network(images)
        none, front, back = (out if isinstance(out, Tensor) else out[0]).unbind(1)
        return torch.stack([torch.logaddexp(front, back) - none, back - torch.logaddexp(none, front)], 1)


@pytest.fixture(scope="module")
def patch(scans: Project) -> Problem:
    """The network and one real patch of a validation case."""
    from nnunet_ima.evaluation.batch import load_batch
    from nnunet_ima.evaluation.cases import ValidationCases
    from nnunet_ima.evaluation.models import load_model
    from nnunet_ima.evaluation.protocols import Protocol
    from nnunet_ima.evaluation.run import select_samples

    model = load_model(scans.model("nnUNetTrainerSTD", "3d_tiny"), 0, "checkpoint_final.pth", torch.device("cpu"))
    cases = ValidationCases(model)
    chosen = select_samples(cases, 1, 0, progress=False).samples
    images, targets, _ = load_batch(cases, chosen, Protocol("sound", "l2"), None, torch.device("cpu"))
    return Problem(model.network, images, targets, DiceCriterion())


def read_as(patch: Problem, labels: Labels) -> Problem:
    """The same patch with another kind of target; the lower half is then not annotated."""
    network, targets = patch.network, patch.targets
    hidden = torch.zeros_like(targets, dtype=torch.bool)
    hidden[:, :, : PATCH[0] // 2] = labels.ignore_label is not None
    if labels.regions:
        network = AsRegions(network)
        targets = torch.cat([targets > 0, targets == 2], 1).float()
        targets = torch.cat([targets, hidden.float()], 1) if labels.ignore_label is not None else targets
    elif labels.ignore_label is not None:
        targets = torch.where(hidden, float(labels.ignore_label), targets)
    return Problem(network, patch.images, targets, DiceCriterion(labels=labels))


# Each norm with and without an ignore label, with classes and regions.
@pytest.mark.parametrize(("norm", "kind"), list(zip(("l2", "linf", "linf", "l2"), KINDS, strict=True)))
@pytest.mark.parametrize("attack_name", SMALL_BUDGET)
def test_what_holds_for_tiny_networks_holds_here(patch: Problem, attack_name: str, norm: str, kind: str) -> None:
    problem = read_as(patch, KINDS[kind])
    threat = threat_for(problem.images, norm, 10.0 if norm == "l2" else 0.05)
    before = {name: value.clone() for name, value in problem.network.state_dict().items()}
    result = SMALL_BUDGET[attack_name](threat, problem.criterion)(problem.network, problem.images, problem.targets)
    assert all(torch.equal(value, before[name]) for name, value in problem.network.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in problem.network.parameters())
    assert threat.contains(result.images, problem.images, tolerance=1e-5).all()
    low, high = threat.bounds(problem.images)
    assert ((result.images >= low) & (result.images <= high)).all()
    assert (result.dice <= result.clean_dice).all()
    assert (result.clean_dice > 0.2).all()
    with torch.no_grad():
        logits = problem.network.eval()(result.images)
        found = problem.criterion.dice(logits if isinstance(logits, Tensor) else logits[0], problem.targets)
    assert torch.equal(result.dice, found)


def test_what_is_not_annotated_changes_nothing(patch: Problem) -> None:
    """Whatever stands in the image's ignored part as truth, the attack finds the same."""
    problem = read_as(patch, Labels(ignore_label=IGNORE))
    attack = SMALL_BUDGET["autoattack"](ThreatModel("l2", 10.0), problem.criterion)
    first = attack(problem.network, problem.images, problem.targets)
    assert not math.isclose(float(first.dice), float(first.clean_dice))
    regions = read_as(patch, Labels(regions=True, ignore_label=IGNORE))
    lied = regions.targets.clone()
    lied[:, :2, : PATCH[0] // 2] = 1 - lied[:, :2, : PATCH[0] // 2]
    attack = SMALL_BUDGET["autoattack"](ThreatModel("l2", 10.0), regions.criterion)
    results = [attack(regions.network, regions.images, targets) for targets in (regions.targets, lied)]
    for one, other in zip(*map(tensors_of, results), strict=True):
        assert torch.equal(one, other)
