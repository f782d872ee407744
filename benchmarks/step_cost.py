"""What a step of each trainer costs, as a ratio to nnU-Net's own step, on a half-trained hippocampus model.

The same batches for all, one after the other, so that whatever else the machine does hits all alike. IMA's margins are
set to about 4 first; K and bisections are the paper's. Needs the folder of ``hippocampus_small.py`` for its data and
its stock model.

    python benchmarks/step_cost.py -o <folder of hippocampus_small.py> [--steps 15] [-device cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nnunet_ima import __version__
from nnunet_ima.files import write_text
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA
from nnunet_ima.trainers.nnUNetTrainerSAT import nnUNetTrainerSAT
from nnunet_ima.trainers.nnUNetTrainerSTD import nnUNetTrainerSTD
from nnunet_ima.trainers.nnUNetTrainerTE import nnUNetTrainerTE
from nnunet_ima.trainers.nnUNetTrainerTRADES import nnUNetTrainerTRADES

METHODS = (nnUNetTrainerSTD, nnUNetTrainerIMA, nnUNetTrainerSAT, nnUNetTrainerTE, nnUNetTrainerTRADES)
SETTINGS = {"epsilon": 15.0, "delta_epsilon": 2.0, "te_start": 0.0, "te_end": 0.0, "robust_every": 0, "snapshots": 0}
MARGIN, SPREAD = 4.0, 1.0
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Measure and write ``results/step_cost.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"))
    parser.add_argument("--steps", type=int, default=15, help="measured of each trainer, after two to warm up")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    dataset = next((options.output / "nnUNet_preprocessed").glob("Dataset004_*"))
    with tempfile.TemporaryDirectory() as results, quiet():
        os.environ |= {
            "nnUNet_preprocessed": str(dataset.parent),
            "nnUNet_raw": str(options.output / "nnUNet_raw"),
            "nnUNet_results": results,
            "nnUNet_n_proc_DA": "0",
            "nnUNet_compile": "0",
        }
        trainers = [make(kind, dataset, torch.device(options.device)) for kind in METHODS]
        found = measure(trainers, options.steps)
    seconds = {name: statistics.median(values["seconds"]) for name, values in found.items()}
    result = {
        "command": f"python benchmarks/step_cost.py --steps {options.steps}",
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": options.device},
        "versions": {"nnunet_ima": __version__, "torch": torch.__version__},
        "margins": {"mean": MARGIN, "standard_deviation": SPREAD},
        "ratio_to_stock": {name: round(value / seconds["nnUNetTrainerSTD"], 2) for name, value in seconds.items()},
        "passes_per_sample": {name: round(statistics.mean(v["passes"]), 2) for name, v in found.items()},
        "ima": {key: round(statistics.mean(values), 3) for key, values in found["nnUNetTrainerIMA"]["parts"].items()},
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "step_cost.json", json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def make(kind: type[Any], dataset: Path, device: torch.device) -> Any:
    """A trainer with the stock model's weights, right before a step."""
    plans = json.loads((dataset / "nnUNetPlansSmall.json").read_text(encoding="utf-8"))
    configuration = "2d_small_STD"
    plans["configurations"][configuration]["nnunet_ima"] = SETTINGS
    plans["continue_training"] = False
    dataset_json = json.loads((dataset / "dataset.json").read_text(encoding="utf-8"))
    trainer = kind(plans, configuration, 0, dataset_json, device)
    trainer.initialize()
    results = dataset.parents[1] / "nnUNet_results" / dataset.name
    stock = results / "nnUNetTrainerSTD__nnUNetPlansSmall__2d_small_STD" / "fold_0" / "checkpoint_final.pth"
    weights = torch.load(stock, map_location=device, weights_only=False)["network_weights"]
    trainer.network.load_state_dict(weights)
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def measure(trainers: list[Any], steps: int) -> dict[str, dict[str, Any]]:
    """Seconds, passes and IMA's shares of each step; every trainer stays at the stock model's weights."""
    found: dict[str, dict[str, Any]] = {type(t).__name__: {"seconds": [], "passes": [], "parts": {}} for t in trainers}
    # TE's loader gives what all of them need.
    loader = next(t for t in trainers if isinstance(t, nnUNetTrainerTE)).dataloader_train
    for step in range(steps + 2):
        batch = next(loader)
        for trainer in trainers:
            # Nobody learns: the model shall stay half-trained, and the margins where they were set.
            trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=0.0)
            if isinstance(trainer, nnUNetTrainerIMA):
                samples = trainer.samples_of(batch)
                trainer.margins.update(samples, (MARGIN + SPREAD * torch.randn(len(samples))).clamp(0.5, 15.0))
            mine = copy.deepcopy(batch)
            synchronise(trainer.device)
            start = time.perf_counter()
            counts = trainer.train_step(mine)["counts"][0]
            synchronise(trainer.device)
            if step < 2:
                continue
            record = found[type(trainer).__name__]
            record["seconds"].append(time.perf_counter() - start)
            record["passes"].append(counts["forward_passes"] / counts["samples"])
            if isinstance(trainer, nnUNetTrainerIMA):
                for key in ("foreground", "correct", "perturbed", "crossed"):
                    record["parts"].setdefault(f"share_{key}", []).append(counts[key] / counts["samples"])
    return found


def synchronise(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quiet() -> contextlib.redirect_stdout[io.StringIO]:
    """nnU-Net prints its plans and its citation."""
    return contextlib.redirect_stdout(io.StringIO())


if __name__ == "__main__":
    main()
