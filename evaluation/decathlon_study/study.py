"""``nnunet_ima decathlon``: convert, plan, train, evaluate, report, as far as it is not done yet."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.decathlon import dataset_name, view_name
from nnunet_ima.evaluation.decathlon_study import table
from nnunet_ima.evaluation.decathlon_study.cost import Planned, read_planned
from nnunet_ima.evaluation.decathlon_study.differences import EPOCHS, ITERATIONS, of_study, of_task
from nnunet_ima.evaluation.decathlon_study.evaluations import AUTOATTACK, NAMES, evaluations_of
from nnunet_ima.evaluation.decathlon_study.jobs import print_jobs
from nnunet_ima.evaluation.decathlon_study.tasks import GivenTask, find_tasks
from nnunet_ima.evaluation.environment import default_device
from nnunet_ima.evaluation.identity import differences as json_differences
from nnunet_ima.evaluation.markdown import escaped
from nnunet_ima.evaluation.pipeline import PLANS, Attacks, Method, PlannedNetwork, SmallNetwork
from nnunet_ima.evaluation.study import Job, Study, exclusive, run_jobs
from nnunet_ima.files import read_json, write_text
from nnunet_ima.settings import validate

STEPS = ("convert", "plan", "train", "evaluate", "report")
METHODS = ("STD", "SAT", "TE", "TRADES", "IMA")
PLANS_NAME = "nnUNetPlansDecathlon"
IDENTITY = "study.json"
# nnU-Net's limit in 2D.
MOST_FEATURES = 512


@dataclass(frozen=True)
class Request:
    """What the user asked for; see ``nnunet_ima decathlon --help``.

    Attributes:
        raw: the folder that holds the task folders.
        output: where everything goes.
        tasks, methods: what to work on.
        steps: of :data:`STEPS`, those to do.
        device: for training and attack; None for a GPU where there is one, else the CPU.
        jobs: models at work at once.
        workers: processes that augment, for each training.
        compiled: whether nnU-Net may compile the network.
        epochs, iterations: of all trainings.
        settings: of all trainings, beside the paper's.
        features: of the first stage of a small network; None for the planned one.
        batch_size: of all trainings; None for the planned one.
        attack: the strong one.
        samples: attack no more slices than this; None for all.
        evaluations: which of them.
    """

    raw: Path
    output: Path
    tasks: Sequence[int]
    methods: Sequence[str] = METHODS
    steps: Collection[str] = STEPS
    device: str | None = None
    jobs: int = 1
    workers: int = 1
    compiled: bool = False
    epochs: int = EPOCHS
    iterations: int = ITERATIONS
    settings: Mapping[str, Any] = field(default_factory=dict)
    features: int | None = None
    batch_size: int | None = None
    attack: str = AUTOATTACK
    samples: int | None = None
    evaluations: Sequence[str] = NAMES

    def options(self) -> list[str]:
        """Of the command, without tasks, methods and steps; folders in full, as a queue may start anywhere."""
        found = ["--raw", str(self.raw.resolve()), "-o", str(self.output.resolve())]
        # Where none was given, each machine of a queue takes its own.
        found += [] if self.device is None else ["-device", self.device]
        defaults = {name: value.default for name, value in type(self).__dataclass_fields__.items()}
        for name in ("workers", "epochs", "iterations", "features", "batch_size", "attack", "samples"):
            value = getattr(self, name)
            if value != defaults[name]:
                found += [f"--{name.replace('_', '-')}", str(value)]
        if tuple(self.evaluations) != NAMES:
            found += ["--evaluations", *self.evaluations]
        if self.settings:
            found += ["--set", *(f"{name}={json.dumps(value)}" for name, value in self.settings.items())]
        return [*found, *(["--compile"] if self.compiled else [])]


class DecathlonStudy:
    """The study that a request describes.

    Raises:
        UserError: something about the request cannot be done.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.output = request.output.resolve()
        validate(request.settings, "--set")
        self.tasks = [TaskStudy(request, task) for task in find_tasks(request.raw, request.tasks)]
        self._refuse_other_study()

    def run(self) -> str:
        """Do what is not done yet of the steps; returns what to tell the user.

        Raises:
            UserError: a step failed, or one that another needs was skipped; what could be done is done.
        """
        steps = self.request.steps
        self._note_identity()
        with ExitStack() as held:
            # Before anything is begun: who starts the same study twice shall not end up with half of each.
            for task in self.tasks:
                for folder, what in task.held(steps):
                    held.enter_context(exclusive(folder, what))
            for task in self.tasks:
                task.begin()
            jobs, unprepared = self._prepare()
            failed = run_jobs(jobs, self.request.jobs, self._stop)
        told = self.report() if "report" in steps else ""
        not_shown = self._refused() if "report" in steps else {}
        wrong = [
            *_counted(unprepared, f"of {len(self.tasks)} tasks could not be prepared"),
            *_counted(failed, f"of {len(jobs)} jobs failed"),
            *_counted(
                [(title, error) for title, error in not_shown.items() if title not in dict(failed)],
                f"of {len(self.tasks) * len(self.request.methods)} models have results left out of the report",
            ),
        ]
        if not wrong:
            return told
        if told:
            print(told)
        raise UserError(f"{', '.join(wrong)}; start the command again to go on.")

    def _prepare(self) -> tuple[list[Job], list[tuple[str, BaseException]]]:
        """The jobs of the tasks that could be prepared, and why others could not: one does not keep the rest."""
        jobs: list[Job] = []
        failed: list[tuple[str, BaseException]] = []
        for task in self.tasks:
            try:
                jobs += task.prepare(self.request.steps)
            except UserError as error:
                failed.append((task.given.title, error))
        return jobs, failed

    def _refused(self) -> dict[str, BaseException]:
        """Models with results that are not this study's, and why."""
        return {title: error for task in self.tasks for title, error in task.refused().values()}

    def report(self) -> str:
        """Write the page of each task, and the table of all; returns where they are."""
        rows = [row for task in self.tasks for row in task.rows()]
        if not rows:
            return "No evaluation is finished yet, so there is no report."
        pages = [page for task in self.tasks for page in task.pages(self.differences)]
        parts = ["# The Decathlon study", "", table.as_markdown(rows), "## Differences from the paper", ""]
        parts += [*(f"- {escaped(text)}" for text in self.differences), ""]
        for task in self.tasks:
            named = escaped(task.given.folder.name)
            parts += [f"### {named}", "", *(f"- {escaped(text)}" for text in task.differences), ""]
        write_text(self.output / "decathlon.md", "\n".join(parts))
        write_text(self.output / "decathlon.csv", table.as_csv(rows))
        shown = "\n".join(f"Open {page}" for page in pages)
        return f"{table.as_markdown(rows)}\n{shown}\nThe table is in {self.output / 'decathlon.md'} and decathlon.csv"

    def jobs(self) -> str:
        """The study as commands for a queue."""
        request = self.request
        return print_jobs(request.options(), [task.given.paper.number for task in self.tasks], request.methods,
                          request.steps)  # fmt: skip

    @property
    def differences(self) -> list[str]:
        """From the paper, in sentences: those of all tasks."""
        request = self.request
        lengths = ("num_epochs", "num_iterations_per_epoch")
        changed = [name for name in request.settings if name not in lengths]
        settings = {**dict(zip(lengths, (request.epochs, request.iterations), strict=True)), **request.settings}
        return of_study(settings, changed, request.features, request.attack, request.samples)

    def _stop(self) -> None:
        for task in self.tasks:
            task.study.stop()

    def _identity(self) -> dict[str, Any]:
        """What all trainings have in common."""
        request = self.request
        return {
            "features": request.features, "batch size": request.batch_size, "epochs": request.epochs,
            "iterations": request.iterations, "settings": dict(request.settings),
        }  # fmt: skip

    def _refuse_other_study(self) -> None:
        file = self.output / IDENTITY
        if not file.is_file():
            if self.output.exists() and (not self.output.is_dir() or _holds_something(self.output)):
                raise UserError(f"{self.output} holds something else than a study; give another folder with -o.")
            return
        found = json_differences(read_json(file), self._identity())
        if found:
            raise UserError(
                f"{self.output} holds another study ({'; '.join(found)}); give the same options, or another folder "
                f"with -o."
            )
        for task in self.tasks:
            task.refuse_other_scans()

    def _note_identity(self) -> None:
        if not (self.output / IDENTITY).is_file():
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / IDENTITY, json.dumps(self._identity(), indent=1) + "\n")
        # Somebody else may have been faster.
        self._refuse_other_study()


def _counted(failed: Sequence[tuple[str, BaseException]], words: str) -> list[str]:
    """How many of what failed, and why; nothing if none did."""
    sentences = "; ".join(f"{title}: {str(error).rstrip('.')}" for title, error in failed)
    return [f"{len(failed)} {words} ({sentences})"] if failed else []


def _holds_something(folder: Path) -> bool:
    """Hidden files do not count: temporary ones of a killed start are among them."""
    return any(not entry.name.startswith(".") for entry in folder.iterdir())


class TaskStudy:
    """One task of it, in a folder of its own: nnU-Net's three folders, logs and results."""

    def __init__(self, request: Request, given: GivenTask) -> None:
        self.request, self.given = request, given
        self.output = request.output.resolve() / given.title
        self.view = self.output / "staged" / view_name(given.folder)
        self.dataset = self.output / "nnUNet_preprocessed" / dataset_name(self.view)
        network: PlannedNetwork | SmallNetwork = PlannedNetwork(batch_size=request.batch_size)
        if request.features is not None:
            network = SmallNetwork("2d_small", "2d", request.features, MOST_FEATURES, request.batch_size)
        self.study = Study(
            self.output, PLANS_NAME, network,
            # All of them, also if only some are asked for now: the plans are written once.
            [Method(name, f"nnUNetTrainer{name}", self.settings) for name in METHODS],
            evaluations_of(given.paper, request.attack, request.samples, request.evaluations),
            request.device or default_device(), request.workers, request.compiled, make_folders=False,
        )  # fmt: skip
        self.pipeline = self.study.pipeline()

    @property
    def settings(self) -> dict[str, Any]:
        """Of all trainings; each method reads its own."""
        return {
            "epsilon": self.given.paper.epsilon,
            "delta_epsilon": self.given.paper.delta_epsilon,
            "num_epochs": self.request.epochs,
            "num_iterations_per_epoch": self.request.iterations,
            # They give nnU-Net's pseudo Dice and change no weight; so does the robust Dice.
            "num_val_iterations_per_epoch": 5,
            "robust_every": 10,
            **self.request.settings,
        }

    @property
    def methods(self) -> list[Method]:
        """Those asked for."""
        return [method for method in self.study.methods if method.title in self.request.methods]

    @cached_property
    def planned(self) -> Planned | None:
        """What nnU-Net planned, None if it has not yet."""
        file = self.dataset / f"{PLANS}.json"
        return read_planned(read_json(file)) if file.is_file() else None

    @property
    def batch_size(self) -> int:
        """Of the trainings: as asked for, as planned, or before that as in the paper."""
        planned = self.planned.batch_size if self.planned else self.given.paper.batch_size
        return self.request.batch_size or planned

    @property
    def differences(self) -> list[str]:
        """From the paper, in sentences, beside those of all tasks."""
        return of_task(self.given, self.request.batch_size, self.planned)

    def held(self, steps: Collection[str]) -> Iterator[tuple[Path, str]]:
        """Folders that no other process may work in meanwhile, with words for them."""
        if {"convert", "plan"} & set(steps):
            yield self.pipeline.logs, f"the preparation of {self.output}"
        for method in self.methods if {"train", "evaluate"} & set(steps) else []:
            yield self.study.pipeline(method).logs, f"{method.title} in {self.output}"

    def refuse_other_scans(self) -> None:
        """Another folder of the same number, or other cases, would be another study.

        Raises:
            UserError: so it is.
        """
        file = self.output / "task.json"
        if file.is_file() and read_json(file) != self._identity():
            raise UserError(
                f"{self.output} was begun with other scans than those of {self.given.folder}; give another folder "
                f"with -o."
            )

    def begin(self) -> None:
        """Note what it is, and make its folders."""
        self.output.mkdir(parents=True, exist_ok=True)
        if not (self.output / "task.json").is_file():
            write_text(self.output / "task.json", json.dumps(self._identity()) + "\n")
        for folder in (*self.pipeline.folders.values(), self.pipeline.logs):
            folder.mkdir(parents=True, exist_ok=True)

    def _identity(self) -> dict[str, Any]:
        return {"folder": self.given.folder.name, "cases": list(self.given.cases)}

    def prepare(self, steps: Collection[str]) -> list[Job]:
        """Convert and plan; returns the jobs that follow.

        Raises:
            UserError: a step failed, or one that is needed was skipped.
        """
        if "convert" in steps:
            self.pipeline.convert(self.given.folder)
        if "plan" in steps:
            self._need("convert")
            self.pipeline.plan(self.view)
            self._write_split()
            self.pipeline.write_plans(self.dataset, self.study.methods)
        train, attack = "train" in steps, "evaluate" in steps
        if not train and not attack:
            return []
        self._need("plan")
        if not train:
            for method in self.methods:
                self._refuse_untrained(method)
        jobs = self.study.jobs(self.dataset, train, attack, self.methods)
        return [(f"{self.given.title} {title}", run) for title, run in jobs]

    def _need(self, step: str) -> None:
        done = self.pipeline.logs / f"{step}.done"
        if not done.is_file() or (step == "plan" and not (self.dataset / f"{PLANS_NAME}.json").is_file()):
            raise UserError(
                f"The step {step} of {self.given.title} is not done yet in {self.output}, and was skipped; do it first "
                f"with --only {step}."
            )

    def _refuse_untrained(self, method: Method) -> None:
        if not self.study.pipeline(method).is_trained(method):
            raise UserError(
                f"{method.title} of {self.given.title} is not trained yet in {self.output}, so it cannot be evaluated; "
                f"do not skip train."
            )

    def _write_split(self) -> None:
        file, fold = self.dataset / "splits_final.json", self.given.split.as_fold
        if file.is_file():
            if json.loads(file.read_text(encoding="utf-8")) != [fold]:
                raise UserError(f"{file} holds another split than this study's; give another folder with -o.")
            return
        write_text(file, json.dumps([fold], indent=4))

    def refused(self) -> dict[Path, tuple[str, BaseException]]:
        """Folders of results that are of another evaluation than this study's, with the model and the reason."""
        found: dict[Path, tuple[str, BaseException]] = {}
        for method in self.methods:
            pipeline = self.study.pipeline(method)
            for attacks in self.study.evaluations:
                try:
                    pipeline.is_evaluated(self.dataset, method, attacks)
                except UserError as error:
                    found[pipeline.results(method, attacks)] = (f"{self.given.title} {method.title}", error)
        return found

    def runs(self) -> Iterator[tuple[Method, Attacks, dict[str, Any]]]:
        """The finished evaluations."""
        left_out = self.refused()
        for attacks in self.study.evaluations:
            for method in self.methods:
                folder = self.pipeline.results(method, attacks)
                if folder not in left_out and (folder / "summary.json").is_file():
                    yield method, attacks, read_json(folder / "summary.json")

    def rows(self) -> list[table.Row]:
        """For the table of all tasks."""
        found = []
        for method, _, summary in self.runs():
            trained = method.settings
            epsilon = float(trained["epsilon"]) if trained.get("norm", "l2") == "l2" else None
            found += table.rows_of(self.given.paper.number, method.title, epsilon, summary)
        return found

    def pages(self, shared: Sequence[str]) -> list[Path]:
        """Write the pages, with the differences from the paper that all tasks share and its own; returns them."""
        note = " ".join(["Differences from the paper:", *self.differences, *shared])
        # Its levels are others than those of AutoAttack in the same norm and protocol: it has a page of its own.
        noise = [one for one in self.study.evaluations if one.name.startswith("paper_linf_noise")]
        rest = [one for one in self.study.evaluations if one not in noise]
        left_out = self.refused()
        written = [
            self.study.report(rest, self.output / "report", self.methods, note, left_out),
            self.study.report(noise, self.output / "report_white_noise", self.methods, note, left_out),
        ]
        return [page for page in written if page is not None]

    def environment(self) -> str:
        """The exports that its commands need."""
        folders = self.pipeline.folders.items()
        exports = " ".join(f"{name}={shlex.quote(str(folder))}" for name, folder in folders)
        return f'export {exports} nnUNet_extTrainer="$(nnunet_ima trainers)"'
