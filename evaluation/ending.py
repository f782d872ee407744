"""What ends a command from outside also ends the commands that it has started."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM came, as ``kill`` and queues send it."""


@contextmanager
def ended_in_order() -> Iterator[None]:
    """While this is in force SIGTERM is raised as :class:`Terminated`, so that everybody can clean up.

    By itself it would end this process at once: an nnU-Net training that it has started would go on, unseen. Processes
    that are forked meanwhile are ended at once, as before; so is everything where this is not the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    mine = os.getpid()

    def end(number: int, _: FrameType | None) -> None:
        if os.getpid() == mine:
            raise Terminated
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
