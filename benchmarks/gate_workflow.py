"""The example workflow of docs/gate.md, step by step on the Decathlon's hippocampus: how long, and what does it judge?

Runs the ``run:`` blocks of ``docs/examples/robustness-gate.yml`` as they stand, each with ``bash -e`` as GitHub does,
in a fresh folder for each run; only ``pip install`` is left out. The first run makes the baseline by the command that
the workflow's first lines give; each later one trains its own models, and is judged by it. In the end the stock model
of each run is attacked and judged in the hardened one's place. Notes wall-clock and CPU time of each step (that of all
its processes together), and how busy the machine was. Some twenty minutes of CPU time a run; started again, it
goes on after the last step that ended.

    python benchmarks/gate_workflow.py --data <Task04_Hippocampus> [-o work] [--runs 2]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from nnunet_ima.evaluation.environment import versions
from nnunet_ima.files import write_text

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / "docs" / "examples" / "robustness-gate.yml"
RESULTS = Path(__file__).parent / "results"
(JOB,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
BASELINE = "robustness/baseline.json"
VERDICTS = {0: "passed", 1: "stopped", 2: "cannot tell"}


def main() -> None:
    """Run whatever is not done yet, then write the results."""
    options = _options()
    runs = [run(options, number) for number in range(1, options.runs + 1)]
    result = {
        "command": f"python benchmarks/gate_workflow.py --data Task04_Hippocampus --runs {options.runs}",
        "workflow": WORKFLOW.relative_to(ROOT).as_posix(),
        "hardware": {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
        "versions": versions(),
        "runs": runs,
    }
    text = table(result)
    options.results.mkdir(parents=True, exist_ok=True)
    write_text(options.results / "gate_workflow.json", json.dumps(result, indent=1) + "\n")
    write_text(options.results / "gate_workflow.md", text)
    sys.stdout.write(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder Task04_Hippocampus of the Decathlon")
    parser.add_argument("-o", "--output", type=Path, default=Path("demo/benchmark_gate_workflow"), help="where to work")
    parser.add_argument("--runs", type=int, default=2, help="whole runs of the workflow; the first makes the baseline")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON and the table go")
    return parser.parse_args()


def run(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """All steps of the workflow in a folder of their own; what they took, and how the two models were judged."""
    workspace = options.output.resolve() / f"run_{number}"
    (workspace / "data").mkdir(parents=True, exist_ok=True)
    link = workspace / "data" / "Task04_Hippocampus"
    if not link.is_symlink():
        link.symlink_to(options.data.resolve())
    baseline = options.output.resolve() / "run_1" / BASELINE
    steps = [
        once(workspace, name, block, JOB["env"])
        for name, block in blocks(JOB, workspace / BASELINE, baseline, first=number == 1)
    ]
    (attack, judge) = (step["run"] for step in JOB["steps"] if step.get("name") in ("Attack", "Judge"))
    stock = [
        once(workspace, f"{name} the stock model", of_stock_model(block), JOB["env"])
        for name, block in (("Attack", attack), ("Judge", judge))
    ]
    return {
        "number": number,
        "steps": steps,
        "stock": stock,
        "figures": {name: figures(workspace / name) for name in ("run", "run_stock")},
        "gates": {
            name: (workspace / name / "gate.md").read_text(encoding="utf-8").splitlines()
            for name in ("gate", "gate_stock")
            if (workspace / name).is_dir()
        },
    }


def blocks(job: dict[str, Any], here: Path, baseline: Path, first: bool) -> Iterator[tuple[str, str]]:
    """Names and shell of the steps; of the first run, which has no baseline yet, with what makes it for the gate."""
    for step in job["steps"]:
        if "run" not in step:
            continue
        block = re.sub(r"^pip install .*\n", "", step["run"])
        if step["name"] == "Judge":
            comments = WORKFLOW.read_text(encoding="utf-8").replace("\n# ", " ")
            (keep,) = re.findall(r"`(nnunet_ima gate .*?)`", comments)
            yield "Baseline", keep if first else f"mkdir -p {here.parent.name} && cp '{baseline}' {BASELINE}"
        yield step["name"], block


def of_stock_model(block: str) -> str:
    """The same step for the model that was trained without IMA."""
    block = block.replace("2d_ima", "2d_std").replace("nnUNetTrainerIMA", "nnUNetTrainerSTD")
    block = re.sub(r"-o (run|report|gate)\b", r"-o \1_stock", block)
    return re.sub(r"nnunet_ima (report|gate) run\b", r"nnunet_ima \1 run_stock", block)


def once(workspace: Path, name: str, block: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run a step unless it was run before; its exit status, and the time it took.

    Raises:
        SystemExit: it failed, and is no gate that came to a verdict.
    """
    logs = workspace / "steps"
    logs.mkdir(exist_ok=True)
    file = logs / f"{name.replace(' ', '_')}.json"
    if file.is_file():
        done: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if done["run"] != block:
            # What came after it was made of what it left.
            sys.exit(f"{workspace} holds a run of another workflow ({name} differs); remove it.")
        return done
    print(f"{workspace.name}: {name}", flush=True)
    load, before, started = os.getloadavg()[0], _cpu_seconds(), time.monotonic()
    status = _bash(workspace, logs / f"{file.stem}.log", block, environment)
    wall, cpu = time.monotonic() - started, _cpu_seconds() - before
    if status and not (name.startswith("Judge") and status in VERDICTS):
        sys.exit(f"{name} of {workspace} ended with {status}; see {logs / file.stem}.log")
    others = [round(load, 1), round(os.getloadavg()[0], 1)]
    done = {"name": name, "status": status, "wall": round(wall, 1), "cpu": round(cpu, 1), "load": others, "run": block}
    write_text(file, json.dumps(done, indent=1) + "\n")
    return done


def _bash(workspace: Path, log: Path, block: str, environment: dict[str, str]) -> int:
    """Run shell as GitHub's runner does: ``bash -e``, variables of earlier steps from the file GITHUB_ENV."""
    kept, summary = workspace / "steps" / "github_env", workspace / "steps" / "summary.md"
    given = variables(workspace, environment)
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else []
    given.update(line.partition("=")[::2] for line in lines)
    given |= {"GITHUB_ENV": str(kept), "GITHUB_STEP_SUMMARY": str(summary), "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            ["bash", "-e", "-c", block],
            cwd=workspace,
            env={**os.environ, **given},
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
        with tqdm(desc=f"  {log.stem}", unit=" s", dynamic_ncols=True) as bar:
            while process.poll() is None:
                time.sleep(1)
                bar.update()
    return process.returncode


def variables(workspace: Path, environment: dict[str, str]) -> dict[str, str]:
    """Those of the workflow, in a folder of a run."""
    return {name: value.replace("${{ github.workspace }}", str(workspace)) for name, value in environment.items()}


def _cpu_seconds() -> float:
    """Of all processes that this one started and that ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def figures(run_folder: Path) -> dict[str, Any]:
    """TVDI of each condition, and whether the checks of the evaluation passed."""
    summary = json.loads((run_folder / "summary.json").read_text(encoding="utf-8"))
    found = {"clean": summary["clean"]["tvdi"]}
    found |= {f"{item['attack']}@{item['level']}": item["tvdi"] for item in summary["results"]}
    return {"tvdi": found, "samples": summary["clean"]["n_samples"], "trusted": summary["trusted"]}


def table(result: dict[str, Any]) -> str:
    """Times of the steps, then TVDI and verdicts of each run."""
    runs = result["runs"]
    lines = [
        "Seconds: wall clock / CPU time of all its processes (other programs were at work where the load says so)\n"
    ]
    lines += ["| step | " + " | ".join(f"run {one['number']}" for one in runs) + " |"]
    lines += ["| --- |" + " --- |" * len(runs)]
    for name in dict.fromkeys(step["name"] for one in runs for step in one["steps"]):
        found = [next((step for step in one["steps"] if step["name"] == name), None) for one in runs]
        lines.append(f"| {name} | " + " | ".join(_times(step) if step else "" for step in found) + " |")
    totals = [(sum(step["wall"] for step in one["steps"]), sum(step["cpu"] for step in one["steps"])) for one in runs]
    lines.append("| all | " + " | ".join(f"{wall:.0f} / {cpu:.0f}" for wall, cpu in totals) + " |")
    loads = [[number for step in one["steps"] for number in step["load"]] for one in runs]
    lines.append("| load of the machine | " + " | ".join(f"{min(load)} to {max(load)}" for load in loads) + " |")
    conditions = list(runs[0]["figures"]["run"]["tvdi"])
    lines += ["\nTVDI in %:\n", "| run | model | " + " | ".join(conditions) + " | checks | gate |"]
    lines += ["| --- |" + " --- |" * (len(conditions) + 3)]
    for one in runs:
        for name, steps, model in (("run", one["steps"], "IMA"), ("run_stock", one["stock"], "stock")):
            found = one["figures"][name]
            judge = next(step for step in steps if step["name"].startswith("Judge"))
            # Of the first run's own model the gate can only say that nothing changed.
            is_baseline = one["number"] == 1 and name == "run"
            judged = "is the baseline" if is_baseline else VERDICTS[judge["status"]]
            cells = " | ".join(f"{100 * found['tvdi'][condition]:.1f}" for condition in conditions)
            checks = "passed" if found["trusted"] else "FAILED"
            lines.append(f"| {one['number']} | {model} | {cells} | {checks} | {judged} |")
    return "\n".join(lines) + "\n"


def _times(step: dict[str, Any]) -> str:
    return f"{step['wall']:.0f} / {step['cpu']:.0f}"


if __name__ == "__main__":
    main()
