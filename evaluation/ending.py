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
    mine = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == mine:
            raise Terminated(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
