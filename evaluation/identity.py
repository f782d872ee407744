"""What the numbers of a run depend on: only results of the same run are continued, or merged."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ima.errors import UserError

FILE = "run.json"
SCHEMA = "nnunet_ima/run/2"
SEAL = "seal"
# More would not be read.
SHOWN = 4


def write_identity(folder: Path, identity: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Write run.json: the identity, and the head of the summary, unless the same run is there.

    Raises:
        UserError: the folder holds another run, or results without one; the differences are named.
    """
    file = folder / FILE
    if not file.exists():
        if (folder / "summary.json").exists() or (folder / "records").exists():
            raise UserError(
                f"{folder} holds results of another version, or without their {FILE}, which cannot be continued; move "
                f"them away or choose another folder with -o."
            )
        content = {"schema": SCHEMA, "identity": identity, "head": head}
        _create(file, json.dumps(sealed(content), indent=2) + "\n")
    # Also what was just written: another part may have been faster.
    refuse_different(read_run(folder)["identity"], identity, folder)


def _create(file: Path, text: str) -> None:
    """Write a file that is not there yet; if another process was faster, its file stays."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
        try:
            os.link(temporary, file)
        except FileExistsError:
            return
        except OSError:  # a file system without links
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says.

    Raises:
        UserError: it is missing, damaged, changed, or of another version.
    """
    file = folder / FILE
    if not file.is_file() and not (folder / "records").exists():
        raise UserError(f"{folder} holds no run of nnunet_ima evaluate: {FILE} is missing.")
    advice = "give the command again that began the run, which writes it anew, or choose another folder with -o"
    return read_sealed(file, SCHEMA, advice)


def read_sealed(file: Path, schema: str, advice: str) -> dict[str, Any]:
    """A JSON file that :func:`sealed` closed.

    Raises:
        UserError: it is missing, damaged, of another version, or was changed after it was written.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        wrong = not isinstance(content, dict) or content.get("schema") != schema
        changed = wrong or content.get(SEAL) != seal_of(content)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{file} is missing; {advice}.") from None
    except (ValueError, RecursionError) as error:  # no JSON, no text, or numbers and nesting beyond all measure
        raise UserError(f"{file} is damaged ({error}); {advice}.") from error
    if wrong:
        found = content.get("schema") if isinstance(content, dict) else None
        raise UserError(f"{file} is of another version ({found!r}, here {schema!r}); {advice}.")
    if changed:
        raise UserError(f"{file} was changed after it was written; {advice}.")
    return dict(content)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """With a number that changes with the content, so that what was edited does not pass for what was measured."""
    plain = json.loads(json.dumps(content))
    return {**plain, SEAL: seal_of(plain)}


def seal_of(content: Mapping[str, Any]) -> str:
    """That number."""
    return digest({key: value for key, value in content.items() if key != SEAL})


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
