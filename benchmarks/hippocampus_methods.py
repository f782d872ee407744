"""All methods on the Decathlon's hippocampus: the table of ``docs/methods.md``.

Goes on in the folder of ``hippocampus_small.py``: from its stock model, 600 steps of each method on the same 24 cases,
then APGD and white noise on validation slices (``sound``, L2). And IMA from random weights, as many steps in all as the
stock model and its hardening on all cases took. Two hours on two free cores.

    python benchmarks/hippocampus_methods.py --data <Task04_Hippocampus> [-o work] [-device cpu]
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from hippocampus_small import (
    ATTACKED,
    EVALUATIONS,
    HARDENING,
    IMA,
    IMA_ALL,
    NETWORK,
    RESULTS,
    STD,
    STD_LONGER,
    passes_per_sample,
    table,
)

from nnunet_ima.evaluation.pipeline import Method, Pipeline
from nnunet_ima.files import write_text

# SAT and TE perturb every sample by all of ε; at the paper's 15 so small a network learns nothing in so few steps,
# as one row shows. Five steps of 4ε/5 (TRADES: 2ε/5) reach across a ball of 5.
AT_5: dict[str, Any] = {**HARDENING, "epsilon": 5.0, "steps": 5}
SAT_15 = Method("SAT, ε 15", "nnUNetTrainerSAT", {**HARDENING, "steps": 10, "epsilon": 15.0}, start=STD, cases=24)
SAT = Method("SAT, ε 5", "nnUNetTrainerSAT", AT_5, start=STD, cases=24, variant="5")
TE = Method("TE, ε 5", "nnUNetTrainerTE", AT_5, start=STD, cases=24, variant="5")
# At the paper's weight, 300, the pull is several times the loss and draws the network away from its task.
TE_30 = Method("TE, ε 5, weight 30", "nnUNetTrainerTE", {**AT_5, "te_weight": 30.0}, STD, cases=24, variant="5w30")
TRADES = Method("TRADES, ε 5", "nnUNetTrainerTRADES", AT_5, start=STD, cases=24, variant="5")
IMA_SCRATCH = Method("IMA, 208 cases, from random weights", "nnUNetTrainerIMA", {**ATTACKED, "num_epochs": 22})
METHODS = (STD_LONGER, IMA, SAT, TE, TE_30, TRADES, SAT_15, IMA_ALL, IMA_SCRATCH)


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder Task04_Hippocampus of the Decathlon")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    dataset = pipeline.prepare(options.data)
    pipeline.write_plans(dataset, (STD, *METHODS))
    found: dict[str, dict[str, Any]] = {}
    attacks = EVALUATIONS[0]
    for method in (STD, *METHODS):
        pipeline.train(dataset, method)
        if method is not STD:
            folder = pipeline.evaluate(dataset, method, attacks)
            found[method.title] = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    result = {
        "command": "python " + shlex.join(["benchmarks/hippocampus_methods.py", "--data", "Task04_Hippocampus"]),
        "hardware": {
            "machine": platform.machine(),
            "threads": int(pipeline.steps.environment["OMP_NUM_THREADS"]),
            "device": options.device,
        },
        "settings": {method.title: dict(method.settings) for method in METHODS},
        "training_passes_per_sample_last_epoch": {
            method.title: passes_per_sample(pipeline.fold_folder(dataset, method)) for method in METHODS
        },
        "evaluations": {
            title: {key: value for key, value in summary.items() if key != "command"}
            for title, summary in found.items()
        },
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "hippocampus_methods.json", json.dumps(result, indent=1) + "\n")
    text = table({attacks.name: found})
    write_text(RESULTS / "hippocampus_methods.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
