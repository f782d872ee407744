"""What ends a command from outside also ends the commands that it has started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What ``kill`` and queues send, and what a terminal sends that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """One of these signals came.

    Attributes:
        status: with which a command ends then, by custom.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.status = 128 + number


# The signals that are raised now, and of the thread that forks the mask of before.
_in_force: set[int] = set()
_forking = threading.local()


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While this is in force :data:`SIGNALS` are raised as :class:`Terminated`, so that everybody can clean up.

    By itself each would end this process at once: an nnU-Net training that it has started would go on, unseen. A signal
    that is ignored, as under ``nohup``, stays so. Processes that are forked meanwhile are ended at once, as before; so
    is everything where this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        raise Terminated(number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heeded}
    outer = set(_in_force)
    _in_force.update(heeded)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _in_force.intersection_update(outer)


def _before_fork() -> None:
    # What comes while a process is forked waits until the child has its own way of taking it.
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _in_force)


def _in_parent() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


def _in_child() -> None:
    # Not a handler that ends it: one of Python's is not called while a process waits for a lock that it has just begun
    # to wait for. nnU-Net ends the workers of its pools by SIGTERM, and would wait for them forever.
    for number in _in_force:
        signal.signal(number, signal.SIG_DFL)
    _in_force.clear()
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)


os.register_at_fork(before=_before_fork, after_in_parent=_in_parent, after_in_child=_in_child)
