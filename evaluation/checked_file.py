"""Files of bytes that show whether they are what was written."""

from __future__ import annotations

import zlib
from pathlib import Path

from nnunet_ima.files import atomic_path

_LENGTH = 4


def write_checked(file: Path, content: bytes) -> None:
    """Write bytes after their checksum, whole or not at all."""
    with atomic_path(file) as temporary:
        temporary.write_bytes(zlib.crc32(content).to_bytes(_LENGTH, "big") + content)


def read_checked(file: Path) -> bytes | None:
    """The bytes; None if the file is not there, cannot be read, or was changed."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    checksum, content = content[:_LENGTH], content[_LENGTH:]
    return content if checksum == zlib.crc32(content).to_bytes(_LENGTH, "big") else None
