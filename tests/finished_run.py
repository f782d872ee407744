"""A finished evaluation without any figures: enough to be known, or refused, as what a command would make."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nnunet_ima.evaluation.finished import asked_for
from nnunet_ima.evaluation.identity import sealed, write_identity
from nnunet_ima.evaluation.summary import SCHEMA


def finish(folder: Path, command: Sequence[str], **otherwise: object) -> None:
    """As ``command`` would have left it, but for entries of its identity."""
    folder.mkdir()
    write_identity(folder, {**asked_for(command), "device": "cpu", "samples in a pass": 4, **otherwise}, {})
    (folder / "summary.json").write_text(json.dumps(sealed({"schema": SCHEMA})), encoding="utf-8")
