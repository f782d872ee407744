"""Which attack finds the lowest Dice, and for how many passes? On the models of ``hippocampus_small.py``.

Runs every attack on the same validation slices of a stock and a hardened model, and notes after every pass how low
the mean Dice is so far. A pass is a forward or a backward pass of one sample through the network. A quarter of an hour
for 16 slices on a free core. Writes a JSON, a table, and a picture.

    python benchmarks/attacks.py -o <folder of hippocampus_small.py> [--samples 16] [--levels 2 5] [-device cpu]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from hippocampus_small import IMA, NETWORK, PICTURES, RESULTS, STD_LONGER
from torch import Tensor, nn
from tqdm import tqdm

from nnunet_ima.attack_losses import LOSSES
from nnunet_ima.attacks import (
    APGD,
    BPGD,
    FAB,
    FGSM,
    IFGSM,
    PGD,
    SPSA,
    Attack,
    Square,
    TargetedAPGD,
    WhiteNoise,
)
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.pipeline import Method, Pipeline
from nnunet_ima.files import atomic_path, write_text
from nnunet_ima.lp import Norm

BUDGETS = (25, 50, 100, 200, 500, 1000)
ATTACKS: dict[str, Callable[..., Attack]] = {
    "white-noise": partial(WhiteNoise, draws=100),
    "fgsm": FGSM,
    "ifgsm": IFGSM,
    "pgd": partial(PGD, steps=100),
    "pgd, 5 restarts": partial(PGD, steps=100, restarts=5),
    "bpgd": BPGD,
    **{f"apgd {loss}": partial(APGD, loss=loss) for loss in LOSSES},
    **{
        f"apgd {loss}, shrinking": partial(APGD, loss=loss, schedule="shrinking")
        for loss in ("dice-ce", "dice-odds", "balanced-ce", "masked-ce", "js")
    },
    "apgd-t": TargetedAPGD,
    "fab": partial(FAB, steps=50),
    "spsa": partial(SPSA, steps=5, samples=80),
    "square": partial(Square, n_queries=500),
}
DRAWN = ("white-noise", "pgd", "apgd ce", "apgd dice-ce", "apgd balanced-ce", "apgd dice-odds", "fab", "square")


def main() -> None:
    """Attack both models, then write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--levels", nargs=2, default=["2", "5"], help="L2, of the stock and of the hardened model")
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS), metavar="NAME")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    os.environ.update(pipeline.steps.environment)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rows = []
    models = zip((STD_LONGER, IMA), options.levels, strict=True)
    jobs = [(method, level, name) for method, level in models for name in options.attacks]
    for method, level, name in tqdm(jobs, unit="attack", dynamic_ncols=True):
        rows.append(
            {"model": method.title, "level": level, "attack": name, **run(pipeline, method, level, name, options)}
        )
    result = {
        "command": "python "
        + shlex.join(
            ["benchmarks/attacks.py", "-o", "WORK", "--samples", str(options.samples), "--levels", *options.levels]
            + ([] if options.attacks == list(ATTACKS) else ["--attacks", *options.attacks])
            + ["-device", options.device]
        ),
        "hardware": {"machine": platform.machine(), "threads": torch.get_num_threads(), "device": options.device},
        "versions": versions(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    write_text(RESULTS / "attacks.json", json.dumps(result, indent=None) + "\n")
    write_text(RESULTS / "attacks.md", table(rows))
    draw(rows, PICTURES / "attacks.png")
    sys.stdout.write(table(rows))


def run(pipeline: Pipeline, method: Method, level: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One attack on one model: the curve of mean Dice against passes, and where it ends."""
    network, images, targets, make = prepared(pipeline, method, level, options)
    attack = make(ATTACKS[name])
    curve: list[tuple[float, float]] = []
    with attack.session(network, images, targets) as (oracle, best):
        keep = best.update

        def update(index: Tensor, points: Tensor, dice: Tensor) -> None:
            keep(index, points, dice)
            passes = (oracle.forward_passes + oracle.backward_passes).double().mean()
            curve.append((float(passes), float(best.dice.double().mean())))

        vars(best)["update"] = update
        update(torch.arange(0), images[:0], best.dice[:0])
        attack.run(oracle, images, best)
    dice = best.dice
    return {
        "adi": float(dice.double().mean()),
        "wrong_share": float((dice <= attack.criterion.threshold).double().mean()),
        "forward_passes": float(oracle.forward_passes.double().mean()),
        "backward_passes": float(oracle.backward_passes.double().mean()),
        "after": {str(budget): after(curve, budget) for budget in BUDGETS},
        "curve": thinned(curve),
    }


_PREPARED: dict[tuple[str, str], Any] = {}


def prepared(
    pipeline: Pipeline, method: Method, level: str, options: argparse.Namespace, norm: Norm = "l2"
) -> tuple[nn.Module, Tensor, Tensor, Callable[[Callable[..., Attack]], Attack]]:
    """Network, images and targets of a model's validation slices, and what makes an attack of a class."""
    # nnU-Net reads its folders from the environment when it is imported.
    from nnunet_ima.dice import DiceCriterion
    from nnunet_ima.evaluation.batch import load_batch
    from nnunet_ima.evaluation.cases import ValidationCases
    from nnunet_ima.evaluation.models import load_model
    from nnunet_ima.evaluation.protocols import Protocol, parse_level
    from nnunet_ima.evaluation.run import select_samples

    key = method.title, level
    if key not in _PREPARED:
        device = torch.device(options.device)
        (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
        model = load_model(
            pipeline.model(dataset, method), pipeline.fold(dataset, method), "checkpoint_final.pth", device
        )
        cases = ValidationCases(model)
        chosen = select_samples(cases, options.samples, 0, progress=False, whole_cases=False).samples
        images, targets, threat = load_batch(cases, chosen, Protocol("sound", norm), parse_level(level, norm), device)
        criterion = DiceCriterion(labels=model.labels)
        _PREPARED[key] = (
            model.network, images, targets, lambda kind: kind(threat, criterion, chunk=min(16, options.samples))
        )  # fmt: skip
    found: tuple[nn.Module, Tensor, Tensor, Callable[[Callable[..., Attack]], Attack]] = _PREPARED[key]
    return found


def after(curve: list[tuple[float, float]], budget: float) -> float:
    """Mean Dice after no more than ``budget`` passes a sample."""
    return [dice for passes, dice in curve if passes <= budget][-1]


def thinned(curve: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Some sixty points of a curve, evenly on a logarithmic axis, and the last one."""
    kept, next_at = [], 0.0
    for passes, dice in curve:
        if passes >= next_at:
            kept.append((round(passes, 2), round(dice, 5)))
            next_at = max(passes, 0.5) * 1.12
    return [*kept, (round(curve[-1][0], 2), round(curve[-1][1], 5))]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean Dice in % after so many passes a sample."""
    lines: list[str] = []
    for model, level in dict.fromkeys((row["model"], row["level"]) for row in rows):
        mine = [row for row in rows if (row["model"], row["level"]) == (model, level)]
        lines += [f"\n{model}, L2 {level}: mean Dice in % after at most so many passes a sample\n"]
        lines += ["| attack | " + " | ".join(map(str, BUDGETS)) + " | at the end | passes | wrong |"]
        lines += ["| --- |" + " --- |" * (len(BUDGETS) + 3)]
        for row in sorted(mine, key=lambda row: row["adi"]):
            cells = [f"{100 * row['after'][str(b)]:.1f}" for b in BUDGETS]
            passes = row["forward_passes"] + row["backward_passes"]
            end = f"{100 * row['adi']:.1f} | {passes:.0f} | {100 * row['wrong_share']:.0f} %"
            lines.append(f"| {row['attack']} | " + " | ".join(cells) + f" | {end} |")
    return "\n".join(lines).strip() + "\n"


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Mean Dice against passes, a panel for each model and level."""
    panels = list(dict.fromkeys((row["model"], row["level"]) for row in rows))
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.2), dpi=110, sharey=True, squeeze=False)
    for panel, (model, level) in zip(axes[0], panels, strict=True):
        for row in rows:
            if (row["model"], row["level"]) == (model, level) and row["attack"] in DRAWN:
                colour = f"C{DRAWN.index(row['attack'])}"
                # A sample that is at 0 costs nothing more: the curve of the mean then ends early.
                panel.plot(
                    *zip(*((p, 100 * d) for p, d in row["curve"]), strict=True), color=colour, label=row["attack"]
                )
                panel.plot(row["curve"][-1][0], 100 * row["curve"][-1][1], "o", color=colour, markersize=4)
        panel.set_xscale("log")
        panel.set_title(f"{model}\nL2 {level}", fontsize=9)
        panel.set_xlabel("passes a sample (forward + backward)")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean Dice of the slices (%)")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as path:
        figure.savefig(path, format="png")
    plt.close(figure)


if __name__ == "__main__":
    main()
