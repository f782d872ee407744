"""What the numbers of a run depend on: only results of the same run are continued, or merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError
from nnunet_ima.files import write_text

FILE = "run.json"
SCHEMA = "nnunet_ima/run/1"
# More would not be read.
SHOWN = 4


def write_identity(folder: Path, identity: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Write run.json: the identity, and the head of the summary, unless the same run is there.

    Raises:
        UserError: the folder holds another run, or results without one; the differences are named.
    """
    file = folder / FILE
    if file.is_file():
        refuse_different(read_run(folder)["identity"], identity, folder)
        return
    if (folder / "summary.json").is_file():
        raise UserError(
            f"{folder} holds results of another version, which cannot be continued; move them away or choose another "
            f"folder with -o."
        )
    write_text(file, json.dumps({"schema": SCHEMA, "identity": identity, "head": head}, indent=2) + "\n")


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    file = folder / FILE
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run of nnunet_ima evaluate: {FILE} is missing.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is damaged ({error}); start the evaluation again in another folder.") from error
    if not isinstance(run, dict) or run.get("schema") != SCHEMA or not {"identity", "head"} <= run.keys():
        found = run.get("schema") if isinstance(run, dict) else None
        raise UserError(f"{file} is of another version ({found!r}, here {SCHEMA!r}); evaluate again with this one.")
    return run


def refuse_different(there: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Results of another run are neither continued nor overwritten.

    Raises:
        UserError: naming what differs.
    """
    # As they come back from a file.
    found = differences(there, json.loads(json.dumps(wanted)))
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UserError(
            f"{folder} holds the results of another evaluation ({'; '.join(found[:SHOWN])}{more}); move them away or "
            f"choose another folder with -o."
        )


def differences(there: Any, wanted: Any, name: str = "") -> list[str]:
    """Sentences, as ``seed: 0 there, 1 here``."""
    if isinstance(there, Mapping) and isinstance(wanted, Mapping):
        keys = list(dict.fromkeys([*there, *wanted]))
        parts = (differences(there.get(key), wanted.get(key), f"{name} {key}".strip()) for key in keys)
        return [sentence for part in parts for sentence in part]
    return [] if there == wanted else [f"{name}: {_short(there)} there, {_short(wanted)} here"]


def digest(content: Any) -> str:
    """A number for some JSON content that changes with it."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
