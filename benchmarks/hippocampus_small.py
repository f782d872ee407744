"""The first benchmark: does IMA keep clean Dice, and hold under attack, on the Decathlon's hippocampus?

A small 2D network (features 16 to 128, batch 32), fold 0, on a CPU: 500 steps of stock nnU-Net, then from there 600 of
IMA, or 600 more of stock training; then AutoAttack (``fast``) and white noise on validation slices (``sound`` and
``paper``, L2). Over an hour on two free cores; started again, it goes on where it stopped. Writes a JSON, a table, and
a picture.

    python benchmarks/hippocampus_small.py --data <Task04_Hippocampus> [-o work] [-device cpu]
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, SmallNetwork
from nnunet_ima.evaluation.report import write_report
from nnunet_ima.files import atomic_path, write_text

NETWORK = SmallNetwork("2d_small", features=16, most_features=128, batch_size=32)
LENGTH: dict[str, Any] = {
    "num_epochs": 10,
    "num_iterations_per_epoch": 50,
    "num_val_iterations_per_epoch": 5,
    # 500 steps at nnU-Net's rate of 0.01 do not learn the task at all.
    "initial_lr": 0.1,
}
STD = Method("stock, 500 steps", "nnUNetTrainerSTD", LENGTH)
# What 600 further steps do without attack, so that the hardened model is not compared with a younger one.
HARDENING: dict[str, Any] = {**LENGTH, "num_epochs": 12}
STD_LONGER = Method("stock, 500 + 600 steps", "nnUNetTrainerSTD", HARDENING, start=STD)
ATTACKED: dict[str, Any] = {**HARDENING, "steps": 10, "epsilon": 15.0}
# A margin moves once a visit. With all 208 cases a slice is drawn two or three times in 600 steps, and Δε configures
# itself to its largest, ε/4; with 24 cases it is drawn about 20 times, and margins can grow in the paper's small steps.
IMA_ALL = Method("IMA, 208 cases", "nnUNetTrainerIMA", ATTACKED, start=STD)
IMA = Method("IMA, 24 cases, Δε 1.5", "nnUNetTrainerIMA", {**ATTACKED, "delta_epsilon": 1.5}, start=STD, cases=24)
METHODS = (STD, STD_LONGER, IMA, IMA_ALL)
ATTACKS = ("autoattack:version=fast", "white-noise:draws=20")
SAMPLES = ("--max-samples", "300")
EVALUATIONS = (
    Attacks("sound_l2", ("5", "10", "15"), ATTACKS, further=SAMPLES),
    Attacks("paper_l2", ("5",), ATTACKS, protocol="paper", further=(*SAMPLES, "--no-cases")),
)
RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder Task04_Hippocampus of the Decathlon")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    dataset = pipeline.prepare(options.data)
    pipeline.write_plans(dataset, METHODS)
    runs: dict[str, dict[str, Path]] = {}
    for method in METHODS:
        pipeline.train(dataset, method)
        for attacks in EVALUATIONS:
            runs.setdefault(attacks.name, {})[method.title] = pipeline.evaluate(dataset, method, attacks)
    for name, compared in runs.items():
        write_report(list(compared.values()), pipeline.output / f"{name}_report", list(compared))
    summaries = {
        name: {
            title: json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            for title, folder in compared.items()
        }
        for name, compared in runs.items()
    }
    passes = {method.title: passes_per_sample(pipeline.fold_folder(dataset, method)) for method in METHODS}
    result = {
        "command": "python " + shlex.join(["benchmarks/hippocampus_small.py", "--data", "Task04_Hippocampus"]),
        "hardware": {
            "machine": platform.machine(),
            "threads": int(pipeline.steps.environment["OMP_NUM_THREADS"]),
            "device": options.device,
        },
        "settings": {method.title: dict(method.settings) for method in METHODS},
        "training_passes_per_sample_last_epoch": passes,
        "evaluations": {
            name: {title: without_paths(s) for title, s in found.items()} for name, found in summaries.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "hippocampus_small.json", json.dumps(result, indent=1) + "\n")
    write_text(RESULTS / "hippocampus_small.md", table(summaries))
    draw(summaries["sound_l2"], PICTURES / "hippocampus.png")
    sys.stdout.write(table(summaries))


def passes_per_sample(fold: Path) -> float:
    """What nnU-Net's log says of the last epoch; 1 for stock training."""
    checkpoint = torch.load(fold / "checkpoint_final.pth", weights_only=False, map_location="cpu")
    return float(checkpoint["logging"].get("passes_per_sample", [1.0])[-1])


def without_paths(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without what only this machine knows."""
    return {key: value for key, value in summary.items() if key != "command"}


def table(summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """TVDI and ADI of each method and condition, in %."""
    lines = []
    for name, found in summaries.items():
        samples = next(iter(found.values()))["clean"]["n_samples"]
        lines += [f"\n`{name}`, {samples} validation slices, TVDI / ADI in %:\n"]
        lines += ["| attack | level | " + " | ".join(found) + " |", "| --- | --- |" + " --- |" * len(found)]
        rows = [("clean", "0", [s["clean"] for s in found.values()])]
        if all("clamp_only" in s for s in found.values()):
            rows.append(("clamp only", "0", [s["clamp_only"] for s in found.values()]))
        for results in zip(*(s["results"] for s in found.values()), strict=True):
            rows.append((results[0]["attack"], results[0]["level"], list(results)))
        for attack, level, figures in rows:
            cells = " | ".join(f"{100 * f['tvdi']:.1f} / {100 * f['adi']:.1f}" for f in figures)
            lines.append(f"| {attack} | {level} | {cells} |")
    return "\n".join(lines).strip() + "\n"


def draw(found: dict[str, dict[str, Any]], file: Path) -> None:
    """TVDI against level: AutoAttack solid, white noise dotted."""
    figure, axes = plt.subplots(figsize=(7.5, 4.2), dpi=130)
    shown = [found[STD_LONGER.title], found[IMA.title]]
    for summary, title, colour in zip(
        shown, ("stock nnU-Net", "hardened with IMA"), ("#d1495b", "#00798c"), strict=True
    ):
        for attack, style in (("autoattack", "-"), ("white-noise", ":")):
            points = [(r["epsilon"], 100 * r["tvdi"]) for r in summary["results"] if r["attack"].startswith(attack)]
            points = [(0.0, 100 * summary["clean"]["tvdi"]), *sorted(points)]
            axes.plot(*zip(*points, strict=True), style, marker="o", color=colour, label=f"{title}, {attack}")
    axes.set(ylim=(0, 100), xlabel="perturbation (L2 norm over the slice, z-scores)", ylabel="Dice (TVDI, %)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    file.parent.mkdir(exist_ok=True)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
