"""The steps of the demo and the benchmarks: what is done stays done, what failed says so, never two at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from finished_run import finish
from nnunet_project import quiet

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import steps as module
from nnunet_ima.evaluation.command_line import main
from nnunet_ima.evaluation.identity import read_run
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, SmallNetwork
from nnunet_ima.evaluation.steps import _percentage

NETWORK = SmallNetwork("2d_small", features=8, most_features=16, batch_size=4)
STOCK = Method("stock", "nnUNetTrainerSTD", {})
DATASET = Path("Dataset901_Phantom")
ATTACKS = Attacks("sound", ("2", "5"), ("fgsm", "autoattack:version=fast"), further=("--max-samples", "4"))


@pytest.fixture
def pipeline(tmp_path, monkeypatch) -> Pipeline:
    monkeypatch.setattr(module.time, "sleep", lambda _: time_sleep(0.02))
    return Pipeline(tmp_path / "work", "nnUNetPlansTest", NETWORK, "cpu")


time_sleep = time.sleep


def note(file: Path, text: str = "x", then: str = "") -> list[str]:
    """A command that leaves a trace each time it runs."""
    return ["python", "-c", f"open({str(file)!r}, 'a').write({text!r}); {then}"]


def test_a_step_that_is_done_is_not_done_again_but_another_command_is(pipeline, tmp_path):
    trace = tmp_path / "trace"
    for _ in range(3):
        pipeline.steps.once("step", note(trace))
    assert trace.read_text(encoding="utf-8") == "x"
    pipeline.steps.once("step", note(trace, "y"))
    assert trace.read_text(encoding="utf-8") == "xy"


def test_a_step_that_failed_names_its_last_line_and_its_log_and_runs_again(pipeline, tmp_path):
    trace = tmp_path / "trace"
    failing = note(trace, then="print('all is lost'); raise SystemExit(3)")
    for _ in range(2):
        with pytest.raises(UserError, match="all is lost") as error:
            pipeline.steps.once("step", failing)
    assert str(pipeline.output / "logs" / "step.log") in str(error.value)
    assert trace.read_text(encoding="utf-8") == "xx"


# ---- which evaluations are done


def pipeline_in(folder: Path, device: str = "cpu") -> Pipeline:
    """With the weights of a trained model, if there are none yet."""
    made = Pipeline(folder, "nnUNetPlansTest", NETWORK, device)
    weights = made.fold_folder(DATASET, STOCK) / "checkpoint_final.pth"
    if not weights.exists():
        weights.parent.mkdir(parents=True)
        weights.write_text("weights")
    return made


@pytest.fixture
def ran(monkeypatch) -> list[str]:
    """Steps that would have been run; an evaluation is finished at once."""
    found: list[str] = []

    def run(self: module.Steps, step: str, command: Sequence[str], *_: object) -> None:
        found.append(step)
        if command[1] == "evaluate":
            finish(Path(command[command.index("-o") + 1]), command)

    monkeypatch.setattr(module.Steps, "run", run)
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_an_evaluation_whose_results_were_taken_away_is_made_again(tmp_path, ran):
    pipeline = pipeline_in(tmp_path / "work")
    folder = pipeline.results(STOCK, ATTACKS)
    for _ in range(2):
        assert pipeline.evaluate(DATASET, STOCK, ATTACKS) == folder
    assert ran == [folder.name]
    shutil.rmtree(folder)
    pipeline.evaluate(DATASET, STOCK, ATTACKS)
    assert ran == [folder.name] * 2


def test_a_finished_evaluation_is_done_on_any_device_and_wherever_its_folder_was_moved(tmp_path, ran):
    before = content(pipeline_in(tmp_path / "work").evaluate(DATASET, STOCK, ATTACKS))
    on_a_gpu = pipeline_in(tmp_path / "work", "cuda")
    assert on_a_gpu.is_evaluated(DATASET, STOCK, ATTACKS)
    assert content(on_a_gpu.evaluate(DATASET, STOCK, ATTACKS)) == before
    (tmp_path / "work").rename(tmp_path / "moved")
    moved = pipeline_in(tmp_path / "moved")
    assert moved.is_evaluated(DATASET, STOCK, ATTACKS)
    assert content(moved.evaluate(DATASET, STOCK, ATTACKS)) == before
    assert len(ran) == 1


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (replace(ATTACKS, attacks=("fgsm",)), "attacks: fgsm autoattack:version=fast there, fgsm here"),
        (replace(ATTACKS, levels=("2", "6")), "levels: 2 5 there, 2 6 here"),
        (replace(ATTACKS, norm="linf", levels=("2/255",)), "norm: l2 there, linf here"),
        (replace(ATTACKS, protocol="paper"), "protocol: sound there, paper here"),
        (replace(ATTACKS, further=()), "max samples: 4 there, None here"),
        (replace(ATTACKS, further=(*ATTACKS.further, "--seed", "1")), "seed: 0 there, 1 here"),
        (replace(ATTACKS, further=(*ATTACKS.further, "--samples-seed", "1")), "the attacks': None there, 1 here"),
        (replace(ATTACKS, further=(*ATTACKS.further, "--no-cases")), "case level: True there, False here"),
        (replace(ATTACKS, further=(*ATTACKS.further, "--end-to-end")), "end to end: None there, window here"),
    ],
)
def test_another_evaluation_in_its_place_is_refused_and_stays(tmp_path, ran, other, difference):
    pipeline = pipeline_in(tmp_path / "work")
    folder = pipeline.evaluate(DATASET, STOCK, ATTACKS)
    before = content(folder)
    with pytest.raises(UserError) as error:
        pipeline.evaluate(DATASET, STOCK, other)
    assert difference in str(error.value)
    assert "move them away or choose another folder with -o" in str(error.value)
    assert content(folder) == before
    assert ran == [folder.name]


@pytest.mark.parametrize(
    ("otherwise", "difference"),
    [
        ({"version of": {"nnunet_ima": "0.0.1"}}, "version of nnunet_ima: 0.0.1 there"),
        ({"ensembles": {"autoattack:version=fast": {"fgsm": {}}}}, "ensembles autoattack:version=fast"),
    ],
)
def test_what_another_version_measured_is_none_of_this_one(tmp_path, ran, otherwise, difference):
    pipeline = pipeline_in(tmp_path / "work")
    finish(pipeline.results(STOCK, ATTACKS), pipeline.evaluate_command(DATASET, STOCK, ATTACKS), **otherwise)
    with pytest.raises(UserError, match=difference):
        pipeline.evaluate(DATASET, STOCK, ATTACKS)
    assert ran == []


def test_results_of_a_model_that_was_trained_anew_since_are_refused_and_stay(tmp_path, ran):
    pipeline = pipeline_in(tmp_path / "work")
    folder = pipeline.evaluate(DATASET, STOCK, ATTACKS)
    before, weights = content(folder), pipeline.fold_folder(DATASET, STOCK) / "checkpoint_final.pth"
    weights.unlink()
    # Before the new training they are refused as well.
    with pytest.raises(UserError, match="results of a model that is not here, and a new training makes another"):
        pipeline.evaluate(DATASET, STOCK, ATTACKS)
    weights.write_text("others")
    with pytest.raises(UserError, match=r"model sha256: \w+\.\.\. there, \w+\.\.\. here"):
        pipeline.evaluate(DATASET, STOCK, ATTACKS)
    assert content(folder) == before
    assert ran == [folder.name]


def test_results_that_were_taken_elsewhere_without_the_model_are_done(tmp_path, ran):
    pipeline = pipeline_in(tmp_path / "work")
    pipeline.evaluate(DATASET, STOCK, ATTACKS)
    (pipeline.logs / "train_STD.done").write_text("{}")
    shutil.rmtree(pipeline.folders["nnUNet_results"])
    assert pipeline.is_evaluated(DATASET, STOCK, ATTACKS)


def test_damaged_results_are_refused_and_stay(tmp_path, ran):
    pipeline = pipeline_in(tmp_path / "work")
    folder = pipeline.evaluate(DATASET, STOCK, ATTACKS)
    (folder / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary.json is damaged"):
        pipeline.evaluate(DATASET, STOCK, ATTACKS)
    assert (folder / "run.json").is_file()


def test_an_evaluation_that_was_begun_is_left_to_the_command_which_goes_on_or_refuses(tmp_path, monkeypatch):
    pipeline = pipeline_in(tmp_path / "work", "cuda")
    folder = pipeline.results(STOCK, ATTACKS)
    finish(folder, pipeline_in(tmp_path / "work").evaluate_command(DATASET, STOCK, ATTACKS))
    (folder / "summary.json").unlink()
    before, seen = content(folder), []
    monkeypatch.setattr(module.Steps, "run", lambda *_: seen.append(content(folder)))
    assert not pipeline.is_evaluated(DATASET, STOCK, ATTACKS)
    pipeline.evaluate(DATASET, STOCK, ATTACKS)
    assert seen == [before]


def test_what_the_command_itself_made_is_known_as_done(project, std_2d, tmp_path, monkeypatch):
    """With a real network: the identity that is written is the one that is asked for."""
    shutil.copytree(std_2d, tmp_path / "model")
    monkeypatch.setattr("nnunet_ima.evaluation.evaluate._use_all_cores", lambda _: None)
    monkeypatch.setattr(Pipeline, "model", lambda *_: tmp_path / "model")
    ran: list[str] = []

    def run(self: module.Steps, step: str, command: Sequence[str], *_: object) -> None:
        ran.append(step)
        with quiet():
            assert main(command[1:]) == 0

    monkeypatch.setattr(module.Steps, "run", run)
    here, on_a_gpu = (Pipeline(tmp_path / "work", "plans", NETWORK, device) for device in ("cpu", "cuda"))
    further = ("--max-samples", "3", "--seed", "2", "--no-cases")
    for attacks in (
        Attacks("sound", ("5",), ("white-noise:draws=2", "autoattack:version=fast"), further=further),
        Attacks("paper", ("2/255", "4/255"), ("fgsm",), "linf", "paper", further),
    ):
        folder = here.evaluate(DATASET, STOCK, attacks)
        assert on_a_gpu.evaluate(DATASET, STOCK, attacks) == folder
        identity = read_run(folder)["identity"]
        assert (identity["device"], identity["seed"]) == ("cpu", 2)
    assert len(ran) == 2
    weights = tmp_path / "model" / "fold_0" / "checkpoint_final.pth"
    weights.write_bytes(weights.read_bytes() + b"0")
    with pytest.raises(UserError, match="model sha256"):
        here.evaluate(DATASET, STOCK, attacks)


def test_a_task_is_converted_and_planned_once_also_if_study_and_scans_were_moved(tmp_path, ran):
    for part in ("imagesTr", "labelsTr"):
        (tmp_path / "raw" / "Task901_Phantom" / part).mkdir(parents=True)
    (tmp_path / "raw" / "Task901_Phantom" / "dataset.json").touch()

    def prepare(place: Path) -> None:
        pipeline = Pipeline(place / "work", "nnUNetPlansTest", NETWORK, "cpu")
        (pipeline.folders["nnUNet_preprocessed"] / "Dataset901_Phantom").mkdir(exist_ok=True)
        pipeline.prepare(place / "raw" / "Task901_Phantom")
        # What was converted stays what it is.
        (pipeline.folders["nnUNet_raw"] / "Dataset901_Phantom").mkdir(exist_ok=True)

    for _ in range(2):
        prepare(tmp_path)
    assert ran == ["convert", "plan"]
    (tmp_path / "moved").mkdir()
    for name in ("raw", "work"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    prepare(tmp_path / "moved")
    assert ran == ["convert", "plan"]
    assert (tmp_path / "moved" / "work" / "staged" / "Task901_Phantom" / "labelsTr").is_dir()
    other = Pipeline(tmp_path / "moved" / "work", "plans", replace(NETWORK, parent="3d_fullres"), "cpu")
    other.prepare(tmp_path / "moved" / "raw" / "Task901_Phantom")
    assert ran == ["convert", "plan", "plan"]


# ---- one at a time


def test_a_pipeline_can_be_sent_to_another_process_after_its_first_command(pipeline, tmp_path):
    pipeline.steps.once("step", note(tmp_path / "trace"))
    other = pickle.loads(pickle.dumps(pipeline))
    assert other.folders == pipeline.folders
    other.steps.once("step", note(tmp_path / "trace"))
    assert (tmp_path / "trace").read_text(encoding="utf-8") == "x"


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_is_at_work(pipeline, tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (pipeline.output / "logs" / "running.pid").write_text(str(other.pid), encoding="utf-8")
        with pytest.raises(UserError, match=f"Process {other.pid} is still at work"):
            pipeline.steps.once("step", note(tmp_path / "trace"))
        assert not (tmp_path / "trace").exists()
    finally:
        other.kill()
        other.wait()
    pipeline.steps.once("step", note(tmp_path / "trace"))
    assert (tmp_path / "trace").exists()
    assert not (pipeline.output / "logs" / "running.pid").exists()


def test_a_run_that_is_interrupted_stops_its_command(pipeline, tmp_path, monkeypatch):
    started: list[int] = []

    def interrupted(process: subprocess.Popen[bytes], *_: object) -> None:
        started.append(process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_watch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.steps.once("step", ["python", "-c", "import time; time.sleep(60)"])
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)
    assert not (pipeline.output / "logs" / "running.pid").exists()


def test_plans_hold_a_small_configuration_a_method_and_where_it_starts_from(pipeline):
    dataset = pipeline.folders["nnUNet_preprocessed"] / "Dataset901_Phantom"
    dataset.mkdir()
    architecture = {"arch_kwargs": {"n_stages": 3, "features_per_stage": [32, 64, 128]}}
    planned = {"plans_name": "nnUNetPlans", "configurations": {"2d": {"architecture": architecture}}}
    (dataset / "nnUNetPlans.json").write_text(json.dumps(planned), encoding="utf-8")
    stock = Method("stock", "nnUNetTrainerSTD", {"num_epochs": 1})
    hard = Method("hard", "nnUNetTrainerIMA", {"num_epochs": 2}, start=stock)
    pipeline.write_plans(dataset, (stock, hard))
    assert json.loads((dataset / "nnUNetPlans.json").read_text(encoding="utf-8")) == planned
    plans = json.loads((dataset / "nnUNetPlansTest.json").read_text(encoding="utf-8"))
    entries = [plans["configurations"][pipeline.configuration(method)] for method in (stock, hard)]
    assert entries[0]["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 16, 16]
    assert "start_from" not in entries[0]["nnunet_ima"]
    start = pipeline.fold_folder(dataset, stock) / "checkpoint_final.pth"
    assert entries[1]["nnunet_ima"] == {"num_epochs": 2, "start_from": str(start)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("no bar", 0), ("  0%|  | 0/9\r 44%|## | 4/9", 44), ("100%|#| 9/9\n" + "what it found\n" * 500, 100)],
)
def test_the_bar_of_a_step_does_not_fall_back_when_its_table_is_printed(text, expected):
    assert _percentage(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", 0), ("Epoch time: 5 s", 0), ("Epoch 0\nEpoch time: 5 s\n", 1), ("\nEpoch 0 \nEpoch 1 \n", 2),
     ("\n2026: Epoch 40 \n", 41), ("Epoch 40\nEpoch 41\n", 42)],
)  # fmt: skip
def test_the_bar_of_a_training_that_goes_on_begins_where_that_stopped(text, expected, tmp_path, monkeypatch):
    shown = []

    class Process:
        returncode = 0
        answers = iter([None, 0])

        def poll(self) -> int | None:
            return next(self.answers)

    def refresh(bar: module.tqdm, **_: object) -> None:
        shown.append(bar.n)

    (tmp_path / "log").write_text(text, encoding="utf-8")
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module.tqdm, "refresh", refresh)
    module._watch(Process(), tmp_path / "log", "train", "Epoch ", 50)
    assert expected in shown
    assert set(shown) <= {0, expected, 50}
