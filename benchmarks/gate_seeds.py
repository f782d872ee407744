"""Does the gate let an unchanged model pass, and stop one that was trained without IMA, whatever the seed?

On the two models of ``hippocampus_small.py`` of the same length. The baseline is of the hardened model with seed 0, by
the commands of docs/gate.md; then, for each further seed, both models are attacked again and judged by it: once on the
baseline's samples with another seed of the attacks (``--seed``), and once with another choice of samples, too
(``--samples-seed``), which then can only be compared by their intervals. All with the attacks and the number of samples
of the example workflow. Some twenty minutes of one core for each way; started again, it goes on where it stopped.

    python benchmarks/gate_seeds.py -o <folder of hippocampus_small.py> [--seeds 20] [-device cpu]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hippocampus_small import IMA, NETWORK, RESULTS, STD_LONGER

from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.pipeline import Method, Pipeline
from nnunet_ima.files import write_text

ATTACKS = ("white-noise:draws=5", "apgd:loss=balanced-ce,steps=20")
LEVEL = "5"
MODELS: dict[str, Method] = {"unchanged": IMA, "without IMA": STD_LONGER}
# What was attacked: the baseline's samples, or others.
WAYS = ("same samples", "other samples")
# Points that may be lost: the default, the example's, and more.
DROPS = ("1", "5", "20")


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    options = _options()
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    os.environ.update(pipeline.steps.environment)
    baseline = options.output / f"gate_baseline_{options.samples}.json"
    first = evaluated(pipeline, "unchanged", 0, 0, options)
    if not baseline.is_file() and nnunet_ima("gate", str(first), "--write-baseline", str(baseline))[0]:
        sys.exit(f"{first} makes no baseline: a check failed.")
    for way in options.ways:
        rows = [
            {"way": way, "seed": seed, "model": name, **judged(run, baseline)}
            for seed in range(1, options.seeds + 1)
            for name in MODELS
            for run in [evaluated(pipeline, name, seed, 0 if way == "same samples" else seed, options)]
        ]
        write_results(options, way, figures(first), rows)


def write_results(options: argparse.Namespace, way: str, baseline: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """One JSON and one table for each way, as they may be of different numbers of seeds."""
    result = {
        "command": f"python benchmarks/gate_seeds.py -o WORK --seeds {options.seeds} --samples {options.samples}"
        f" --ways '{way}' -device {options.device}",
        "attacks": [f"{attack}@l2:{LEVEL}" for attack in ATTACKS],
        "hardware": {
            "machine": platform.machine(),
            "threads": os.environ["OMP_NUM_THREADS"],
            "device": options.device,
        },
        "versions": versions(),
        "baseline": baseline,
        "rows": rows,
    }
    text, stem = table(result), f"gate_seeds_{way.replace(' ', '_')}_{options.samples}"
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    write_text(options.results / f"{stem}.md", text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_hippocampus"), help="where to work")
    parser.add_argument("--seeds", type=int, default=20, help="from 1; the baseline has seed 0")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is attacked")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    parser.add_argument("-device", default="cpu")
    return parser.parse_args()


def evaluated(pipeline: Pipeline, name: str, seed: int, samples_seed: int, options: argparse.Namespace) -> Path:
    """The folder of a run, attacked unless it was before.

    Raises:
        SystemExit: the evaluation failed.
    """
    folder = pipeline.output / "gate_seeds" / f"{pipeline.key(MODELS[name])}_{options.samples}_{seed}_{samples_seed}"
    if not (folder / "summary.json").is_file():
        print(f"{name}: seed {seed}, samples {samples_seed}", flush=True)
        (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
        method = MODELS[name]
        status, said = nnunet_ima(
            "evaluate", "-m", str(pipeline.model(dataset, method)), "-f", str(pipeline.fold(dataset, method)),
            "--levels", LEVEL, "--attacks", *ATTACKS, "--max-samples", str(options.samples), "--no-cases",
            "--seed", str(seed), "--samples-seed", str(samples_seed), "-device", options.device, "-o", str(folder),
        )  # fmt: skip
        if status:
            sys.exit(f"The evaluation in {folder} ended with {status}: {said}")
    return folder


def nnunet_ima(*arguments: str) -> tuple[int, str]:
    """Exit status and output of our program, in this process: to import torch again each time would take longer."""
    # nnU-Net reads its folders from the environment when it is imported.
    from nnunet_ima.evaluation.command_line import main as program

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = program(list(arguments))
    return status, said.getvalue()


def judged(run: Path, baseline: Path) -> dict[str, Any]:
    """Figures of a run, and what the gate says of it, by the points that may be lost."""
    status, changes = {}, {}
    for drop in DROPS:
        status[drop], said = nnunet_ima("gate", str(run), "--baseline", str(baseline), "--max-drop", drop)
        changes = {
            name: [float(number) for number in ends.split(";")]
            for name, ends in re.findall(r"^\| (\S+): .*?\| ([^|]*)\|$", _numbers(said), re.MULTILINE)
        }
    return {"exit_status": status, "change": changes, **figures(run)}


def _numbers(said: str) -> str:
    """The gate's table with nothing but the numbers in the last column: change, low, high."""
    change = r"([+-][\d.]+) points \(([+-][\d.]+) to ([+-][\d.]+)\)[^|]*\|"
    return re.sub(change, r"\1;\2;\3 |", said.replace("nothing changed.", "+0 points (+0 to +0)"))


def figures(run: Path) -> dict[str, Any]:
    """TVDI by condition, with its interval in %, and whether the checks of the evaluation passed."""
    from nnunet_ima.evaluation.results import UNTOUCHED, read_results
    from nnunet_ima.evaluation.statistics import tvdi_interval, units

    results = read_results(run)
    keys = [UNTOUCHED, *((item["attack"], item["level"]) for item in results.attacked)]
    found = {}
    for key in keys:
        samples = results.samples[key]
        interval = tvdi_interval(units(samples.cases, samples.counts)[1])
        name = "clean" if key == UNTOUCHED else f"{key[0]}@l2:{key[1]}"
        found[name] = [round(100 * end, 2) for end in interval]
    cases = results.samples[UNTOUCHED].cases
    return {
        "tvdi": found,
        "samples": len(cases),
        "cases": len(set(cases.tolist())),
        "trusted": bool(results.summary["trusted"]),
    }


def table(result: dict[str, Any]) -> str:
    """How often the gate gave which status, and how TVDI and its changes scatter."""
    base, rows = result["baseline"], result["rows"]
    conditions = list(base["tvdi"])
    shown = ", ".join(
        f"{name} {value:.1f} ({low:.1f} to {high:.1f})" for name, (value, low, high) in base["tvdi"].items()
    )
    lines = [f"Baseline, {base['samples']} slices of {base['cases']} cases, TVDI in %: {shown}\n"]
    lines += ["How many seeds ended with status 0 / 1 / 2, by `--max-drop`:\n"]
    lines += ["| model | attacked | seeds | " + " | ".join(f"{drop} points" for drop in DROPS) + " |"]
    lines += ["| --- |" + " --- |" * (len(DROPS) + 2)]
    groups = dict.fromkeys((row["model"], row["way"]) for row in rows)
    for model, way in groups:
        mine = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        counted = [Counter(row["exit_status"][drop] for row in mine) for drop in DROPS]
        cells = " | ".join(" / ".join(str(count[status]) for status in (0, 1, 2)) for count in counted)
        lines.append(f"| {model} | {way} | {len(mine)} | {cells} |")
    lines += ["\nTVDI in %, lowest to highest of the seeds; standard deviation over seeds, half the width of a run's "
              "interval, and in how many seeds that interval holds the seeds' mean:\n"]  # fmt: skip
    lines += [
        "| model | attacked | condition | TVDI | deviation | half width | holds the mean |",
        "| --- |" + " --- |" * 6,
    ]
    for model, way in groups:
        mine = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        for condition in conditions:
            lines.append(f"| {model} | {way} | {condition} | {_scatter([row['tvdi'][condition] for row in mine])} |")
    lines += [
        "\nChange against the baseline in points: its range over the seeds, and the outermost ends of its intervals:\n"
    ]
    lines += ["| model | attacked | condition | change | interval |", "| --- |" + " --- |" * 4]
    for model, way in groups:
        mine = [row for row in rows if (row["model"], row["way"]) == (model, way)]
        for condition in conditions:
            change = np.array([row["change"][condition] for row in mine])
            ends = f"{change[:, 1].min():+.1f} to {change[:, 2].max():+.1f}"
            span = f"{change[:, 0].min():+.1f} to {change[:, 0].max():+.1f}"
            lines.append(f"| {model} | {way} | {condition} | {span} | {ends} |")
    failed = sum(not row["trusted"] for row in rows)
    lines.append(f"\nA check of the evaluation failed in {failed} of {len(rows)} runs.")
    return "\n".join(lines) + "\n"


def _scatter(intervals: list[list[float]]) -> str:
    value, low, high = np.array(intervals).T
    mean, half = value.mean(), ((high - low) / 2).mean()
    holds = int(((low <= mean) & (mean <= high)).sum())
    deviation = value.std(ddof=1) if len(value) > 1 else np.nan
    return f"{value.min():.1f} to {value.max():.1f} | {deviation:.2f} | {half:.1f} | {holds} of {len(value)}"


if __name__ == "__main__":
    main()
