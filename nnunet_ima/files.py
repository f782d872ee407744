"""Files that are either whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Give a temporary path beside ``file``, and rename it to ``file`` if the block ends well.

    If it does not, the temporary file is removed and an older ``file`` stays as it was.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write ``text`` to ``file``, whole or not at all."""
    with atomic_path(file) as temporary:
        # A path that is no text, which Python holds in surrogates, may be part of it.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left in ``folder``; no other process may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
