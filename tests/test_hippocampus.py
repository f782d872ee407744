"""End to end on real scans: stock training, hardening, attack and page, by the real commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, SmallNetwork
from nnunet_ima.evaluation.report import write_report

TASK = Path(__file__).parents[2] / "shared" / "data" / "Task04_Hippocampus"
CASES = 15

LENGTH = {"num_epochs": 3, "num_iterations_per_epoch": 20, "num_val_iterations_per_epoch": 2, "save_every": 1}
# From random weights: 60 steps were enough twice, and once not to find anything at all.
STOCK = Method(
    "stock", "nnUNetTrainerSTD", {**LENGTH, "num_epochs": 6, "num_iterations_per_epoch": 60, "initial_lr": 0.1}
)
HARDENED = Method(
    "hardened",
    "nnUNetTrainerIMA",
    # A Dice of 0.6 may be out of reach of so small a network; what counts as correct must be met for margins to move.
    {**LENGTH, "initial_lr": 0.05, "steps": 4, "bisections": 4, "delta_epsilon": 3, "dice_threshold": 0.05},
    start=STOCK,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not TASK.is_dir(), reason=f"the real hippocampus scans are not there ({TASK.name} in ../shared)"
    ),
]


@pytest.fixture(scope="module")
def few_cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task with its first cases only."""
    few = tmp_path_factory.mktemp("few") / TASK.name
    for part in ("imagesTr", "labelsTr"):
        (few / part).mkdir(parents=True)
        for scan in sorted((TASK / part).glob("hippocampus_*.nii.gz"))[:CASES]:
            (few / part / scan.name).symlink_to(scan.resolve())
    description = json.loads((TASK / "dataset.json").read_text())
    (few / "dataset.json").write_text(json.dumps({**description, "numTraining": CASES}))
    return few


def test_stock_and_hardened_model_from_scans_to_page(few_cases: Path, tmp_path: Path) -> None:
    network = SmallNetwork("2d_ci", features=8, most_features=32, batch_size=12)
    pipeline = Pipeline(tmp_path / "work", "nnUNetPlansCI", network, "cpu")
    attacks = Attacks("attacked", ("5", "10"), ("white-noise:draws=2", "apgd:steps=8"), further=("--max-samples", "40"))
    dataset = pipeline.prepare(few_cases)
    pipeline.write_plans(dataset, (STOCK, HARDENED))
    runs = []
    for method in (STOCK, HARDENED):
        pipeline.train(dataset, method)
        runs.append(pipeline.evaluate(dataset, method, attacks))
    page = write_report(runs, tmp_path / "report")

    checkpoint = pipeline.model(dataset, HARDENED) / "fold_0" / "checkpoint_final.pth"
    saved = torch.load(checkpoint, weights_only=False, map_location="cpu")["init_args"]["nnunet_ima"]
    margins = saved["state"]["margins"]["margins"]
    assert saved["settings"]["epsilon"] == 15.0  # the paper's, for Dataset004_Hippocampus
    assert len(margins) > 50
    assert float(margins.min()) >= 0
    assert float(margins.max()) <= 15.0
    assert len(margins.unique()) > 1  # some moved

    for run in runs:
        summary = json.loads((run / "summary.json").read_text())
        assert all(item["passed"] for item in summary["trust"]), summary["trust"]
        assert summary["clean"]["n_samples"] == 40
        assert summary["clean"]["tvdi"] > 0.2
        assert {result["level"] for result in summary["results"]} == {"5", "10"}
        for result in summary["results"]:
            assert result["tvdi"] <= summary["clean"]["tvdi"] + 0.02
            assert result["adi"] <= summary["clean"]["adi"]
    assert "data:image/png;base64," in page.read_text()
