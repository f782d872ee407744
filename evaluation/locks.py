"""One process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock

from nnunet_ima.errors import UserError


@contextmanager
def alone(file: Path, refusal: str) -> Iterator[None]:
    """Hold a lock; another process, or thread, that asks for it meanwhile is refused.

    Args:
        file: the lock; its folder is made. It stays, as removing it would let two in; the system lets go of it when the
            process ends, however that ends.
        refusal: a sentence.

    Raises:
        UserError: somebody else holds it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(file, timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(refusal) from None
    try:
        yield
    finally:
        lock.release()
