"""Is the ensemble stronger than each of its members, than long PGD, and than noise? And is its budget enough?

On the models of ``hippocampus_small.py``, ``sound``. First part: ``nnunet_ima evaluate`` with the ensemble, which
notes what each of its members reached alone, with PGD with restarts and with white noise, at three levels of both
norms. Second part, at one level where some Dice is left: ten times the budget of every member, and an attack that
shares no code with ours (Adam on MONAI's loss, scored by MONAI's Dice). Some hours on two cores, minutes on a GPU with
``--jobs``; started again, it goes on where it stopped.

    python benchmarks/ensemble.py -o <folder of hippocampus_small.py> [--samples 32] [--jobs 14] [-device cuda]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
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

from nnunet_ima.attacks import APGD, FAB, Attack, AutoAttack, Square, TargetedAPGD
from nnunet_ima.attacks.autoattack import VERSIONS
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.files import write_text
from nnunet_ima.lp import Norm
from nnunet_ima.precision import use_exact_convolutions
from nnunet_ima.threat import ThreatModel

ENSEMBLE = "autoattack"
OTHERS = (
    "autoattack:version=strong",
    "autoattack:version=fast",
    "autoattack:mode=threshold",
    "pgd:steps=100,restarts=5",
    "white-noise:draws=100",
)
LEVELS: dict[Norm, tuple[str, ...]] = {"l2": ("5", "10", "15"), "linf": ("1/255", "2/255", "4/255")}
MODELS: dict[str, Method] = {"stock": STD_LONGER, "ima": IMA}
# Where an attack leaves some Dice: at 0 no budget could find less.
TENFOLD_AT = {"stock": "2", "ima": "5"}
MEMBERS = tuple(VERSIONS["standard"])
ADAM_STEPS, ADAM_RESTARTS, ADAM_RATE = 500, 2, 0.02


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    options = _options()
    if options.search is not None:
        search(options)
        return
    if not options.collect:
        with ThreadPoolExecutor(options.jobs) as pool:
            # The longest first.
            for done in [pool.submit(job) for job in (*_searches(options), *_levels(options))]:
                done.result()
    result: dict[str, Any] = {
        "command": "python "
        + shlex.join(["benchmarks/ensemble.py", "-o", "WORK", "--samples", str(options.samples)])
        + f" -device {options.device}",
        "hardware": {"machine": platform.machine(), "cores": os.cpu_count(), "device": _device_name(options.device)},
        "versions": versions(),
        "levels": [row for name in options.models for norm in LEVELS for row in _rows(options, name, norm)],
        "tenfold": [_budget(options, name) for name in options.models],
    }
    text = table(result)
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / "ensemble.json", json.dumps(result, indent=1) + "\n")
    write_text(options.results / "ensemble.md", text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tenfold", nargs="*", choices=MEMBERS, default=list(MEMBERS), help="members with more budget")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    parser.add_argument("--collect", action="store_true", help="only put together what is there")
    parser.add_argument("--search", nargs=2, metavar=("MODEL", "WHAT"), help="one search of the second part")
    parser.add_argument("-device", default="cpu")
    return parser.parse_args()


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else device


def _pipeline(options: argparse.Namespace, logs: str = "logs") -> Pipeline:
    return Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device, logs=logs)


# ---- first part: the ensemble at all levels


def _levels(options: argparse.Namespace) -> list[Any]:
    """A job for each model, norm and level."""
    found = []
    for name in options.models:
        for norm, levels in LEVELS.items():
            for level in levels:
                found.append(lambda name=name, norm=norm, level=level: _evaluate(options, name, norm, level))
    return found


def _evaluate(options: argparse.Namespace, name: str, norm: Norm, level: str) -> None:
    attacks = _attacks(options, norm, level)
    pipeline = _pipeline(options, f"logs_{attacks.name}_{name}")
    (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
    pipeline.evaluate(dataset, MODELS[name], attacks)


def _attacks(options: argparse.Namespace, norm: Norm, level: str) -> Attacks:
    further = ("--max-samples", str(options.samples), "--no-cases")
    name = f"ensemble_{norm}_{level.replace('/', '_of_')}"
    return Attacks(name, (level,), (ENSEMBLE, *OTHERS), norm, further=further)


def _rows(options: argparse.Namespace, name: str, norm: Norm) -> list[dict[str, Any]]:
    """A row an attack, member and level."""
    pipeline, rows = _pipeline(options), []
    for level in LEVELS[norm]:
        run = pipeline.output / f"{_attacks(options, norm, level).name}_{pipeline.key(MODELS[name])}"
        if not (run / "summary.json").is_file():
            continue
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        common = {"model": name, "norm": norm, "level": level, "device": summary["device"]}
        clean = {"attack": "clean", "tvdi": summary["clean"]["tvdi"], "adi": summary["clean"]["adi"]}
        rows.append({**common, **clean, "trusted": summary["trusted"], "samples": summary["clean"]["n_samples"]})
        kept = ["attack", "tvdi", "adi", "robust_share", "tvdi_of_lowest_dice"]
        kept += ["forward_passes_per_sample", "backward_passes_per_sample"]
        for found in summary["results"]:
            rows.append({**common, **{key: found[key] for key in kept}})
            members = found["by_attack"] if found["attack"] == ENSEMBLE else {}
            for member, figures in members.items():
                # A member is not asked about samples at Dice 0: over all samples they count with that.
                asked = figures["attacked_samples"]
                lowest = (figures["adi"] or 0.0) * asked / summary["clean"]["n_samples"]
                row = {"attack": f"– {member}", "tvdi": figures["tvdi"], "adi": lowest, "asked": asked}
                rows.append({**common, **row})
    return rows


# ---- second part: more budget


def _searches(options: argparse.Namespace) -> list[Any]:
    """A job for each model and search that is not done."""
    names = [f"tenfold {member}" for member in reversed(options.tenfold)]
    return [
        lambda name=name, what=what: _search_apart(options, name, what)
        for what in (*names, "standard", "adam")
        for name in options.models
        if not _search_file(options, name, what).is_file()
    ]


def _search_apart(options: argparse.Namespace, name: str, what: str) -> None:
    """In a process of its own, as a GPU waits for one of them most of the time."""
    command = [sys.executable, __file__, "-o", str(options.output), "--samples", str(options.samples)]
    subprocess.run([*command, "-device", options.device, "--search", name, what], check=True)


def _search_file(options: argparse.Namespace, name: str, what: str) -> Path:
    return Path(options.output / "ensemble_searches" / f"{name}_{what.replace(' ', '_')}_{options.samples}.json")


def search(options: argparse.Namespace) -> None:
    """Dice of each slice under one search, into a file."""
    name, what = options.search
    pipeline = _pipeline(options)
    os.environ.update(pipeline.steps.environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    use_exact_convolutions()
    network, images, targets, make = prepared(pipeline, MODELS[name], TENFOLD_AT[name], options)
    standard = make(AutoAttack)
    assert isinstance(standard, AutoAttack)
    passes, members = 0.0, {}
    if what == "adam":
        dice = independent(network, images, targets, standard.threat)
        clean = dice_by_monai(logits_of(network, images).detach(), targets)
        passes = 2.0 * ADAM_STEPS * ADAM_RESTARTS
    else:
        attack: Attack = standard
        if what != "standard":
            member = standard.chosen_members()[what.removeprefix("tenfold ")]
            attack = longer(member)
        attack = replace(
            attack, chunk=len(images), graphs=CudaGraphs(len(images)) if options.device == "cuda" else None
        )
        found = attack(network, images, targets)
        dice, clean = found.dice, found.clean_dice
        passes = float((found.forward_passes + found.backward_passes).double().mean())
        by_attack = getattr(found, "by_attack", {})
        members = {key: float(part.dice.double().nan_to_num(0.0).mean()) for key, part in by_attack.items()}
    file = _search_file(options, name, what)
    file.parent.mkdir(exist_ok=True)
    content = {"dice": dice.tolist(), "clean": clean.tolist(), "passes": passes, "members": members}
    write_text(file, json.dumps({**content, "device": _device_name(options.device)}))


def _budget(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Mean Dice under the standard ensemble, under ten times its budget, and under an attack written independently."""

    def found(what: str) -> dict[str, Any] | None:
        file = _search_file(options, name, what)
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def mean(values: list[float] | None) -> float | None:
        return None if values is None else sum(values) / len(values)

    standard, adam = found("standard"), found("adam")
    tenfold = {member: found(f"tenfold {member}") for member in MEMBERS}
    there = [part["dice"] for part in tenfold.values() if part is not None]
    lowest = [min(values) for values in zip(*there, strict=True)] if there else None
    return {
        "model": name,
        "norm": "l2",
        "level": TENFOLD_AT[name],
        "samples": options.samples,
        "clean": mean(standard["clean"]) if standard else None,
        "standard": mean(standard["dice"]) if standard else None,
        "standard_members": standard["members"] if standard else None,
        "tenfold": mean(lowest),
        "tenfold_members": {member: mean(part["dice"]) for member, part in tenfold.items() if part},
        "tenfold_missing": [member for member, part in tenfold.items() if not part],
        "devices": {what: part.get("device") for what, part in (("standard", standard), *tenfold.items()) if part},
        "independent": mean(adam["dice"]) if adam else None,
        "passes": {
            "standard": standard["passes"] if standard else None,
            "tenfold": sum(part["passes"] for part in tenfold.values() if part),
            "independent": adam["passes"] if adam else None,
        },
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
    for restart in range(ADAM_RESTARTS):
        noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(restart)).to(images)
        change = _within(0.1 * restart * noise, images, epsilon, low, high).requires_grad_()
        optimiser = torch.optim.Adam([change], lr=ADAM_RATE * epsilon / 5)
        for _ in range(ADAM_STEPS):
            logits = logits_of(network, images + change)
            lowest = torch.minimum(lowest, dice_by_monai(logits.detach(), targets))
            optimiser.zero_grad()
            entropy = cross_entropy(logits, targets[:, 0].long(), reduction="none")
            (-overlap(logits, targets).flatten(1).mean(1) - entropy.flatten(1).mean(1)).sum().backward()
            optimiser.step()
            with torch.no_grad():
                change.copy_(_within(change, images, epsilon, low, high))
        lowest = torch.minimum(lowest, dice_by_monai(logits_of(network, images + change).detach(), targets))
    return lowest


def _within(change: Tensor, images: Tensor, epsilon: float, low: Tensor, high: Tensor) -> Tensor:
    """Into the L2 ball, then into the range, which only shortens it."""
    norm = change.flatten(1).norm(dim=1).clamp_min(1e-12)
    shorter = change * (epsilon / norm).clamp_max(1)[:, None, None, None]
    return torch.minimum(torch.maximum(images + shorter, low), high) - images


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
    for model, norm in dict.fromkeys((row["model"], row["norm"]) for row in result["levels"]):
        rows = {(row["attack"], row["level"]): row for row in result["levels"]
                if (row["model"], row["norm"]) == (model, norm)}  # fmt: skip
        levels = [level for level in LEVELS[norm] if ("clean", level) in rows]
        clean = rows["clean", levels[0]]
        trusted = all(rows["clean", level]["trusted"] for level in levels)
        lines += [f"\n{model}, {norm}, {clean['samples']} slices; clean {cell(clean)}; checks "
                  f"{'passed' if trusted else 'FAILED'}\n"]  # fmt: skip
        lines += ["| attack | " + " | ".join(f"{level}: TVDI / ADI | passes" for level in levels) + " |"]
        lines += ["| --- |" + " --- |" * (2 * len(levels))]
        for attack in dict.fromkeys(attack for attack, _ in rows if attack != "clean"):
            cells = []
            for level in levels:
                row = rows[attack, level]
                passes = row.get("forward_passes_per_sample", 0) + row.get("backward_passes_per_sample", 0)
                shown = "nothing was left" if row.get("asked") == 0 else cell(row)
                cells.append(f"{shown} | {passes:.0f}" if passes else f"{shown} | ")
            lines.append(f"| {attack} | " + " | ".join(cells) + " |")
    lines += ["\nMean Dice in %:\n", "| model | level | slices | clean | standard | ten times the budget | Adam |"]
    lines += ["| --- |" + " --- |" * 6]
    for row in result["tenfold"]:
        keys = ("clean", "standard", "tenfold", "independent")
        figures = " | ".join("–" if row[key] is None else f"{100 * row[key]:.1f}" for key in keys)
        missing = f" (without {', '.join(row['tenfold_missing'])})" if row["tenfold_missing"] else ""
        lines.append(f"| {row['model']} | L2 {row['level']} | {row['samples']} | {figures}{missing} |")
    return "\n".join(lines).strip() + "\n"


def cell(row: dict[str, Any]) -> str:
    """TVDI / ADI in %."""
    return f"{100 * row['tvdi']:.1f} / {100 * row['adi']:.1f}"


if __name__ == "__main__":
    main()
