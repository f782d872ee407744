"""Commands of nnU-Net and ours, run one after the other; one that ended well is not run again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

# Seconds that a command has to end by itself. Killed then, it loses no more than by a kill from outside.
GRACE = 15.0


class Steps:
    """Runs named commands.

    Args:
        logs: folder for their output, and for the notes of what is done.
        environment: of the commands.
    """

    def __init__(self, logs: Path, environment: Mapping[str, str]) -> None:
        self.logs, self.environment = logs, environment
        # Held while a command is started, so that a stop comes either before, and nothing starts, or after.
        self._starting = threading.Lock()
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None

    def once(self, step: str, command: Sequence[str], counted: str = "", total: int | None = None) -> None:
        """Run a command unless it ended well before; show progress by counting lines of its log.

        Raises:
            UserError: the command failed; its last line and its log are named.
        """
        done = self.logs / f"{step}.done"
        # How a training was started or continued does not matter; its settings were compared.
        if done.is_file() if counted else self.is_done(step, command):
            return
        started = time.time()
        self.run(step, command, counted, total)
        write_text(done, json.dumps({"seconds": round(time.time() - started, 1), "command": list(command)}))

    def run(self, step: str, command: Sequence[str], counted: str = "", total: int | None = None) -> None:
        """Run a command, whether or not it ran before.

        Raises:
            UserError: it failed, :meth:`stop` was called before, or another one is at work with the same logs.
        """
        log = self.logs / f"{step}.log"
        running = self.logs / "running.pid"
        _refuse_if_alive(running)
        self._refuse_if_stopped(step)
        with log.open("w", encoding="utf-8") as stream:
            process = self._start(step, command, stream)
            try:
                write_text(running, str(process.pid))
                _watch(process, log, step, counted, total)
            except BaseException:
                _end(process)
                process.wait()
                raise
            finally:
                if process.poll() is not None:
                    running.unlink(missing_ok=True)
        if process.returncode:
            raise UserError(f"The step {step} failed: {_last_line(log)} (all of it in {log}).")

    def _start(self, step: str, command: Sequence[str], log: IO[str]) -> subprocess.Popen[bytes]:
        with self._starting:
            self._refuse_if_stopped(step)
            self._process = subprocess.Popen(
                [_program(command[0]), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(self.environment),
                # A group of its own, so that what the command has started can be ended with it.
                start_new_session=True,
            )
            return self._process

    def _refuse_if_stopped(self, step: str) -> None:
        if self._stopped:
            raise UserError(f"The step {step} was not begun, as the work was stopped.")

    def stop(self) -> None:
        """Begin no further command, and end the one that runs; it is told so, and what it wrote stays."""
        with self._starting:
            self._stopped = True
            if self._process is not None:
                _end(self._process)

    def forget(self, step: str) -> None:
        """A step whose results are gone is not done any more."""
        (self.logs / f"{step}.done").unlink(missing_ok=True)

    def is_done(self, step: str, command: Sequence[str]) -> bool:
        """Whether a step ended well before, by this very command."""
        return self.noted(step) == list(command)

    def noted(self, step: str) -> list[str]:
        """The command by which a step ended well before; nothing if it did not."""
        done = self.logs / f"{step}.done"
        content = json.loads(done.read_text(encoding="utf-8")) if done.is_file() else {}
        return list(content.get("command", []))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and all that it has started; nnU-Net's training would leave its loaders' processes behind.

    One that does not listen is killed after :data:`GRACE`, as a lent machine is taken back whether or not it has ended.
    """
    _signal(process, signal.SIGTERM)
    killer = threading.Timer(GRACE, _signal, (process, signal.SIGKILL))
    killer.daemon = True
    killer.start()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # Nothing is sent to one that has ended: the number may be another process's by now.
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)


def resume_options(fold: Path) -> list[str]:
    """What ``nnUNetv2_train`` needs to go on: nothing at first, ``--c`` on the way, ``--val`` at the end."""
    there = {file.name for file in fold.glob("checkpoint_*.pth")}
    if "checkpoint_final.pth" in there:
        return ["--val"]
    return ["--c"] if there & {"checkpoint_latest.pth", "checkpoint_best.pth"} else []


def _refuse_if_alive(running: Path) -> None:
    """A killed run may leave its nnU-Net command at work; two of them in one folder would spoil each other's files."""
    try:
        process = int(running.read_text(encoding="utf-8"))
        os.kill(process, 0)
    except (FileNotFoundError, ValueError, ProcessLookupError):
        return
    except PermissionError:
        pass
    raise UserError(
        f"Process {process} is still at work in this folder; wait for it or stop it (kill -- -{process}), or, if that "
        f"number belongs to something else by now, remove {running}."
    )


def _program(name: str) -> str:
    """The command that belongs to this Python, whatever the PATH says."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def _watch(process: subprocess.Popen[bytes], log: Path, step: str, counted: str, total: int | None) -> None:
    """Wait for the end of a step: a bar of its epochs, or of the percentage that its own bar shows.

    In the log an epoch's number stands behind ``counted``.
    """
    pattern = re.compile(rf"\b{re.escape(counted)}(\d+)") if counted else None
    with tqdm(total=total or 100, desc=f"  {step}", unit="epoch" if total else "%", dynamic_ncols=True) as bar:
        while process.poll() is None:
            time.sleep(1.0)
            text = log.read_text(encoding="utf-8", errors="replace")
            bar.n = min(_begun(pattern, text), bar.total) if pattern else _percentage(text)
            bar.refresh()
        if process.returncode == 0:
            bar.n = bar.total


def _begun(pattern: re.Pattern[str], text: str) -> int:
    """How many epochs were begun, those before this start of a training included: the first one is number 0."""
    numbers = pattern.findall(text)
    return int(numbers[-1]) + 1 if numbers else 0


def _percentage(text: str) -> int:
    """The last percentage that a step's own progress bar printed, however much was printed after it."""
    found = re.findall(r"(\d{1,3})%\|", text)
    return min(int(found[-1]), 100) if found else 0


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
