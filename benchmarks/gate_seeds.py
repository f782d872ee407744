"""Does the gate let an unchanged model pass, and stop one that was trained without IMA, whatever the seed?

On the two models of ``hippocampus_small.py`` of the same length, or with ``--workflow`` on the two that a run of
``gate_workflow.py`` left, as its own steps attack and judge them. The baseline is of the hardened model with seed 0, by
the commands of docs/gate.md; then, for each further seed, both models are attacked again and judged by it: once on the
baseline's samples with another seed of the attacks (``--seed``), and once with another choice of samples, too
(``--samples-seed``), which then can only be compared by their intervals. All with the attacks and the number of samples
of the example workflow. Some twenty minutes of one core for each way; started again, it goes on where it stopped.

    python benchmarks/gate_seeds.py -o <folder of hippocampus_small.py> [--seeds 20] [-device cpu]
    python benchmarks/gate_seeds.py --workflow <folder of gate_workflow.py>/run_1 --ways "same samples" [-o work]
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gate_workflow import JOB, of_stock_model, variables
from hippocampus_small import IMA, NETWORK, RESULTS, STD_LONGER

from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.pipeline import Method, Pipeline
from nnunet_ima.files import write_text

ATTACKS = ("white-noise:draws=5", "apgd:loss=balanced-ce,steps=20")
LEVEL = "5"
SAMPLES = 60
MODELS = ("unchanged", "without IMA")
# What was attacked: the baseline's samples, or others.
WAYS = ("same samples", "other samples")
# Points that may be lost: the default, the example's, and more.
DROPS = ("1", "5", "20")


@dataclass(frozen=True)
class Models:
    """Two models, and how they are attacked.

    Attributes:
        name: begins the names of their results.
        shown: how they were named on the command line.
        environment: nnU-Net's folders, and whatever else an evaluation needs.
        keys: names of folders, by MODELS.
        evaluate: by MODELS, arguments of ``nnunet_ima evaluate`` but for seeds, device and output.
    """

    name: str
    shown: str
    environment: dict[str, str]
    keys: dict[str, str]
    evaluate: dict[str, list[str]]


def of_benchmark(options: argparse.Namespace) -> Models:
    """Those of ``hippocampus_small.py`` of the same length, with the example workflow's attacks."""
    pipeline = Pipeline(options.output, "nnUNetPlansSmall", NETWORK, options.device)
    (dataset,) = pipeline.folders["nnUNet_preprocessed"].glob("Dataset*")
    methods: dict[str, Method] = dict(zip(MODELS, (IMA, STD_LONGER), strict=True))
    attacks = ["--levels", LEVEL, "--attacks", *ATTACKS, "--max-samples", str(options.samples), "--no-cases"]
    return Models(
        name="",
        shown="-o WORK",
        environment=dict(pipeline.steps.environment),
        keys={model: f"{pipeline.key(method)}_{options.samples}" for model, method in methods.items()},
        evaluate={
            model: ["-m", str(pipeline.model(dataset, method)), "-f", str(pipeline.fold(dataset, method)), *attacks]
            for model, method in methods.items()
        },
    )


def of_workflow(run: Path, samples: int | None) -> Models:
    """Those of a run of ``gate_workflow.py``, whose folder is only read, attacked as its own step attacked them.

    Args:
        run: its folder.
        samples: instead of the step's own number; None for that.
    """
    file = run / "steps" / "Attack.json"
    if not file.is_file():
        sys.exit(f"{run} is no finished run of gate_workflow.py: {file} is missing.")
    # What was run there is not always what the workflow says today.
    attack = str(json.loads(file.read_text(encoding="utf-8"))["run"])
    blocks = dict(zip(MODELS, (attack, of_stock_model(attack)), strict=True))
    # Of an option that comes twice the last one counts.
    further = [] if samples is None else ["--max-samples", str(samples)]
    return Models(
        name="workflow_",
        shown="--workflow WORK/run_1 -o SEEDS",
        # One thread, as in the other results, unless the caller says otherwise.
        environment={"OMP_NUM_THREADS": "1", **os.environ, **variables(run, JOB["env"])},
        keys={model: f"workflow_{model.replace(' ', '_')}_{samples or 'as_there'}" for model in MODELS},
        evaluate={model: [*arguments_of(block, "evaluate"), *further] for model, block in blocks.items()},
    )


def arguments_of(block: str, command: str) -> list[str]:
    """Those of ``nnunet_ima COMMAND`` in the shell of a step."""
    lines = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    (found,) = (words[2:] for words in lines if words[:2] == ["nnunet_ima", command])
    return found


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    options = _options()
    own = options.workflow is not None
    models = of_workflow(options.workflow.resolve(), options.samples) if own else of_benchmark(options)
    os.environ.update(models.environment)
    options.output.mkdir(parents=True, exist_ok=True)
    baseline = options.output / f"gate_baseline_{models.name}{options.samples or 'as_there'}.json"
    first = evaluated(models, "unchanged", 0, 0, options)
    if not baseline.is_file() and nnunet_ima("gate", str(first), "--write-baseline", str(baseline))[0]:
        sys.exit(f"{first} makes no baseline: a check failed, or its model has not learned its task.")
    for way in options.ways:
        rows = [
            {"way": way, "seed": seed, "model": name, **judged(run, baseline)}
            for seed in range(1, options.seeds + 1)
            for name in MODELS
            for run in [evaluated(models, name, seed, 0 if way == "same samples" else seed, options)]
        ]
        write_results(options, models, way, figures(first), rows)


def write_results(
    options: argparse.Namespace, models: Models, way: str, baseline: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """One JSON and one table for each way, as they may be of different numbers of seeds."""
    samples = "" if options.samples is None else f" --samples {options.samples}"
    result = {
        "command": f"python benchmarks/gate_seeds.py {models.shown} --seeds {options.seeds}{samples}"
        f" --ways '{way}' -device {options.device}",
        "attacks": [name for name in baseline["tvdi"] if name != "clean"],
        "hardware": {
            "machine": platform.machine(),
            "threads": os.environ["OMP_NUM_THREADS"],
            "device": options.device,
        },
        "versions": versions(),
        "baseline": baseline,
        "rows": rows,
    }
    text, stem = table(result), f"gate_seeds_{models.name}{way.replace(' ', '_')}_{baseline['samples']}"
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / f"{stem}.json", json.dumps(result, indent=1) + "\n")
    write_text(options.results / f"{stem}.md", text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, help="where to work; default: as the models' benchmark does")
    parser.add_argument("--workflow", type=Path, metavar="RUN", help="the folder of a run of gate_workflow.py")
    parser.add_argument("--seeds", type=int, default=20, help="from 1; the baseline has seed 0")
    parser.add_argument("--samples", type=int, help=f"default {SAMPLES}, or the workflow's own number")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="what is attacked")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    parser.add_argument("-device", default="cpu")
    options = parser.parse_args()
    if options.workflow is None:
        options.samples = options.samples or SAMPLES
        options.output = options.output or Path("demo/benchmark_hippocampus")
    options.output = options.output or Path("demo/benchmark_gate_seeds")
    return options


def evaluated(models: Models, name: str, seed: int, samples_seed: int, options: argparse.Namespace) -> Path:
    """The folder of a run, attacked unless it was before.

    Raises:
        SystemExit: the evaluation failed.
    """
    folder: Path = options.output.resolve() / "gate_seeds" / f"{models.keys[name]}_{seed}_{samples_seed}"
    if not (folder / "summary.json").is_file():
        print(f"{name}: seed {seed}, samples {samples_seed}", flush=True)
        status, said = nnunet_ima(
            "evaluate", *models.evaluate[name], "--seed", str(seed), "--samples-seed", str(samples_seed),
            "-device", options.device, "-o", str(folder),
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
