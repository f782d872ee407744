"""On which machines a study's trainings and evaluations were made: noted with each of them, before it is begun."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import OUR_SOURCES, available_cores, versions
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline
from nnunet_ima.evaluation.records import CASE_HAS_CHANGED
from nnunet_ima.evaluation.steps import resume_options
from nnunet_ima.evaluation.study import Study
from nnunet_ima.files import write_text
from nnunet_ima.precision import faster_autocast, precision_of

Machine = dict[str, Any]


class NotedPipeline(Pipeline):
    """A pipeline that notes on which machines a step was at work, beside its log.

    Args:
        jobs: models at work at once.
    """

    def __init__(self, *args: Any, jobs: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        self.jobs = jobs

    def train(self, dataset: Path, method: Method) -> None:
        """Train, or go on."""
        if not self.is_trained(method):
            goes_on = bool(resume_options(self.fold_folder(dataset, method)))
            self._note(f"train_{self.key(method)}", goes_on)
        super().train(dataset, method)

    def evaluate(self, dataset: Path, method: Method, attacks: Attacks) -> Path:
        """Attack, or go on."""
        folder = self.results(method, attacks)
        run, step = folder / "run.json", folder.name
        before, noted = run.read_bytes() if run.is_file() else None, machines(self.logs, step)
        finished = (folder / "summary.json").is_file()
        if not finished:
            self._note(step, before is not None)
        spent, started = seconds_spent(self.logs, step) if before is not None else 0.0, time.monotonic()
        try:
            return self._attack(dataset, method, attacks)
        finally:
            if not finished:
                goes_on = run.is_file() and run.read_bytes() == before
                _note_seconds(self.logs, step, time.monotonic() - started + (spent if goes_on else 0.0))
            if run.is_file() and run.read_bytes() != before:
                # It was begun anew.
                self._note(step, False)
            elif before is not None and not noted:
                # Nobody knows on which machines it was begun.
                _file(self.logs, step).unlink(missing_ok=True)

    def _attack(self, dataset: Path, method: Method, attacks: Attacks) -> Path:
        """Go on, or begin anew: another machine may have preprocessed the cases to other last digits."""
        folder = self.results(method, attacks)
        try:
            return super().evaluate(dataset, method, attacks)
        except UserError as error:
            if CASE_HAS_CHANGED not in str(error) or (folder / "summary.json").is_file():
                raise
        sys.stdout.write(f"{folder.name} was begun on scans that were preprocessed otherwise, and begins anew here.\n")
        shutil.rmtree(folder)
        return super().evaluate(dataset, method, attacks)

    def _note(self, step: str, goes_on: bool) -> None:
        noted = machines(self.logs, step) if goes_on else []
        threads = int(self.steps.environment["OMP_NUM_THREADS"])
        here = this_machine(self.device, threads, self.workers, self.jobs, self.compiled)
        if here not in noted:
            write_text(_file(self.logs, step), json.dumps([*noted, here], indent=1) + "\n")


class NotedStudy(Study):
    """A study whose steps are noted.

    Args:
        jobs: models at work at once.
    """

    def __init__(self, *args: Any, jobs: int = 1, **options: Any) -> None:
        super().__init__(*args, **options)
        made: Any = partial(NotedPipeline, *self._make.args, jobs=jobs, **self._make.keywords)
        self._make = made


def this_machine(device: str, threads: int, workers: int, jobs: int, compiled: bool) -> Machine:
    """What a step's seconds, and the last digits of its figures, depend on."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "processor": _processor(),
        "amx": precision_of(faster_autocast(torch.device("cpu")), torch.device("cpu")) == "bfloat16",
        "cores": available_cores(),
        "threads": threads,
        "workers": workers,
        "jobs": jobs,
        "compiled": compiled,
        "versions": versions(),
    }


def machines(logs: Path, step: str) -> list[Machine]:
    """The machines on which a step was at work; none if nobody noted it."""
    file = _file(logs, step)
    found: list[Machine] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return found


def seconds_spent(logs: Path, step: str) -> float:
    """On an evaluation so far, what was done in vain included; 0 if nobody noted it. What ``kill -9`` ended is not."""
    file = _seconds_file(logs, step)
    return float(json.loads(file.read_text(encoding="utf-8"))["seconds"]) if file.is_file() else 0.0


def _note_seconds(logs: Path, step: str, seconds: float) -> None:
    write_text(_seconds_file(logs, step), json.dumps({"seconds": round(seconds, 1)}) + "\n")


def _seconds_file(logs: Path, step: str) -> Path:
    return logs / f"{step}.seconds.json"


def machine_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence for each machine: what it is, and what was made there."""
    made: dict[str, dict[str, list[bool]]] = {}
    for row in rows:
        for kind, found in [("training", row["training"]), *(("evaluation", e) for e in row["evaluations"].values())]:
            if found is not None:
                noted = [machine_line(machine) for machine in found.get("machines", [])]
                for line in noted or ["a machine that was not noted"]:
                    made.setdefault(line, {}).setdefault(kind, []).append(len(noted) > 1)
    return [f"On {line}: {', '.join(_counted(*kind) for kind in kinds.items())}." for line, kinds in made.items()]


def machine_line(machine: Machine) -> str:
    """For people."""
    processor = f"{machine['processor']}{' with AMX' if machine['amx'] else ''}"
    device = processor if machine["device"] == "cpu" else f"{machine['device']} ({processor})"
    return (
        f"{device}, {_counted('core', machine['cores'])}, {_counted('thread', machine['threads'])}, "
        f"{_counted('worker', machine['workers'])}, {_counted('model', machine['jobs'])} at once"
        f"{', compiled' if machine['compiled'] else ''}, torch {machine['versions']['torch']}, nnU-Net "
        f"{machine['versions']['nnunetv2']}{_sources(machine)}"
    )


def _sources(machine: Machine) -> str:
    found = machine["versions"].get(OUR_SOURCES)
    return f", our sources {found[:7]}" if found else ""


def _counted(kind: str, found: int | Sequence[bool]) -> str:
    number = found if isinstance(found, int) else len(found)
    partly = 0 if isinstance(found, int) else sum(found)
    return f"{number} {kind}{'' if number == 1 else 's'}" + (f" ({partly} in part)" if partly else "")


def _file(logs: Path, step: str) -> Path:
    return logs / f"{step}.machines.json"


def _processor() -> str:
    """Its name; Python's own function knows it on few systems."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines() if information.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
