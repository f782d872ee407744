"""``make demo``: a fragile model and a hardened one, from data to a page that compares them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.comparison import Run, write_comparison
from nnunet_ima.evaluation.decathlon import stage_task, task_number
from nnunet_ima.evaluation.environment import trainers_folder
from nnunet_ima.evaluation.phantom import make_phantom_task
from nnunet_ima.files import write_text

PLANS, DEMO_PLANS, CONFIGURATION = "nnUNetPlans", "nnUNetPlansDemo", "2d_demo"
PHANTOM_CASES = 48
FEATURES, BATCH_SIZE = 12, 16

# Short enough for two cores, long enough to learn the phantom. The hardened model starts from the stock one's weights.
STD_SETTINGS: dict[str, Any] = {
    "num_epochs": 16,
    "num_iterations_per_epoch": 25,
    "num_val_iterations_per_epoch": 2,
    "initial_lr": 0.1,
}
IMA_SETTINGS: dict[str, Any] = {
    "num_epochs": 10,
    "num_iterations_per_epoch": 25,
    "num_val_iterations_per_epoch": 2,
    "initial_lr": 0.05,
    "steps": 6,
    "bisections": 5,
    "epsilon": 10.0,
    "delta_epsilon": 3.0,
}
LEVELS = ("2.5", "5", "10")
ATTACKS = ("white-noise:draws=5", "apgd:steps=20")
MAX_SAMPLES = 160


@dataclass(frozen=True)
class _Method:
    title: str
    trainer: str
    settings: dict[str, Any]
    pretrained: bool

    @property
    def configuration(self) -> str:
        return f"{CONFIGURATION}_{self.trainer.removeprefix('nnUNetTrainer')}"


METHODS = (
    _Method("Stock nnU-Net", "nnUNetTrainerSTD", STD_SETTINGS, pretrained=False),
    _Method("Hardened with IMA", "nnUNetTrainerIMA", IMA_SETTINGS, pretrained=True),
)


def run_demo(output: Path, data: Path | None, device: str) -> Path:
    """Make or take data, plan, train two models, attack both, write a page; a step that is done is not done again.

    Args:
        output: where everything goes.
        data: a task folder of the Decathlon, None for a phantom.
        device: for training and attack.

    Returns:
        The page, ``report.html``.

    Raises:
        UserError: the data is no task folder, or a step failed; its log is named.
    """
    return _Demo(output.resolve(), device).run(data)


class _Demo:
    def __init__(self, output: Path, device: str) -> None:
        self.output, self.device = output, device
        self.folders = {name: output / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        for folder in (*self.folders.values(), output / "logs"):
            folder.mkdir(parents=True, exist_ok=True)

    def run(self, data: Path | None) -> Path:
        if data is None:
            print("[1/5] Making a phantom dataset", flush=True)
            source = make_phantom_task(self.output / "data" / "Task901_Phantom", PHANTOM_CASES)
        else:
            print(f"[1/5] Taking {data}", flush=True)
            source = data
        view = stage_task(source, self.output / "staged")
        self._refuse_other_data(view)
        dataset = self._prepare(view)
        self._small_plans(dataset)
        runs = [self._train_and_attack(number, method, dataset) for number, method in enumerate(METHODS)]
        page = self.output / "report.html"
        print("[5/5] Writing the page", flush=True)
        write_comparison(runs, page, phantom=data is None)
        return page

    def _refuse_other_data(self, view: Path) -> None:
        others = [entry.name for entry in (self.output / "staged").iterdir() if entry.name != view.name]
        if others:
            raise UserError(f"{self.output} already holds a demo on {others[0]}; give another folder with -o.")

    def _prepare(self, view: Path) -> Path:
        number = task_number(view)
        print("[2/5] nnU-Net plans and preprocesses", flush=True)
        self._once("convert", ["nnUNetv2_convert_MSD_dataset", "-i", str(view), "-np", "2"])
        self._once(
            "plan",
            ["nnUNetv2_plan_and_preprocess", "-d", str(number), "-c", "2d", "-np", "2", "--verify_dataset_integrity"],
        )
        return next(self.folders["nnUNet_preprocessed"].glob(f"Dataset{number:03d}_*"))

    def _small_plans(self, dataset: Path) -> None:
        """A plans file with one small configuration a method, which inherits all else from nnU-Net's plan."""
        plans = json.loads((dataset / f"{PLANS}.json").read_text(encoding="utf-8"))
        plans["plans_name"] = DEMO_PLANS
        for method in METHODS:
            architecture = json.loads(json.dumps(plans["configurations"]["2d"]["architecture"]))
            stages = architecture["arch_kwargs"]["n_stages"]
            architecture["arch_kwargs"]["features_per_stage"] = [min(FEATURES * 2**i, 96) for i in range(stages)]
            plans["configurations"][method.configuration] = {
                "inherits_from": "2d",
                "batch_size": BATCH_SIZE,
                "architecture": architecture,
                "nnunet_ima": method.settings,
            }
        write_text(dataset / f"{DEMO_PLANS}.json", json.dumps(plans, indent=2))

    def _train_and_attack(self, number: int, method: _Method, dataset: Path) -> Run:
        print(f"[{3 + number}/5] {method.title}: train, then attack", flush=True)
        epochs = method.settings["num_epochs"]
        command = ["nnUNetv2_train", dataset.name, method.configuration, "0", "-tr", method.trainer, "-p", DEMO_PLANS]
        command += ["-device", self.device]
        if method.pretrained:
            command += [
                "-pretrained_weights",
                str(self._model(dataset, METHODS[0]) / "fold_0" / "checkpoint_final.pth"),
            ]
        elif (self._model(dataset, method) / "fold_0" / "checkpoint_latest.pth").is_file():
            command.append("--c")
        self._once(f"train_{method.trainer}", command, "Epoch ", epochs)
        folder = self.output / f"evaluation_{method.trainer}"
        self._once(
            f"evaluate_{method.trainer}",
            ["nnunet_ima", "evaluate", "-m", str(self._model(dataset, method)), "--levels", *LEVELS,
             "--attacks", *ATTACKS, "--max-samples", str(MAX_SAMPLES), "-device", self.device, "-o", str(folder)],
        )  # fmt: skip
        return Run(method.title, folder)

    def _model(self, dataset: Path, method: _Method) -> Path:
        folder = f"{method.trainer}__{DEMO_PLANS}__{method.configuration}"
        return self.folders["nnUNet_results"] / dataset.name / folder

    def _once(self, step: str, command: Sequence[str], counted: str = "", total: int | None = None) -> None:
        """Run a command unless it ended well before; show progress by counting lines of its log."""
        done = self.output / "logs" / f"{step}.done"
        if done.is_file():
            return
        log = self.output / "logs" / f"{step}.log"
        with log.open("w", encoding="utf-8") as stream:
            process = subprocess.Popen(
                [_program(command[0]), *command[1:]], stdout=stream, stderr=subprocess.STDOUT, env=self._environment()
            )
            try:
                _watch(process, log, step, counted, total)
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise UserError(f"The step {step} of the demo failed: {_last_line(log)} (all of it in {log}).")
        done.touch()

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            **{name: str(folder) for name, folder in self.folders.items()},
            "nnUNet_extTrainer": str(trainers_folder()),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "2",
            "nnUNet_compile": "0",
            "PYTHONUNBUFFERED": "1",
        }


def _program(name: str) -> str:
    """The command that belongs to this Python, whatever the PATH says."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _watch(process: subprocess.Popen[bytes], log: Path, step: str, counted: str, total: int | None) -> None:
    """Wait for the end of a step: a bar of its epochs, or its own bar's last state."""
    pattern = re.compile(rf"\b{re.escape(counted)}\d+") if counted else None
    with tqdm(total=total, desc=f"  {step}", unit="epoch" if total else "s", dynamic_ncols=True) as bar:
        while process.poll() is None:
            time.sleep(0.5)
            text = log.read_text(encoding="utf-8", errors="replace")
            if pattern is not None:
                bar.n = min(len(pattern.findall(text)), total or 0)
            else:
                bar.n = int(bar.format_dict["elapsed"])
                bar.set_postfix_str(_share_done(text))
            bar.refresh()


def _share_done(text: str) -> str:
    """The last percentage that the step's own progress bar printed."""
    found = re.findall(r"(\d{1,3})%\|", text[-2000:])
    return f"{found[-1]} %" if found else ""


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
