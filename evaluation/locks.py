"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nnunet_ima.errors import UserError


@contextmanager
def alone(file: Path, refusal: str, patience: float = 0) -> Iterator[None]:
    """Hold a lock; another process, or thread, that asks for it meanwhile is refused.

    Where the file system has ``flock``, the system lets go of the lock when the process ends, however that ends; the
    file stays, as removing it would let two in. Where it has none, the file itself is the lock, and filelock says so in
    a warning: it goes with the process, but after a kill it may stay, until somebody removes it.

    Args:
        file: the lock; its folder is made.
        refusal: a sentence without its full stop. When the file may be removed is added.
        patience: seconds to wait for whoever holds it.

    Raises:
        UserError: somebody else holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=patience)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"{refusal}; if no such process is left on any machine, remove {file}.") from None
    try:
        yield
    finally:
        lock.release()
