"""``nnunet_ima grid``: the paper's search over Δε and ε (C.6): the geometric mean of clean and robust Dice decides."""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.configure import PlannedDataset, in_force, settings_of, write_plans
from nnunet_ima.evaluation.environment import nnunet_folder, trainers_folder
from nnunet_ima.evaluation.finished import begun_in, is_of_this
from nnunet_ima.evaluation.models import Fold
from nnunet_ima.evaluation.protocols import parse_level
from nnunet_ima.evaluation.results import read_if_whole
from nnunet_ima.evaluation.steps import Steps, resume_options
from nnunet_ima.evaluation.summary import UNLEARNED, UNLEARNED_NOTE, UNTRUSTED, UNTRUSTED_NOTE, nothing_learned
from nnunet_ima.files import atomic_path, read_json, write_text
from nnunet_ima.lp import Norm
from nnunet_ima.settings import KEY, validate


@dataclass(frozen=True)
class Point:
    """One job of the grid."""

    epsilon: float
    delta_epsilon: float

    @property
    def name(self) -> str:
        """For files and configurations."""
        return f"e{self.epsilon:g}_d{self.delta_epsilon:g}"


@dataclass(frozen=True)
class Score:
    """What became of it: TVDI in [0, 1], clean and attacked, and what speaks against these figures."""

    point: Point
    clean: float
    robust: float
    trained_on_these_cases: bool = False
    started_from_unknown: bool = False
    learned: bool = True
    trusted: bool = True

    @property
    def geometric_mean(self) -> float:
        """The paper's criterion."""
        return math.sqrt(self.clean * self.robust)


@dataclass(frozen=True)
class Grid:
    """A search.

    Attributes:
        planned: dataset and plans; the plans file stays as it is, the grid's configurations go into one of their own.
        configuration, fold, trainer: of every training.
        points: all jobs.
        norm, level, attack: how robust Dice is measured.
        max_samples: attack no more slices or tiles than this; None for all.
        device: for training and attack.
        output: for logs, results, table and picture.
    """

    planned: PlannedDataset
    configuration: str
    fold: Fold
    trainer: str
    points: Sequence[Point]
    norm: Norm
    level: str
    attack: str
    max_samples: int | None
    device: str
    output: Path

    def run(self, num_parts: int, part_id: int) -> None:
        """Train and attack the jobs part_id, part_id + num_parts, ...; what is done is not done again.

        Raises:
            UserError: a command failed.
        """
        parse_level(self.level, self.norm)
        parse_attack(self.attack)
        for point in self.points:
            # Also finds an unknown trainer, and one that has no margins to grow.
            configured, _ = in_force(self._with_points(), self._name(point), self.trainer, self.fold)
            if "delta_epsilon" not in configured.origins:
                raise UserError(f"{self.trainer} does not read delta_epsilon; search with a trainer of IMA.")
        write_plans(self._with_points())
        steps = Steps(self.output / "logs" / f"part_{part_id}_of_{num_parts}", self._environment())
        steps.logs.mkdir(parents=True, exist_ok=True)
        for point in tqdm(self.points[part_id::num_parts], desc="grid", unit="job", dynamic_ncols=True):
            self._train(steps, point)
            self._attack(steps, point)

    def collect(self) -> list[Score]:
        """What all parts have finished so far, in the order of the points."""
        scores = []
        for point in self.points:
            summary = self._finished(point)
            if summary is not None:
                clean, robust = summary["clean"]["tvdi"], summary["results"][0]["tvdi"]
                scores.append(
                    Score(
                        point, float(clean), float(robust),
                        trained_on_these_cases=bool(summary["trained_on_these_cases"]),
                        started_from_unknown=bool(summary["started_from_unknown_weights"]),
                        learned=not nothing_learned(summary),
                        trusted=bool(summary["trusted"]),
                    )
                )  # fmt: skip
        return scores

    def _finished(self, point: Point) -> Mapping[str, Any] | None:
        """A result that is whole and of this grid: a folder may hold those of other weights, attacks or levels."""
        summary = read_if_whole(self.output / point.name)
        return summary if summary is not None and self._is_of_this(summary, point) else None

    def _is_of_this(self, head: Mapping[str, Any], point: Point) -> bool:
        checkpoint = self._model(point) / f"fold_{self.fold}" / "checkpoint_final.pth"
        return is_of_this(head, shlex.join(self._evaluation(point)), checkpoint)

    def report(self, scores: Sequence[Score]) -> str:
        """Write grid.csv and grid.png; returns a table for people."""
        if not scores:
            return "No job is finished yet.\n"
        write_text(self.output / "grid.csv", _csv(scores))
        draw(scores, f"{self.trainer}, {self.planned.folder.name} {self.configuration}", self.output / "grid.png")
        best = max(scores, key=lambda score: (score.learned, score.trusted, score.geometric_mean))
        lines = ["| ε | Δε | clean | attacked | geometric mean | |", "| --- | --- | --- | --- | --- | --- |"]
        for score in scores:
            figures = " | ".join(f"{100 * value:.1f}" for value in (score.clean, score.robust, score.geometric_mean))
            marks = [*(["**best**"] if score == best else []), *([] if score.learned else [UNLEARNED])]
            marks += [] if score.trusted else [UNTRUSTED]
            lines.append(
                f"| {score.point.epsilon:g} | {score.point.delta_epsilon:g} | {figures} | {', '.join(marks)} |"
            )
        if len(scores) < len(self.points):
            lines += ["", f"{len(self.points) - len(scores)} of {len(self.points)} jobs are not finished."]
        if not all(score.learned for score in scores):
            lines += ["", UNLEARNED_NOTE]
        if not all(score.trusted for score in scores):
            lines += ["", UNTRUSTED_NOTE]
        if any(score.trained_on_these_cases for score in scores):
            lines += ["", "The weights of some jobs learned from some of these very cases; the figures flatter them."]
        elif any(score.started_from_unknown for score in scores):
            lines += ["", "Trainings started from other weights; whether those learned from these cases is not known."]
        return "\n".join(lines) + "\n"

    @property
    def plans_name(self) -> str:
        """Of the plans file that holds the grid's configurations."""
        return f"{self.planned.plans_file.stem}Grid"

    def _name(self, point: Point) -> str:
        return f"{self.configuration}_{point.name}"

    def _with_points(self) -> PlannedDataset:
        """The user's plans as they are now, under a name of their own, with the grid's configurations, old and new.

        Raises:
            UserError: an older grid used other plans or settings.
        """
        file = self.planned.plans_file.with_name(f"{self.plans_name}.json")
        own = settings_of(self.planned, self.configuration)
        theirs = self.planned.configurations
        added = {}
        for point in self.points:
            values = {**own, "epsilon": point.epsilon, "delta_epsilon": point.delta_epsilon, "norm": self.norm}
            added[self._name(point)] = {"inherits_from": self.configuration, KEY: validate(values, "the grid")}
        before = read_json(file)["configurations"] if file.is_file() else {}
        changed = [name for name in before if name in {**theirs, **added} and before[name] != {**theirs, **added}[name]]
        if changed:
            raise UserError(
                f"{file} is of an earlier grid, in which {changed[0]} was another configuration; move that file and "
                f"its models away."
            )
        plans = {**self.planned.plans, "plans_name": self.plans_name, "configurations": {**before, **theirs, **added}}
        return PlannedDataset(self.planned.folder, file, plans)

    def _train(self, steps: Steps, point: Point) -> None:
        fold = self._model(point) / f"fold_{self.fold}"
        options = resume_options(fold)
        if options == ["--val"] and (fold / "validation" / "summary.json").is_file():
            return
        command = ["nnUNetv2_train", self.planned.folder.name, self._name(point), str(self.fold), "-tr", self.trainer]
        command += ["-p", self.plans_name, "-device", self.device, *options]
        steps.run(f"train_{point.name}", command, "Epoch ")

    def _attack(self, steps: Steps, point: Point) -> None:
        if self._finished(point) is not None:
            return
        folder, command = self.output / point.name, self._evaluation(point)
        begun = begun_in(folder)
        if begun.get("command") == shlex.join(command) and not self._is_of_this(begun, point):
            shutil.rmtree(folder)  # of weights or a program that are no more; anybody else's is refused by evaluate
        steps.run(f"evaluate_{point.name}", command)

    def _evaluation(self, point: Point) -> list[str]:
        command = ["nnunet_ima", "evaluate", "-m", str(self._model(point)), "-f", str(self.fold), "--norm", self.norm]
        command += ["--levels", self.level, "--attacks", self.attack, "--no-cases", "-device", self.device]
        command += ["--max-samples", str(self.max_samples)] if self.max_samples else []
        return [*command, "-o", str(self.output / point.name)]

    def _model(self, point: Point) -> Path:
        results = nnunet_folder("nnUNet_results") / self.planned.folder.name
        return results / f"{self.trainer}__{self.plans_name}__{self._name(point)}"

    @staticmethod
    def _environment() -> dict[str, str]:
        folders = [*filter(None, [os.environ.get("nnUNet_extTrainer")]), str(trainers_folder())]
        return {**os.environ, "nnUNet_extTrainer": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}


def points_of(epsilons: Sequence[float], delta_epsilons: Sequence[float]) -> list[Point]:
    """Every pair, ε first; a Δε above its ε is left out.

    Raises:
        UserError: a value is not above 0, or no pair is left.
    """
    for value in (*epsilons, *delta_epsilons):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"The grid has the value {value:g}; epsilon and delta_epsilon must be above 0.")
    pairs = itertools.product(dict.fromkeys(epsilons), dict.fromkeys(delta_epsilons))
    points = [Point(epsilon, delta) for epsilon, delta in pairs if delta <= epsilon]
    if not points:
        raise UserError("Every delta_epsilon of the grid is above every epsilon; a margin could not grow even once.")
    return points


def _csv(scores: Sequence[Score]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    marks = ["learned", "trusted", "trained_on_these_cases", "started_from_unknown"]
    writer.writerow(["epsilon", "delta_epsilon", "clean_tvdi", "robust_tvdi", "geometric_mean", *marks])
    for score in scores:
        figures = [score.clean, score.robust, score.geometric_mean]
        writer.writerow([score.point.epsilon, score.point.delta_epsilon, *figures, *(getattr(score, m) for m in marks)])
    return stream.getvalue()


def draw(scores: Sequence[Score], title: str, file: Path) -> None:
    """Figure C.6: Δε along, ε up, the geometric mean in each field; what is not finished stays empty."""
    epsilons = sorted({score.point.epsilon for score in scores})
    deltas = sorted({score.point.delta_epsilon for score in scores})
    values = np.full((len(epsilons), len(deltas)), np.nan)
    for score in scores:
        row, column = epsilons.index(score.point.epsilon), deltas.index(score.point.delta_epsilon)
        values[row, column] = 100 * score.geometric_mean
    with plt.style.context("default"):
        size = (2.5 + 1.1 * len(deltas), 2 + 0.8 * len(epsilons))
        figure, axes = plt.subplots(figsize=size, dpi=130, layout="constrained")
        picture = axes.imshow(values, origin="lower", cmap="viridis", aspect="auto")
        middle = (np.nanmin(values) + np.nanmax(values)) / 2
        for row, column in itertools.product(range(len(epsilons)), range(len(deltas))):
            value = values[row, column]
            if not np.isnan(value):
                colour = "white" if value <= middle else "black"
                axes.text(column, row, f"{value:.1f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(deltas)), [f"{delta:g}" for delta in deltas])
        axes.set_yticks(range(len(epsilons)), [f"{epsilon:g}" for epsilon in epsilons])
        axes.set(xlabel="Δε", ylabel="ε", title=title)
        figure.colorbar(picture, label="geometric mean of clean and attacked TVDI (%)")
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)
