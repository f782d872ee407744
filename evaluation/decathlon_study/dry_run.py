"""What a study would do, what of it is done already, and what the rest costs; nothing is written."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.decathlon_study.cost import attack_passes, count_slices, training_cost
from nnunet_ima.evaluation.decathlon_study.study import DecathlonStudy, TaskStudy
from nnunet_ima.evaluation.pipeline import Attacks, Method

ASSUMPTIONS = (
    "A pass is one sample through the network, forward or backward; of trainings only forward ones are counted, and "
    "each costs about one backward pass too, but for IMA's bisections.",
    "A step of IMA costs the fewer passes the more samples are wrong or hold no foreground; docs/methods.md has a "
    "measurement.",
    "Attack passes are an upper bound: each is counted as if no sample fell to Dice 0, from which on it costs nothing.",
    "Attacked are the slices with foreground, counted in the label files.",
)


def describe(study: DecathlonStudy) -> str:
    """For people: steps with their commands, differences from the paper, cost with its assumptions."""
    parts = ["Nothing was run, and nothing was written."]
    parts.append("\n".join(["Differences from the paper, of all tasks:", *(f"- {text}" for text in study.differences)]))
    fewest = most = attacks = 0
    for task in study.tasks:
        part = _Task(task, study.request.steps)
        parts.append("\n".join(part.lines()))
        fewest, most, attacks = fewest + part.left[0], most + part.left[1], attacks + part.left[2]
    if "report" in study.request.steps:
        parts.append(f"Then the report: {study.output / 'decathlon.md'}, decathlon.csv, and a page for each task.")
    parts.append(f"Left to do in all: {_range(fewest, most)} passes of training, at most {attacks:,} of attacks.")
    parts.append("\n".join(["Assumptions:", *(f"- {text}" for text in ASSUMPTIONS)]))
    return "\n\n".join(parts) + "\n"


class _Task:
    """The lines on one task; ``left`` adds up what is still to do, once they are all there."""

    def __init__(self, task: TaskStudy, steps: Collection[str]) -> None:
        self.task, self.steps = task, steps
        self.left = (0, 0, 0)

    def lines(self) -> Iterator[str]:
        task, given = self.task, self.task.given
        split = given.split
        yield f"== {given.title}: {given.folder}"
        yield (
            f"{len(given.cases)} cases: {len(split.training)} for training, {len(split.validation)} left aside, "
            f"{len(split.test)} attacked."
        )
        yield "Its own differences from the paper:"
        yield from (f"- {text}" for text in task.differences)
        yield "Steps:"
        yield "  " + task.environment()
        cases = len(given.cases)
        pipeline = task.pipeline
        yield from self._step("convert", "convert", pipeline.convert_command(task.view, cases), pipeline.is_converted())
        yield from self._step("plan", "plan", pipeline.plan_command(task.view, cases), pipeline.is_planned(task.view))
        for method in task.methods:
            yield from self._training(method)
        slices = self._slices()
        for method in task.methods:
            yield from self._evaluations(method, slices)

    def _step(
        self, step: str, name: str, command: list[str], done: bool, words: str = "", refused: str = ""
    ) -> list[str]:
        """A step and its command; instead of its cost, why it will be refused."""
        state = "done" if done else "skipped" if step not in self.steps else "refused" if refused else "to do"
        said = refused if state == "refused" else words
        return [f"  [{state}] {name}{f': {said}' if said else ''}", f"      {shlex.join(command)}"]

    def _training(self, method: Method) -> list[str]:
        task = self.task
        pipeline = task.study.pipeline(method)
        cost = training_cost(method.title, method.settings, task.batch_size)
        assumed = "" if task.planned or task.request.batch_size else " (the paper's batch; nnU-Net has not planned yet)"
        words = (
            f"{cost.steps:,} steps of {cost.batch_size} samples{assumed}, passes a sample and "
            f"step: {_range(cost.fewest, cost.most)}, in all {_range(*cost.passes)}"
        )
        done = pipeline.is_trained(method)
        if not done and "train" in self.steps:
            self._add(*cost.passes, 0)
        command = pipeline.train_command(task.dataset, method)
        return self._step("train", f"train {method.title}", command, done, words)

    def _slices(self) -> int:
        planned = self.task.planned
        axis, tiles = (planned.slice_axis, planned.tiles_a_slice) if planned else (None, 1)
        return tiles * count_slices(self.task.given, self.task.given.split.test, axis)

    def _evaluations(self, method: Method, slices: int) -> Iterator[str]:
        task = self.task
        pipeline = task.study.pipeline(method)
        slices = min(slices, task.request.samples or slices)
        for attacks in task.study.evaluations:
            passes = attack_passes(attacks, slices, task.given.classes)
            done, refused = self._evaluated(method, attacks)
            if not done and not refused and "evaluate" in self.steps:
                self._add(0, 0, passes)
            command = pipeline.evaluate_command(task.dataset, method, attacks)
            words = f"{slices} slices, at most {passes:,} passes"
            name = f"evaluate {method.title}, {attacks.name}"
            yield from self._step("evaluate", name, command, done, words, refused)

    def _evaluated(self, method: Method, attacks: Attacks) -> tuple[bool, str]:
        """Whether it is done; or why it will be refused."""
        try:
            return self.task.study.pipeline(method).is_evaluated(self.task.dataset, method, attacks), ""
        except UserError as error:
            return False, str(error)

    def _add(self, fewest: int, most: int, attacks: int) -> None:
        self.left = (self.left[0] + fewest, self.left[1] + most, self.left[2] + attacks)


def _range(fewest: int, most: int) -> str:
    return f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
