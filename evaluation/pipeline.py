"""From a Decathlon task to evaluated models, by nnU-Net's own commands and ours; a step that is done stays done."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.decathlon import stage_task, task_number
from nnunet_ima.evaluation.environment import available_cores, trainers_folder
from nnunet_ima.evaluation.finished import is_finished
from nnunet_ima.evaluation.steps import Steps, resume_options
from nnunet_ima.files import write_text

PLANS = "nnUNetPlans"
FEW_CASES = 60
# nnU-Net's own default.
MOST_PROCESSES = 8
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class Method:
    """A model to train.

    Attributes:
        title: for people.
        trainer: nnU-Net's name of the trainer.
        settings: what stands under the key ``nnunet_ima`` of its configuration.
        start: the method whose whole network it starts from, None for random weights.
        cases: train on this many of fold 0's training cases only, so that each sample is visited more often; None for
            all. The validation cases stay the same.
        variant: tells methods with the same trainer, start and cases apart in the names of folders.
    """

    title: str
    trainer: str
    settings: Mapping[str, Any]
    start: Method | None = None
    cases: int | None = None
    variant: str = ""


@dataclass(frozen=True)
class SmallNetwork:
    """A configuration that inherits from one of nnU-Net's plan, but is small enough for a CPU.

    Attributes:
        parent: the planned configuration.
        features: of the first stage; they double with each stage.
        most_features: of any stage.
        batch_size: of the training; None for the planned one.
    """

    name: str
    parent: str = "2d"
    features: int = 16
    most_features: int = 128
    batch_size: int | None = 32

    def configuration(self, plans: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The entry for a plans file."""
        architecture = json.loads(json.dumps(plans["configurations"][self.parent]["architecture"]))
        stages = architecture["arch_kwargs"]["n_stages"]
        architecture["arch_kwargs"]["features_per_stage"] = [
            min(self.features * 2**stage, self.most_features) for stage in range(stages)
        ]
        return {
            "inherits_from": self.parent,
            **_batch(self.batch_size),
            "architecture": architecture,
            "nnunet_ima": dict(settings),
        }


@dataclass(frozen=True)
class PlannedNetwork:
    """A configuration as nnU-Net planned it.

    Attributes:
        name: of the planned configuration.
        batch_size: of the training; None for the planned one.
    """

    name: str = "2d"
    batch_size: int | None = None

    @property
    def parent(self) -> str:
        """The planned configuration."""
        return self.name

    def configuration(self, plans: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The entry for a plans file: nothing but the settings, and the batch if one was given, is its own.

        Raises:
            UserError: nnU-Net planned no such configuration.
        """
        if self.name not in plans["configurations"]:
            planned = ", ".join(plans["configurations"])
            raise UserError(f"nnU-Net planned no configuration {self.name!r} for this dataset; it planned {planned}.")
        return {"inherits_from": self.name, **_batch(self.batch_size), "nnunet_ima": dict(settings)}


def _batch(size: int | None) -> dict[str, Any]:
    return {} if size is None else {"batch_size": size}


@dataclass(frozen=True)
class Attacks:
    """How a model is evaluated: arguments of ``nnunet_ima evaluate``."""

    name: str
    levels: Sequence[str]
    attacks: Sequence[str]
    norm: str = "l2"
    protocol: str = "sound"
    further: Sequence[str] = field(default_factory=tuple)


class Pipeline:
    """Runs the steps in ``output``, which holds nnU-Net's three folders, logs and results.

    Args:
        output: where everything goes.
        plans_name: of the plans file that holds the small configurations; nnU-Net's own stays as it is.
        network: the configuration; each trainer gets one of its own, for its settings.
        device: for training and attack.
        workers: processes that augment for a training.
        logs: where commands log, and what is done is noted; two commands at once need two of these.
        compiled: whether nnU-Net may compile the network.
        make_folders: False for a look at what would be run, which leaves nothing behind.
    """

    def __init__(
        self,
        output: Path,
        plans_name: str,
        network: SmallNetwork | PlannedNetwork,
        device: str,
        workers: int = 1,
        logs: str = "logs",
        compiled: bool = False,
        make_folders: bool = True,
    ) -> None:
        self.output, self.plans_name, self.network, self.device = output.resolve(), plans_name, network, device
        self.workers, self.logs, self.compiled = workers, self.output / logs, compiled
        self.folders = {name: self.output / name for name in FOLDERS}
        for folder in (*self.folders.values(), self.logs) if make_folders else ():
            folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, task: Path) -> Path:
        """Convert, plan and preprocess a Decathlon task; returns its folder of preprocessed data.

        Raises:
            UserError: it is no task folder, or the output folder holds another task.
        """
        view = self.convert(task)
        return self.plan(view)

    def convert(self, task: Path) -> Path:
        """Take a Decathlon task into nnU-Net; returns the view of it that was converted.

        Raises:
            UserError: it is no task folder, or the output folder holds another task.
        """
        view = stage_task(task, self.output / "staged")
        others = [entry.name for entry in (self.output / "staged").iterdir() if entry.name != view.name]
        if others:
            raise UserError(f"{self.output} already holds work on {others[0]}; give another output folder.")
        if not self.is_converted():
            # What a killed conversion left: nnU-Net refuses to convert into a dataset that is there.
            for half in self.folders["nnUNet_raw"].glob(f"{_dataset_prefix(view)}*"):
                shutil.rmtree(half)
            self.steps.once("convert", self.convert_command(view, _count_cases(view)))
        return view

    def is_converted(self) -> bool:
        """Whether a task was converted here before, wherever its folder lay then: there is never more than one."""
        return (self.logs / "convert.done").is_file()

    def plan(self, view: Path) -> Path:
        """Plan and preprocess a converted task; returns its folder of preprocessed data."""
        if not self.is_planned(view):
            self.steps.once("plan", self.plan_command(view, _count_cases(view)))
        return next(self.folders["nnUNet_preprocessed"].glob(f"{_dataset_prefix(view)}*"))

    def is_planned(self, view: Path) -> bool:
        """Whether a converted task was planned and preprocessed before, by however many processes."""
        wanted = self._plan(view)
        return self.steps.noted("plan")[: len(wanted)] == wanted

    def convert_command(self, view: Path, cases: int) -> list[str]:
        """nnU-Net's conversion of a staged task."""
        return ["nnUNetv2_convert_MSD_dataset", "-i", str(view), "-np", _processes(cases)]

    def plan_command(self, view: Path, cases: int) -> list[str]:
        """nnU-Net's planning and preprocessing of a converted task."""
        processes = ["-np", _processes(cases), "-npfp", _processes(cases)]
        return [*self._plan(view), *processes, "--verify_dataset_integrity"]

    def _plan(self, view: Path) -> list[str]:
        return ["nnUNetv2_plan_and_preprocess", "-d", str(task_number(view)), "-c", self.network.parent]

    def write_plans(self, dataset: Path, methods: Sequence[Method]) -> None:
        """Write the plans file with one small configuration a method."""
        plans = json.loads((dataset / f"{PLANS}.json").read_text(encoding="utf-8"))
        plans["plans_name"] = self.plans_name
        for method in methods:
            settings = dict(method.settings)
            if method.start is not None:
                settings["start_from"] = str(self.fold_folder(dataset, method.start) / "checkpoint_final.pth")
            plans["configurations"][self.configuration(method)] = self.network.configuration(plans, settings)
        write_text(dataset / f"{self.plans_name}.json", json.dumps(plans, indent=2))

    def train(self, dataset: Path, method: Method) -> None:
        """Train a method, or continue where a stopped training left off."""
        step = f"train_{self.key(method)}"
        self._refuse_other_settings(method)
        self.steps.once(step, self.train_command(dataset, method), "Epoch ", method.settings["num_epochs"])

    def train_command(self, dataset: Path, method: Method) -> list[str]:
        """nnU-Net's training of a method, from where it stopped."""
        fold = str(self.fold(dataset, method))
        command = ["nnUNetv2_train", dataset.name, self.configuration(method), fold, "-tr", method.trainer]
        command += ["-p", self.plans_name, "-device", self.device]
        return command + resume_options(self.fold_folder(dataset, method))

    def is_trained(self, method: Method) -> bool:
        """Whether the training of a method ended well before."""
        return (self.logs / f"train_{self.key(method)}.done").is_file()

    def evaluate(self, dataset: Path, method: Method, attacks: Attacks) -> Path:
        """Attack a trained method unless that was done before; returns the folder of the results.

        Raises:
            UserError: the folder holds another evaluation, which is neither continued nor removed; or the step failed.
        """
        folder = self.results(method, attacks)
        if not self.is_evaluated(dataset, method, attacks):
            # Results that somebody took away are made again; those that were begun are continued, or refused.
            self.steps.forget(folder.name)
            self.steps.once(folder.name, self.evaluate_command(dataset, method, attacks))
        return folder

    def is_evaluated(self, dataset: Path, method: Method, attacks: Attacks) -> bool:
        """Whether this very evaluation was finished before, on whatever device, and wherever the folder lay then.

        Raises:
            UserError: another one was, such as of a model that was trained anew since; what differs is named.
        """
        folder = self.results(method, attacks)
        finished = is_finished(folder, self.evaluate_command(dataset, method, attacks))
        weights = self.fold_folder(dataset, method) / "checkpoint_final.pth"
        if finished and not weights.is_file() and not self.is_trained(method):
            raise UserError(
                f"{folder} holds results of a model that is not here, and a new training makes another one; move them "
                f"away or choose another folder with -o."
            )
        return finished

    def evaluate_command(self, dataset: Path, method: Method, attacks: Attacks) -> list[str]:
        """The attack on a trained method."""
        command = ["nnunet_ima", "evaluate", "-m", str(self.model(dataset, method)), "-device", self.device]
        command += ["-f", str(self.fold(dataset, method))]
        command += ["--levels", *attacks.levels, "--attacks", *attacks.attacks]
        command += ["-o", str(self.results(method, attacks))]
        return [*command, "--norm", attacks.norm, "--protocol", attacks.protocol, *attacks.further]

    def results(self, method: Method, attacks: Attacks) -> Path:
        """Where the results of an evaluation are."""
        return self.output / f"{attacks.name}_{self.key(method)}"

    def model(self, dataset: Path, method: Method) -> Path:
        """nnU-Net's folder of a trained method."""
        name = f"{method.trainer}__{self.plans_name}__{self.configuration(method)}"
        return self.folders["nnUNet_results"] / dataset.name / name

    def _refuse_other_settings(self, method: Method) -> None:
        """A model that was trained with other settings must not pass for one trained with these."""
        if self.has_other_settings(method):
            raise UserError(
                f"{method.title} was trained with other settings in {self.output}; remove that folder or give another."
            )
        write_text(self._settings_file(method), _as_noted(method))

    def has_other_settings(self, method: Method) -> bool:
        """Whether the model of that name was trained with other settings, or begins to be."""
        file = self._settings_file(method)
        return file.is_file() and file.read_text(encoding="utf-8") != _as_noted(method)

    def _settings_file(self, method: Method) -> Path:
        return self.logs / f"train_{self.key(method)}.settings.json"

    def fold(self, dataset: Path, method: Method) -> int:
        """Fold 0, or for a method with fewer cases a fold of its own, added to nnU-Net's splits."""
        if method.cases is None:
            return 0
        file = dataset / "splits_final.json"
        if not file.is_file():
            raise UserError(f"{file} is missing: train a method on all cases first, nnU-Net then makes it.")
        splits = json.loads(file.read_text(encoding="utf-8"))
        chosen = sorted(random.Random(0).sample(sorted(splits[0]["train"]), min(method.cases, len(splits[0]["train"]))))
        mine = {"train": chosen, "val": splits[0]["val"]}
        if mine not in splits:
            splits.append(mine)
            write_text(file, json.dumps(splits, indent=4))
        return int(splits.index(mine))

    def fold_folder(self, dataset: Path, method: Method) -> Path:
        """nnU-Net's folder of a trained method's fold."""
        return self.model(dataset, method) / f"fold_{self.fold(dataset, method)}"

    def configuration(self, method: Method) -> str:
        """Name of a method's configuration."""
        return f"{self.network.name}_{self.key(method)}"

    def key(self, method: Method) -> str:
        """Short name of a method, for files."""
        own = (
            method.trainer.removeprefix("nnUNetTrainer")
            + method.variant
            + (f"_{method.cases}cases" if method.cases else "")
        )
        return own if method.start is None else f"{own}_from_{self.key(method.start)}"

    @cached_property
    def steps(self) -> Steps:
        """The commands, with nnU-Net's folders in ``output``; always the same, as whoever stops them stops all."""
        return Steps(self.logs, self._environment())

    def __getstate__(self) -> dict[str, Any]:
        # Another process starts commands of its own; a lock could not go there.
        return {name: value for name, value in vars(self).items() if name != "steps"}

    def _environment(self) -> dict[str, str]:
        # One core loads and augments; more than four gain nothing on networks as small as these.
        threads = min(max((os.cpu_count() or 2) - 1, 1), 4)
        return {
            "OMP_NUM_THREADS": str(threads),
            # Threads that spin while they wait slow each other down tenfold as soon as a core is shared.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            **{name: str(folder) for name, folder in self.folders.items()},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": str(self.workers),
            "nnUNet_def_n_proc": "2",
            "nnUNet_compile": "1" if self.compiled else "0",
            "PYTHONUNBUFFERED": "1",
        }


def _dataset_prefix(view: Path) -> str:
    return f"Dataset{task_number(view):03d}_"


def _count_cases(view: Path) -> int:
    return len(list((view / "labelsTr").iterdir()))


def _processes(cases: int) -> str:
    # Each process that nnU-Net spawns imports torch first, which takes longer than to preprocess a few cases.
    return str(min(max(available_cores(), 2), MOST_PROCESSES)) if cases > FEW_CASES else "1"


def _as_noted(method: Method) -> str:
    return json.dumps(dict(method.settings), sort_keys=True)
