"""A study as commands for any queue, one a line, each resumable."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence

# In the order in which they depend on each other; a stage needs all of the one before that share its task and method.
STAGES: Mapping[str, tuple[str, ...]] = {
    "prepare": ("convert", "plan"),
    "train": ("train",),
    "evaluate": ("evaluate",),
    "report": ("report",),
}
NEEDS = {
    "prepare": "nothing; one job a task",
    "train": "the preparation of its task; one job a task and method",
    "evaluate": "the training of its task and method; one job a task and method",
    "report": "all evaluations; one job",
}


def print_jobs(options: Sequence[str], tasks: Sequence[int], methods: Sequence[str], steps: Collection[str]) -> str:
    """The jobs of some steps; lines that begin with # say on what those below depend.

    Args:
        options: of the command, without tasks, methods and steps.
        tasks, methods: all of the study.
        steps: only the jobs of these.
    """
    lines: list[str] = []
    for stage, all_steps in STAGES.items():
        wanted = [step for step in all_steps if step in steps]
        if wanted:
            lines.append(f"# {stage}: needs {NEEDS[stage]}")
            lines += [
                shlex.join(["nnunet_ima", "decathlon", *options, *which, "--only", *wanted])
                for which in _parts(stage, tasks, methods)
            ]
    return "\n".join(lines) + "\n"


def _parts(stage: str, tasks: Sequence[int], methods: Sequence[str]) -> list[list[str]]:
    if stage == "report":
        return [["--tasks", *map(str, tasks), "--methods", *methods]]
    if stage == "prepare":
        return [["--tasks", str(task)] for task in tasks]
    return [["--tasks", str(task), "--methods", method] for task in tasks for method in methods]
