"""Do FAB's smallest perturbations agree with those of BPGD with fine steps? On the models of ``hippocampus_small.py``.

BPGD is run again and again in a ball a little smaller than its last crossing, as where it crosses depends on ε. Prints
quantiles of the ratio of the two norms. A quarter of an hour for 24 slices on a free core.

    python benchmarks/smallest_perturbations.py -o <folder of hippocampus_small.py> [--samples 24] [-device cpu]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from attacks import prepared
from hippocampus_small import IMA, NETWORK, STD_LONGER
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_ima.attacks import BPGD, FAB, Attack
from nnunet_ima.evaluation.pipeline import Pipeline
from nnunet_ima.hyperplane import relative_radius, size
from nnunet_ima.lp import Norm

RUNS = 8
LARGEST: dict[Norm, tuple[str, float]] = {
    "l2": ("5", 8.0),
    "linf": ("4/255", 4.0),
}  # level, and how many times ε BPGD begins with at most


def main() -> None:
    """Compare on both models and in both norms."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    os.environ.update(pipeline.steps.environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for norm, (level, _) in LARGEST.items():
        for method in (STD_LONGER, IMA):
            network, images, targets, make = prepared(pipeline, method, level, options, norm)
            ratio = compared(make(FAB), network, images, targets)
            shown = ", ".join(f"{float(ratio.quantile(q)):.2f}" for q in (0.1, 0.5, 0.9))
            sys.stdout.write(f"{method.title}, {norm}: {len(ratio)} samples, deciles 1, 5 and 9: {shown}\n")


def compared(like: Attack, network: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """FAB's norm as a share of BPGD's, for each sample that BPGD makes wrong; with the threat model of ``like``."""
    threat, criterion, chunk = like.threat, like.criterion, like.chunk
    margins = FAB(threat, criterion, steps=60, chunk=chunk).margins(network, images, targets)
    channels = relative_radius(threat, images).flatten(1) if threat.norm == "linf" else None
    distance = LARGEST[threat.norm][1] * (threat.radius(images).flatten(1).amax(1) if channels is not None else 1.0)
    distance = torch.as_tensor(distance).expand(len(images)).clone().to(images)
    found = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    start = threat.project(images, images)
    for run in tqdm(range(RUNS), leave=False, unit="run"):
        epsilon = 0.95 * distance
        ball = threat.with_epsilon(epsilon if channels is None else epsilon[:, None] * channels)
        loss = ("dice-odds", "balanced-ce")[run % 2]
        crossed = BPGD(ball, criterion, loss, steps=40, bisections=8, chunk=chunk)(network, images, targets)
        wrong = ~criterion.is_correct(crossed.dice) & criterion.is_correct(crossed.clean_dice)
        found |= wrong
        there = size(threat, crossed.images - start, images)
        distance = torch.where(wrong, torch.minimum(distance, there), distance)
    return (margins.norms / distance)[found]


if __name__ == "__main__":
    main()
