"""Is the ensemble stronger than each of its members, than long PGD, and than noise? And is its budget enough?

On the models of ``hippocampus_small.py``, ``sound``. First part: ``nnunet_ima evaluate`` with the ensemble, each
of its members alone, PGD with restarts and white noise, at three levels of both norms. Second part, at one level where
some Dice is left: ten times the budget of every member, and an attack that shares no code with ours (Adam on MONAI's
loss, scored by MONAI's Dice). Two hours on two free cores; started again, the first part goes on where it stopped.

    python benchmarks/ensemble.py -o <folder of hippocampus_small.py> [--samples 16] [-device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from attacks import prepared
from hippocampus_small import IMA, NETWORK, RESULTS, STD_LONGER
from monai.losses import DiceLoss
from monai.metrics import compute_dice
from monai.networks.utils import one_hot
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softmax
from tqdm import tqdm

from nnunet_ima.attacks import APGD, FAB, Attack, AutoAttack, Square, TargetedAPGD
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.files import write_text
from nnunet_ima.lp import Norm
from nnunet_ima.threat import ThreatModel

ENSEMBLE = "autoattack"
MEMBERS = (
    "apgd:loss=dice-ce",
    "apgd:loss=ce",
    "apgd:loss=dlr",
    "apgd:loss=balanced-ce",
    "apgd-t",
    "fab",
    "square",
)
OTHERS = (
    "autoattack:version=strong",
    "autoattack:version=fast",
    "autoattack:mode=threshold",
    "pgd:steps=100,restarts=5",
    "white-noise:draws=100",
)
LEVELS: dict[Norm, tuple[str, ...]] = {"l2": ("5", "10", "15"), "linf": ("1/255", "2/255", "4/255")}
# Where an attack leaves some Dice: at 0 no budget could find less.
TENFOLD_AT: dict[str, str] = {STD_LONGER.title: "2", IMA.title: "5"}
ADAM_STEPS, ADAM_RESTARTS, ADAM_RATE = 500, 2, 0.02


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tenfold-samples", type=int, default=32)
    parser.add_argument("--models", nargs="+", choices=["stock", "ima"], default=["stock", "ima"])
    parser.add_argument("--parts", nargs="+", choices=["levels", "tenfold"], default=["levels", "tenfold"])
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    os.environ.update(pipeline.steps.environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
    result: dict[str, Any] = {
        "command": "python "
        + shlex.join(["benchmarks/ensemble.py", "-o", "WORK", "--samples", str(options.samples)])
        + f" --tenfold-samples {options.tenfold_samples} -device {options.device}",
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": options.device},
        "versions": versions(),
        "levels": [],
        "tenfold": [],
    }
    chosen = [{"stock": STD_LONGER, "ima": IMA}[name] for name in options.models]
    for method in chosen:
        if "levels" in options.parts:
            for norm in LEVELS:
                result["levels"] += at_levels(pipeline, dataset, method, norm, options.samples)
        if "tenfold" in options.parts:
            result["tenfold"].append(more_budget(pipeline, method, options))
    text = table(result)
    if len(chosen) == len(options.parts) == 2:
        RESULTS.mkdir(exist_ok=True)
        write_text(RESULTS / "ensemble.json", json.dumps(result, indent=1) + "\n")
        write_text(RESULTS / "ensemble.md", text)
    sys.stdout.write(text)


def at_levels(pipeline: Pipeline, dataset: Path, method: Method, norm: Norm, samples: int) -> list[dict[str, Any]]:
    """``nnunet_ima evaluate`` with the ensemble, its members and the others: a row an attack and level."""
    attacks = Attacks(
        f"ensemble_{norm}",
        LEVELS[norm],
        (ENSEMBLE, *MEMBERS, *OTHERS),
        norm,
        further=("--max-samples", str(samples), "--no-cases"),
    )
    folder = pipeline.evaluate(dataset, method, attacks)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    figures = ("tvdi", "tvdi_of_lowest_dice", "adi", "robust_share")
    kept = ("attack", "level", *figures, "forward_passes_per_sample", "backward_passes_per_sample")
    clean = {"attack": "clean", "level": "0", "tvdi": summary["clean"]["tvdi"], "adi": summary["clean"]["adi"]}
    rows = [clean] + [{key: found[key] for key in kept} for found in summary["results"]]
    return [{"model": method.title, "norm": norm, "trusted": summary["trusted"], **row} for row in rows]


def more_budget(pipeline: Pipeline, method: Method, options: argparse.Namespace) -> dict[str, Any]:
    """Mean Dice under the standard ensemble, under ten times its budget, and under an attack written independently."""
    level = TENFOLD_AT[method.title]
    network, images, targets, make = prepared(
        pipeline, method, level, argparse.Namespace(samples=options.tenfold_samples, device=options.device)
    )
    standard = make(AutoAttack)
    assert isinstance(standard, AutoAttack)
    first = standard(network, images, targets)
    tenfold = replace(standard, members={name: longer(one) for name, one in standard.chosen_members().items()})
    second = tenfold(network, images, targets)
    third = independent(network, images, targets, standard.threat)
    lowest = torch.minimum(first.dice, third)
    return {
        "model": method.title,
        "norm": "l2",
        "level": level,
        "samples": len(images),
        "clean": float(first.clean_dice.double().mean()),
        "standard": float(first.dice.double().mean()),
        "tenfold": float(second.dice.double().mean()),
        "independent": float(third.double().mean()),
        "lower_of_standard_and_independent": float(lowest.double().mean()),
        "passes": [float((r.forward_passes + r.backward_passes).double().mean()) for r in (first, second)],
    }


def longer(attack: Attack) -> Attack:
    """The same attack with ten times its budget: steps of APGD, APGD-T and FAB, queries of Square."""
    if isinstance(attack, Square):
        return replace(attack, n_queries=10 * attack.n_queries)
    assert isinstance(attack, (APGD, TargetedAPGD, FAB))
    return replace(attack, steps=10 * attack.steps)


def independent(network: nn.Module, images: Tensor, targets: Tensor, threat: ThreatModel) -> Tensor:
    """Lowest Dice (B,) that Adam finds on MONAI's Dice + cross entropy, in the L2 ball; none of our attacks' code."""
    low, high = (torch.as_tensor(end).to(images) for end in (threat.low, threat.high))
    epsilon = float(torch.as_tensor(threat.epsilon).max())
    overlap = DiceLoss(to_onehot_y=True, softmax=True, include_background=False, reduction="none")
    lowest = torch.full((len(images),), torch.inf, device=images.device)
    for restart in tqdm(range(ADAM_RESTARTS), desc="Adam", unit="start", leave=False):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(restart)).to(images)
        change = (0.1 * restart * noise).requires_grad_()
        optimiser = torch.optim.Adam([change], lr=ADAM_RATE * epsilon / 5)
        for _ in range(ADAM_STEPS):
            logits = logits_of(network, images + change)
            lowest = torch.minimum(lowest, dice_by_monai(logits.detach(), targets))
            optimiser.zero_grad()
            entropy = cross_entropy(logits, targets[:, 0].long(), reduction="none")
            (-overlap(logits, targets).flatten(1).mean(1) - entropy.flatten(1).mean(1)).sum().backward()
            optimiser.step()
            with torch.no_grad():
                norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
                change *= (epsilon / norm).clamp_max(1)[:, None, None, None]
                change.copy_(torch.minimum(torch.maximum(images + change, low), high) - images)
        lowest = torch.minimum(lowest, dice_by_monai(logits_of(network, images + change).detach(), targets))
    return lowest


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """At full resolution, whether the network has deep supervision or not."""
    logits = network(images)
    found: Tensor = logits if isinstance(logits, Tensor) else logits[0]
    return found


def dice_by_monai(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the foreground classes that are there or were found, (B,)."""
    classes = logits.shape[1]
    predicted = one_hot(softmax(logits, 1).argmax(1, keepdim=True), classes)
    dice = compute_dice(predicted, one_hot(targets, classes), include_background=False, ignore_empty=False)
    there = (predicted.flatten(2).any(2) | one_hot(targets, classes).flatten(2).any(2))[:, 1:]
    scores: Tensor = (dice * there).sum(1) / there.sum(1).clamp_min(1)
    return scores


def table(result: dict[str, Any]) -> str:
    """TVDI / ADI in % of every attack at every level; then what more budget finds."""
    lines: list[str] = []
    groups = dict.fromkeys((row["model"], row["norm"]) for row in result["levels"])
    for model, norm in groups:
        rows = [row for row in result["levels"] if (row["model"], row["norm"]) == (model, norm)]
        levels = LEVELS[norm]
        clean = next(row for row in rows if row["attack"] == "clean")
        lines += [f"\n{model}, {norm}; clean {cell(clean)}; checks {'passed' if clean['trusted'] else 'FAILED'}\n"]
        lines += ["| attack | " + " | ".join(f"{level}: TVDI / ADI | passes" for level in levels) + " |"]
        lines += ["| --- |" + " --- |" * (2 * len(levels))]
        for attack in dict.fromkeys(row["attack"] for row in rows if row["attack"] != "clean"):
            cells = []
            for level in levels:
                row = next(row for row in rows if (row["attack"], row["level"]) == (attack, level))
                passes = row["forward_passes_per_sample"] + row["backward_passes_per_sample"]
                cells.append(f"{cell(row)} | {passes:.0f}")
            lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    if result["tenfold"]:
        lines += ["\nMean Dice in %:\n", "| model | level | slices | clean | standard | ten times the budget | Adam |"]
        lines += ["| --- |" + " --- |" * 6]
    for row in result["tenfold"]:
        figures = " | ".join(f"{100 * row[key]:.1f}" for key in ("clean", "standard", "tenfold", "independent"))
        lines.append(f"| {row['model']} | L2 {row['level']} | {row['samples']} | {figures} |")
    return "\n".join(lines).strip() + "\n"


def cell(row: dict[str, Any]) -> str:
    """TVDI / ADI in %."""
    return f"{100 * row['tvdi']:.1f} / {100 * row['adi']:.1f}"


if __name__ == "__main__":
    main()
