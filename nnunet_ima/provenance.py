"""What an exported model was before: its checkpoint does not say, but ``nnunet_ima export`` notes it beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_ima.files import read_json

PROVENANCE = "nnunet_ima_provenance.json"


@dataclass(frozen=True)
class Exported:
    """What is noted of an exported checkpoint.

    Attributes:
        described: for reports: trainer, model folder, checkpoint, its digest, settings, and whether the training
            started from unknown weights, None where the note is of a time when that was not noted.
        training: all that the hardened checkpoint said of its training, to be noted again with an export of this one.
        training_cases: that the weights are known to have learned from.
        started_from_unknown: whether the training started with weights whose cases nobody noted. Where the note does
            not tell, only if it names no cases either, though one of our trainers, which note them, was at work.
    """

    described: dict[str, Any]
    training: dict[str, Any]
    training_cases: frozenset[str]
    started_from_unknown: bool


def exported_from(folder: Path, fold: int | str, sha256: str) -> Exported | None:
    """What an exported checkpoint comes from; None if it is not known to be one.

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
        return None
    noted = read_json(file)
    folds = noted.get("folds")
    for one in folds if isinstance(folds, list) else []:
        if not isinstance(one, Mapping) or one.get("fold") != f"fold_{fold}":
            continue
        hashes = one.get("sha256")
        if isinstance(hashes, Mapping) and hashes.get("exported") == sha256:
            return _read(noted, one, str(hashes.get("hardened")))
    return None


def _read(noted: Mapping[str, Any], one: Mapping[str, Any], hardened: str) -> Exported:
    training = dict(found) if isinstance(found := one.get("training"), Mapping) else {}
    settings, cases, unknown = (training.get(name) for name in ("settings", "training_cases", "started_from_unknown"))
    known = cases if isinstance(cases, list) else None
    told = unknown if isinstance(unknown, bool) else None
    described = {
        "trainer": str(noted.get("trainer")),
        "model": str(noted.get("from")),
        "checkpoint": str(one.get("checkpoint")),
        "sha256": hardened,
        "training": dict(settings) if isinstance(settings, Mapping) else {},
        "started_from_unknown": told,
    }
    silent = bool(training) and known is None
    return Exported(described, training, frozenset(map(str, known or ())), silent if told is None else told)
