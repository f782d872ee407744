"""``kill`` and a queue's SIGTERM end what a command has started, too."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nnunet_ima.evaluation import command_line
from nnunet_ima.evaluation.ending import SIGNALS, ended_in_order

# Two jobs at once, or one in the main thread, each of which starts a command that takes ten minutes and, as nnU-Net's
# training does, has a process of its own.
COMMAND = ["bash", "-c", 'sleep 600 & echo $! > "$0"; wait']
PROGRAM = """
import json, os, signal, sys
from functools import partial
from pathlib import Path
from nnunet_ima.evaluation.ending import ended_in_order
from nnunet_ima.evaluation.steps import Steps
from nnunet_ima.evaluation.study import run_jobs

# Whoever runs the tests may have been started under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
steps, command = [], json.loads(os.environ["COMMAND"])
for name in sys.argv[2:]:
    (Path(sys.argv[1]) / name).mkdir()
    steps.append(Steps(Path(sys.argv[1]) / name, os.environ))

def stop():
    for one in steps:
        one.stop()

with ended_in_order():
    if len(steps) == 1:
        steps[0].run("wait", [*command, str(steps[0].logs / "child.pid")])
    else:
        jobs = [partial(one.run, "wait", [*command, str(one.logs / "child.pid")]) for one in steps]
        run_jobs([(str(i), job) for i, job in enumerate(jobs)], 2, stop)
"""


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text(encoding="utf-8")


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("names", [("one",), ("one", "two")])
def test_what_was_started_is_ended(tmp_path, names, number):
    study = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), *names],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "COMMAND": json.dumps(COMMAND)},
    )
    commands: list[int] = []
    notes = [tmp_path / name / note for name in names for note in ("running.pid", "child.pid")]
    try:
        wait_for(lambda: all(note.is_file() and note.read_text(encoding="utf-8") for note in notes))
        commands = [int(note.read_text(encoding="utf-8")) for note in notes]
        assert all(map(alive, commands))
        study.send_signal(number)
        assert study.wait(60) != 0
        wait_for(lambda: not any(map(alive, commands)))
    finally:
        study.kill()
        for command in filter(alive, commands):
            os.kill(command, signal.SIGKILL)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_command_says_that_it_was_stopped_and_by_what(monkeypatch, capsys, number):
    def run(_: object) -> int:
        os.kill(os.getpid(), number)
        time.sleep(30)
        return 0

    earlier = signal.signal(number, signal.SIG_DFL)
    options = command_line.read_arguments(["trainers"])
    options.run = run
    monkeypatch.setattr(command_line, "read_arguments", lambda _: options)
    try:
        assert command_line.main([]) == 128 + number
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, earlier)
    assert capsys.readouterr().err == "nnunet_ima: stopped.\n"


def test_under_nohup_a_closed_terminal_ends_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ended_in_order():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_forked_processes_are_ended_at_once_whenever_the_signal_comes():
    """Pools end their workers so, some right after they were forked, and wait for them."""
    with ended_in_order():
        for turn in range(100):
            reads, writes = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    os.read(reads, 1)
                finally:
                    os._exit(3)
            time.sleep(turn % 30 * 1e-4)
            os.kill(child, signal.SIGTERM)
            ended: list[int] = []

            def is_ended(child: int = child, ended: list[int] = ended) -> bool:
                ended[:] = os.waitpid(child, os.WNOHANG)
                return ended[0] == child

            try:
                wait_for(is_ended, 20)
            except AssertionError:
                os.kill(child, signal.SIGKILL)
                raise
            finally:
                os.close(reads)
                os.close(writes)
            assert os.WIFSIGNALED(ended[1])
            assert os.WTERMSIG(ended[1]) == signal.SIGTERM


def test_forked_processes_have_the_signals_as_they_are_by_default(monkeypatch):
    # Under nohup one of them is ignored, and stays so.
    monkeypatch.setattr("nnunet_ima.evaluation.ending.SIGNALS", heeded := [signal.SIGTERM])
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with ended_in_order():
        child = os.fork()
        if child == 0:
            default = all(signal.getsignal(number) is signal.SIG_DFL for number in heeded)
            os._exit(0 if default and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask else 3)
        assert os.waitpid(child, 0)[1] == 0
        assert all(signal.getsignal(number) is not signal.SIG_DFL for number in heeded)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


def test_pools_of_forked_workers_end():
    with ended_in_order():
        for _ in range(20):
            with multiprocessing.get_context("fork").Pool(4) as pool:
                assert pool.map(abs, range(-8, 0)) == list(range(8, 0, -1))
