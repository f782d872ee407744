"""A file of records to which is only appended, so that a process that is killed loses nothing that stood in it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Journal:
    """One JSON record a line, each with its checksum.

    A line that was cut off, by a kill or a full disk, or that was changed, has a wrong checksum and is skipped; the
    next one begins on a line of its own. There are two line breaks between records, so that a changed byte costs one
    record at the most. One process may write at a time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def read(self) -> Iterator[Record]:
        """The records that are whole, in the order in which they were written."""
        if not self.file.is_file():
            return
        for line in self.file.read_bytes().split(b"\n"):
            checksum, _, text = line.partition(b" ")
            if text and checksum == _checksum(text):
                yield json.loads(text)

    def append(self, records: Sequence[Record]) -> None:
        """Write records; when this returns, they are on the disk.

        Raises:
            OSError: the disk is full, say; the records before these are not touched.
        """
        lines = [json.dumps(record).encode() for record in records]
        # What a killed process left may not end with a line break.
        content = b"".join(b"\n" + _checksum(line) + b" " + line + b"\n" for line in lines)
        stream = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            while content:
                content = content[os.write(stream, content) :]
            os.fsync(stream)
        except OSError as error:
            error.filename = str(self.file)
            raise
        finally:
            os.close(stream)


def _checksum(text: bytes) -> bytes:
    return f"{zlib.crc32(text):08x}".encode()
