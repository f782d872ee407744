"""Several jobs at once: all that can be done is done, and an interrupted study starts nothing more."""

from __future__ import annotations

import subprocess
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.pipeline import Attacks, Method, Pipeline, PlannedNetwork, SmallNetwork
from nnunet_ima.evaluation.study import Study, exclusive, run_jobs


def test_failures_are_named_and_the_rest_is_done():
    done: list[int] = []

    def run(number: int) -> None:
        done.append(number)
        if number % 2:
            raise UserError(f"{number} is odd")

    failed = run_jobs(((f"job {i}", lambda i=i: run(i)) for i in range(5)), 2, lambda: None)
    assert sorted(done) == [0, 1, 2, 3, 4]
    assert [(title, str(error)) for title, error in failed] == [("job 1", "1 is odd"), ("job 3", "3 is odd")]


def test_an_interrupted_study_ends_what_runs_and_starts_nothing_more(monkeypatch):
    begun, stopped = threading.Event(), threading.Event()
    ran: list[str] = []

    def first() -> None:
        ran.append("first")
        begun.set()
        assert stopped.wait(20)

    def interrupted(_: object) -> None:
        assert begun.wait(20)
        raise KeyboardInterrupt

    monkeypatch.setattr(Future, "exception", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_jobs([("first", first), ("second", lambda: ran.append("second"))], 1, stopped.set)
    assert stopped.is_set()
    assert ran == ["first"]


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_all_trainings_come_first_and_evaluations_in_their_order_one_at_a_time_for_each_model(
    tmp_path, monkeypatch, at_once
):
    methods = [Method(name, f"nnUNetTrainer{name}", {"num_epochs": 1}) for name in ("STD", "IMA", "TE")]
    asked = [Attacks(name, ["1"], ["white-noise"]) for name in ("sound_l2", "sound_linf")]
    study = Study(tmp_path, "plans", PlannedNetwork(), methods, asked, "cpu", before_evaluations=lambda *_: None)
    begun: list[str] = []
    at_work: list[str] = []

    def work(title: str, what: str) -> None:
        begun.append(f"{title} {what}")
        assert title not in at_work
        at_work.append(title)
        time.sleep(0.02)
        at_work.remove(title)

    def train(_: Pipeline, __: Path, method: Method) -> None:
        work(method.title, "trained")
        if method.title == "IMA":
            raise UserError("no memory")

    monkeypatch.setattr(Pipeline, "train", train)
    monkeypatch.setattr(Pipeline, "fold_folder", lambda *_: tmp_path)
    monkeypatch.setattr(Pipeline, "evaluate", lambda _, __, method, attacks: work(method.title, attacks.name))
    failed = run_jobs(study.rounds(tmp_path), at_once, study.stop)
    assert [(title, str(error)) for title, error in failed] == [("IMA", "no memory")]
    # What failed is not attacked, the others are, each after its training.
    assert len(begun) == 3 + 2 * 2
    assert {line.split()[1] for line in begun if line.startswith("IMA")} == {"trained"}
    for title in ("STD", "TE"):
        assert next(line.split()[1] for line in begun if line.startswith(title)) == "trained"
    if at_once == 1:
        words = [line.split()[1] for line in begun]
        assert words == ["trained"] * 3 + ["sound_l2"] * 2 + ["sound_linf"] * 2


def test_a_stopped_study_evaluates_nothing_more_in_its_rounds(tmp_path, monkeypatch):
    method = Method("IMA", "nnUNetTrainerIMA", {"num_epochs": 1})
    study = Study(tmp_path, "plans", PlannedNetwork(), [method], [Attacks("sound_l2", ["1"], ["white-noise"])], "cpu")
    monkeypatch.setattr(Pipeline, "train", lambda *_: study.stop())
    monkeypatch.setattr(Pipeline, "evaluate", lambda *_: pytest.fail("it was evaluated"))
    failed = run_jobs(study.rounds(tmp_path), 1, study.stop)
    assert [(title, str(error)) for title, error in failed] == [("IMA, sound_l2", "the time is up")]


def test_a_command_that_does_not_listen_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_ima.evaluation.steps.GRACE", 0.2)
    study = Study(tmp_path, "plans", PlannedNetwork(), [], [], "cpu")
    steps, ready = study.pipeline().steps, tmp_path / "ready"
    deaf = f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(ready)!r}, 'w'); time.sleep(300)"
    stopping = threading.Thread(target=lambda: (wait_for(ready), study.stop()))
    stopping.start()
    with pytest.raises(UserError, match="The step train failed"):
        steps.once("train", ["python", "-c", deaf])
    stopping.join()


def wait_for(file: Path) -> None:
    end = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_stopped_study_runs_no_further_step(tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_ima.evaluation.steps.Steps.run", lambda *_: pytest.fail("a step was run"))
    method = Method("IMA", "nnUNetTrainerIMA", {"num_epochs": 1})
    study = Study(tmp_path, "plans", PlannedNetwork(), [method], [], "cpu")
    ((title, run),) = study.jobs(tmp_path / "nnUNet_preprocessed" / "Dataset004_Hippocampus")
    study.stop()
    with pytest.raises(UserError, match="the time is up"):
        run()
    assert title == "IMA"


def test_a_stop_just_before_a_command_starts_ends_it(tmp_path, monkeypatch):
    """It arrives after the last look at whether there was one, and before there is a process that it could end."""
    study = Study(tmp_path, "plans", PlannedNetwork(), [], [], "cpu")
    pipeline = study.pipeline()
    start, trace, stops = subprocess.Popen, tmp_path / "trace", []

    def stop_and_start(*arguments: Any, **options: Any) -> Any:
        stops.append(threading.Thread(target=study.stop))
        stops[0].start()
        # Where nothing holds it up, it has stopped all that runs by now: nothing.
        stops[0].join(1)
        return start(*arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", stop_and_start)
    command = ["python", "-c", f"import time; time.sleep(5); open({str(trace)!r}, 'w')"]
    with pytest.raises(UserError, match="The step train failed"):
        pipeline.steps.once("train", command)
    stops[0].join()
    assert not trace.exists()
    assert not (pipeline.logs / "train.done").exists()
    assert not (pipeline.logs / "running.pid").exists()


def test_a_stop_just_after_the_last_look_for_it_starts_nothing(tmp_path, monkeypatch):
    method = Method("IMA", "nnUNetTrainerIMA", {"num_epochs": 1})
    study = Study(tmp_path, "plans", PlannedNetwork(), [method], [], "cpu")
    ((_, run),) = study.jobs(tmp_path / "nnUNet_preprocessed" / "Dataset004_Hippocampus")
    look = study._unless_stopped

    def look_then_stop() -> None:
        look()
        study.stop()

    monkeypatch.setattr(study, "_unless_stopped", look_then_stop)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a command was started"))
    with pytest.raises(UserError, match="was not begun, as the work was stopped"):
        run()


def test_a_folder_is_held_by_one_at_a_time(tmp_path):
    with exclusive(tmp_path, "it"), pytest.raises(UserError, match="at work on it"), exclusive(tmp_path, "it"):
        pytest.fail("held twice")
    with exclusive(tmp_path, "it"):
        pass


def test_a_look_at_a_study_leaves_nothing(tmp_path: Path):
    study = Study(tmp_path / "work", "plans", PlannedNetwork(), [], [], "cpu", make_folders=False)
    study.pipeline()
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("batch_size", [None, 8])
def test_a_batch_is_the_planned_one_unless_another_is_given(batch_size):
    architecture = {"arch_kwargs": {"n_stages": 2}}
    plans = {"configurations": {"2d": {"batch_size": 366, "architecture": architecture}}}
    for network in (PlannedNetwork(batch_size=batch_size), SmallNetwork("2d_small", batch_size=batch_size)):
        assert network.configuration(plans, {}).get("batch_size", "planned") == (batch_size or "planned")
