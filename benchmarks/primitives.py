"""What oneDNN's cache of kernels costs IMA's step on a CPU, and what does the way in which its threads wait?

Passes as in a step of IMA with batch 32: five with the gradient for ever fewer samples, five that only ask for the Dice
of those that crossed, two training passes with an update; the sizes are drawn at random, alike for all variants. Each
variant runs in a process of its own, as oneDNN and OpenMP read their variables once; the variants take turns. Needs a
trained 2D model with its preprocessed data, such as docs/examples/robustness-gate.yml makes.

    python benchmarks/primitives.py -m <model folder> [--rounds 3] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from nnunet_ima.attacks.oracle import Oracle, undisturbed
from nnunet_ima.evaluation.batch import load_batch
from nnunet_ima.evaluation.cases import ValidationCases
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.evaluation.protocols import Protocol
from nnunet_ima.evaluation.run import select_samples
from nnunet_ima.files import write_text
from nnunet_ima.losses import SegmentationLoss, first
from nnunet_ima.precision import precision_of
from nnunet_ima.primitives import CAPACITY, PRIMITIVES

RESULTS = Path(__file__).parent / "results"
BATCH, ASCENTS, HALVINGS = 32, 5, 5
WARM_UP, STEPS = 20, 20
PRECISIONS = ("bfloat16", "float32")
# What a variant puts into its environment; "" takes the variable away.
VARIANTS = {
    "oneDNN's default, threads sleep": {CAPACITY: "", "OMP_WAIT_POLICY": "PASSIVE"},
    "kernels kept, threads sleep": {CAPACITY: str(PRIMITIVES), "OMP_WAIT_POLICY": "PASSIVE"},
    "oneDNN's default, threads spin": {CAPACITY: "", "OMP_WAIT_POLICY": ""},
    "kernels kept, threads spin": {CAPACITY: str(PRIMITIVES), "OMP_WAIT_POLICY": ""},
}


def main() -> None:
    """Measure all variants in turn, or be one of them."""
    options = _options()
    if options.one:
        print(json.dumps(seconds_of_steps(options)))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[dict[str, float]]] = {}
    turns = [(name, precision) for _ in range(options.rounds) for name in VARIANTS for precision in PRECISIONS]
    for name, precision in tqdm(turns, desc="variants", unit="run"):
        found.setdefault(f"{name}, {precision}", []).append(_run(options, VARIANTS[name], precision))
    result = {
        "command": f"python benchmarks/primitives.py -m <model> --rounds {options.rounds} --threads {options.threads}",
        "cores": os.cpu_count(),
        "load at the end": round(os.getloadavg()[0], 1),
        "versions": versions(),
        "runs": found,
    }
    write_text(options.results / "primitives.json", json.dumps(result, indent=1) + "\n")
    text = table(found)
    write_text(options.results / "primitives.md", text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("-f", "--fold", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", choices=PRECISIONS, help=argparse.SUPPRESS)
    return parser.parse_args()


def _run(options: argparse.Namespace, variables: dict[str, str], precision: str) -> dict[str, float]:
    environment = {name: value for name, value in {**os.environ, **variables}.items() if value}
    command = [sys.executable, __file__, "-m", str(options.model), "-f", str(options.fold), "--one", precision]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def sizes(draw: random.Random) -> Iterator[tuple[list[int], int, int]]:
    """For each step: samples of its ascents, of its bisection, and those that are perturbed."""
    while True:
        perturbed = draw.randint(14, 24)
        ascents = [perturbed]
        while len(ascents) < ASCENTS:
            ascents.append(max(1, ascents[-1] - draw.randint(0, 5)))
        yield ascents, draw.randint(6, 14), perturbed


def seconds_of_steps(options: argparse.Namespace) -> dict[str, float]:
    """Mean seconds of the attack and of the whole step, and CPU seconds of the latter, after a warm-up."""
    torch.set_num_threads(options.threads)
    device = torch.device("cpu")
    model = load_model(options.model, options.fold, "checkpoint_final.pth", device)
    cases = ValidationCases(model)
    chosen = select_samples(cases, BATCH, 0, progress=False, whole_cases=False).samples
    images, targets, _ = load_batch(cases, chosen, Protocol("sound", "l2"), None, device)
    loss, network = SegmentationLoss(model.labels), model.network
    autocast = partial(torch.autocast, "cpu", dtype=torch.bfloat16) if options.one == "bfloat16" else nullcontext
    assert precision_of(autocast, device) == options.one
    optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
    spent: list[tuple[float, float, float]] = []
    for _, (ascents, crossed, perturbed) in zip(range(WARM_UP + STEPS), sizes(random.Random(0)), strict=False):
        started, worked = time.perf_counter(), time.process_time()
        with undisturbed(network):
            oracle = Oracle(network, targets, loss, None, autocast=autocast)
            for size in ascents:
                oracle.ascent(images[:size], torch.arange(size))
            for _ in range(HALVINGS):
                oracle.dice(images[:crossed], torch.arange(crossed))
        attacked = time.perf_counter()
        value = first(network(images)).mean() + first(network(images[:perturbed])).mean()
        value.backward()  # type: ignore[no-untyped-call]  # torch has no annotations here
        optimizer.step()
        optimizer.zero_grad()
        spent.append((attacked - started, time.perf_counter() - started, time.process_time() - worked))
    names = ("attack", "step", "CPU")
    return {name: round(statistics.fmean(row[i] for row in spent[WARM_UP:]), 4) for i, name in enumerate(names)}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Ratios to the first variant of the same precision, the mean over the rounds of each being compared."""
    lines = [
        f"Of the same steps in the first variant of the same precision; {len(next(iter(found.values())))} rounds.",
        "",
        "| variant | attack | step | CPU time of the step |",
        "| --- | --- | --- | --- |",
    ]
    for name, runs in found.items():
        base = found[f"{next(iter(VARIANTS))}, {name.rsplit(', ', 1)[1]}"]
        ratios = [
            statistics.fmean(run[part] for run in runs) / statistics.fmean(run[part] for run in base)
            for part in ("attack", "step", "CPU")
        ]
        lines.append(f"| {name} | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
