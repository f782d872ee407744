"""Files: written whole or not at all, and read with a sentence about those that cannot be."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError


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


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file of nnU-Net.

    Raises:
        UserError: it is missing or no JSON table.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; the folder it should be in is not complete.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is no valid JSON ({error}); restore it.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no JSON table; restore it.")
    return content


def sha256_of(file: Path) -> str:
    """Digest of a file's content, which may be larger than memory."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that a killed process left in ``folder``; no other process may be writing there."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
