"""Named contents in files of at most 15 MiB, in one folder: all of them as they were last written, or the ones before.

A content is cut into parts, whose names hold their digests, so that new parts lie beside the old ones. The manifest,
which says what the parts are, is renamed into place last; only then are old parts removed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

from nnunet_ima.errors import UserError
from nnunet_ima.files import atomic_path, write_text

LARGEST_PART = 15 * 2**20
MANIFEST = "state.json"
SCHEMA = "nnunet_ima/study_state/1"


class Part(TypedDict):
    """A file, and the digest of what it holds."""

    file: str
    sha256: str


Manifest = dict[str, list[Part]]


def read_manifest(folder: Path) -> Manifest:
    """The parts of each content; none of a folder to which nothing was written.

    Raises:
        UserError: it holds a state of an older version, or a damaged manifest.
    """
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / "records.tar.gz").is_file():
            raise UserError(f"{folder} holds a study's state of an older version; give another folder with --state.")
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        whole = content["schema"] == SCHEMA
        contents: Manifest = content["contents"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{file} is damaged, or of another version; copy the state again.")
    return contents


def store(folder: Path, name: str, content: bytes) -> list[Part]:
    """Write a content's parts beside whatever is there; they count once :func:`commit` was told of them."""
    parts: list[Part] = []
    for number, start in enumerate(range(0, max(len(content), 1), LARGEST_PART)):
        piece = content[start : start + LARGEST_PART]
        digest = hashlib.sha256(piece).hexdigest()
        file = folder / f"{name}.{digest[:16]}.{number}.part"
        # One that is there may be what a full disk left of it.
        if not file.is_file() or file.stat().st_size != len(piece):
            with atomic_path(file) as temporary:
                temporary.write_bytes(piece)
        parts.append({"file": file.name, "sha256": digest})
    return parts


def load(folder: Path, name: str, parts: list[Part]) -> bytes:
    """A content.

    Raises:
        UserError: a part is missing, or is not what the manifest says.
    """
    pieces = []
    for part in parts:
        file = folder / part["file"]
        piece = file.read_bytes() if file.is_file() and file.parent == folder else b""
        if hashlib.sha256(piece).hexdigest() != part["sha256"]:
            raise UserError(
                f"{file}, a part of {name}, is missing or not what {MANIFEST} says it is; copy the whole state again."
            )
        pieces.append(piece)
    return b"".join(pieces)


def commit(folder: Path, contents: Mapping[str, list[Part]]) -> None:
    """From now on the folder holds these contents; parts of others are removed."""
    write_text(folder / MANIFEST, json.dumps({"schema": SCHEMA, "contents": dict(contents)}, indent=1) + "\n")
    wanted = {part["file"] for parts in contents.values() for part in parts}
    for file in folder.glob("*.part"):
        if file.name not in wanted:
            file.unlink()
