"""The steps of the demo and the benchmarks: what is done stays done, what failed says so, never two at once."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation import steps as module
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, SmallNetwork

NETWORK = SmallNetwork("2d_small", features=8, most_features=16, batch_size=4)


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


def test_an_evaluation_whose_results_were_taken_away_is_made_again(pipeline, tmp_path, monkeypatch):
    method, attacks = Method("stock", "nnUNetTrainerSTD", {}), Attacks("sound", ("5",), ("fgsm",))
    folder, trace = pipeline.results(method, attacks), tmp_path / "trace"
    write = f"import pathlib; p = pathlib.Path({str(folder)!r}); p.mkdir(); (p / 'summary.json').write_text('')"
    monkeypatch.setattr(pipeline, "evaluate_command", lambda *_: note(trace, then=write))
    for _ in range(2):
        assert pipeline.evaluate(tmp_path, method, attacks) == folder
    assert trace.read_text(encoding="utf-8") == "x"
    shutil.rmtree(folder)
    pipeline.evaluate(tmp_path, method, attacks)
    assert trace.read_text(encoding="utf-8") == "xx"
    assert (folder / "summary.json").is_file()


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
