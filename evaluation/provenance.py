"""What an exported model was before: its checkpoint does not say, but ``nnunet_ima export`` notes it beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nnunet_ima.evaluation.models import read_json

PROVENANCE = "nnunet_ima_provenance.json"


def exported_from(folder: Path, fold: int | str, sha256: str) -> dict[str, Any]:
    """Trainer, model folder and settings that an exported checkpoint comes from; empty if it is not known to be one.

    Args:
        folder: of the model.
        fold: whose checkpoint it is.
        sha256: of the checkpoint. The note counts for the very file that was exported: one that was trained further, or
            put there since, is another.

    Raises:
        UserError: the note is damaged.
    """
    file = folder / PROVENANCE
    if not file.is_file():
        return {}
    noted = read_json(file)
    folds = noted.get("folds")
    for one in folds if isinstance(folds, list) else []:
        if not isinstance(one, Mapping) or one.get("fold") != f"fold_{fold}":
            continue
        hashes, training = one.get("sha256"), one.get("training")
        if isinstance(hashes, Mapping) and hashes.get("exported") == sha256:
            settings = training.get("settings") if isinstance(training, Mapping) else None
            return {
                "trainer": str(noted.get("trainer")),
                "model": str(noted.get("from")),
                "checkpoint": str(one.get("checkpoint")),
                "sha256": str(hashes.get("hardened")),
                "training": dict(settings) if isinstance(settings, Mapping) else {},
            }
    return {}
