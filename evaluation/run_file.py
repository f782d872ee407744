"""Write a run.json that was lost or damaged anew, where the records say what stood in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.identity import FILE, SCHEMA, digest, read_run, sealed
from nnunet_ima.evaluation.records import part_folders, runs_noted
from nnunet_ima.files import write_text


def restore_run(folder: Path, identity: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Write run.json anew if it cannot be read and nothing in the folder is of another run; else leave it as it is.

    Args:
        folder: of the run; it need not exist.
        identity: of the run that is asked for, as ``write_identity`` takes it.
        head: of its summary. Of what stood there, only the date and the words of the command can be others.
    """
    file, parts = folder / FILE, part_folders(folder)
    begun = file.exists() or bool(parts)
    if not begun or _can_be_read(folder) or not _can_only_be(digest(identity), parts, folder):
        return
    state = "damaged" if file.exists() else "missing"
    content = sealed({"schema": SCHEMA, "identity": identity, "head": head})
    write_text(file, json.dumps(content, indent=2) + "\n")
    tqdm.write(f"{file} was {state}; what this command asks for, which the records agree with, is written anew.")


def _can_be_read(folder: Path) -> bool:
    try:
        read_run(folder)
    except UserError:
        return False
    return True


def _can_only_be(run: str, parts: Sequence[Path], folder: Path) -> bool:
    """Whether all records are of this run; where there are none, there must be no results either."""
    noted = [runs for runs in map(runs_noted, parts) if runs is not None]
    if noted:
        return all(runs == {run} for runs in noted)
    return not (folder / "summary.json").exists()
