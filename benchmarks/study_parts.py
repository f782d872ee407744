"""Named contents as one stream in files of at most 15 MiB, in one folder: all as they were last written, or as before.

The stream is cut into as few files as it takes, as some machines give back few. Their names hold their digests, so that
new parts lie beside the old ones. The manifest, which says what the parts are, is renamed into place last; only then
are old parts removed.
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
SCHEMA = "nnunet_ima/study_state/2"


class Part(TypedDict):
    """A file, and the digest of what it holds."""

    file: str
    sha256: str


class Manifest(TypedDict):
    """The parts of the stream, and how many bytes of it each content takes, in that order."""

    parts: list[Part]
    contents: dict[str, int]


def read_manifest(folder: Path) -> Manifest:
    """What the folder holds; nothing if nothing was written to it.

    Raises:
        UserError: it holds a state of an older version, or a damaged manifest.
    """
    file = folder / MANIFEST
    if not file.is_file():
        if (folder / "records.tar.gz").is_file():
            raise UserError(f"{folder} holds a study's state of an older version; give another folder with --state.")
        return {"parts": [], "contents": {}}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            raise UserError(f"{folder} holds a study's state of another version; give another folder with --state.")
        return {"parts": list(content["parts"]), "contents": dict(content["contents"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged; copy the state again.") from error


def load(folder: Path) -> dict[str, bytes]:
    """All contents.

    Raises:
        UserError: a part is missing, or is not what the manifest says; and as :func:`read_manifest`.
    """
    manifest = read_manifest(folder)
    pieces = []
    for part in manifest["parts"]:
        file = folder / part["file"]
        piece = file.read_bytes() if file.is_file() and file.parent == folder else b""
        if hashlib.sha256(piece).hexdigest() != part["sha256"]:
            raise UserError(f"{file} is missing or not what {MANIFEST} says it is; copy the whole state again.")
        pieces.append(piece)
    stream, contents, begin = b"".join(pieces), {}, 0
    for name, length in manifest["contents"].items():
        contents[name] = stream[begin : begin + length]
        begin += length
    return contents


def store(folder: Path, contents: Mapping[str, bytes]) -> None:
    """From now on the folder holds these contents, and no others."""
    stream = b"".join(contents.values())
    parts = [
        _write(folder, number, stream[start : start + LARGEST_PART])
        for number, start in enumerate(range(0, len(stream), LARGEST_PART))
    ]
    lengths = {name: len(content) for name, content in contents.items()}
    manifest = {"schema": SCHEMA, "parts": parts, "contents": lengths}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    wanted = {part["file"] for part in parts}
    for file in folder.glob("*.part"):
        if file.name not in wanted:
            file.unlink()


def _write(folder: Path, number: int, piece: bytes) -> Part:
    digest = hashlib.sha256(piece).hexdigest()
    file = folder / f"{number}.{digest[:16]}.part"
    # One that is there may be what a full disk left of it.
    if not file.is_file() or file.stat().st_size != len(piece):
        with atomic_path(file) as temporary:
            temporary.write_bytes(piece)
    return {"file": file.name, "sha256": digest}
