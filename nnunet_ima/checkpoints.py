"""Checkpoints of nnU-Net, read without running code that they bring along."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from nnunet_ima.errors import UserError
from nnunet_ima.settings import KEY


def safe_load(file: Path) -> dict[str, Any]:
    """Read a checkpoint's numbers, strings and tensors; nothing in it is executed.

    Raises:
        UserError: the file is damaged or holds objects that would have to be executed.
    """
    # nnU-Net logs its epoch values as numpy scalars, which numpy 1 and 2 name differently.
    scalar = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8")]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    scalars: list[Any] = [np.dtype, *kinds, *((scalar, name) for name in names)]
    try:
        with torch.serialization.safe_globals(scalars):
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except (
        UnpicklingError,
        RuntimeError,
        EOFError,
        OSError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
    ) as error:
        # torch writes zip files; what is none was cut off or is something else altogether.
        if isinstance(error, UnpicklingError) and zipfile.is_zipfile(file):
            raise UserError(
                f"The checkpoint {file} holds more than numbers, and reading it would run code; get one written by "
                f"nnU-Net."
            ) from error
        raise UserError(f"The checkpoint {file} is damaged or cut off; copy it again or train again.") from error
    if not isinstance(checkpoint, dict) or not {"network_weights", "trainer_name", "init_args"} <= checkpoint.keys():
        raise UserError(f"The file {file} is no checkpoint of nnU-Net v2; give one of its checkpoint_*.pth.")
    return checkpoint


def noted_training_cases(checkpoint: Mapping[str, Any]) -> frozenset[str] | None:
    """The cases that one of our trainers noted down: all its weights ever learned from; None in other checkpoints."""
    ours = checkpoint["init_args"].get(KEY)
    noted = ours.get("training_cases") if isinstance(ours, Mapping) else None
    return frozenset(map(str, noted)) if isinstance(noted, list) else None


def noted_settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that one of our trainers noted down, as far as they are numbers and words; none of others."""
    ours = checkpoint["init_args"].get(KEY)
    noted = ours.get("settings") if isinstance(ours, Mapping) else None
    values = noted.items() if isinstance(noted, Mapping) else ()
    return {str(name): value for name, value in values if value is None or isinstance(value, (str, int, float))}


def started_from_unknown(checkpoint: Mapping[str, Any]) -> bool:
    """Whether one of our trainers noted that it started with ``-pretrained_weights``."""
    ours = checkpoint["init_args"].get(KEY)
    return isinstance(ours, Mapping) and bool(ours.get("started_from_unknown"))


def training_cases(
    checkpoint: Mapping[str, Any], splits: Sequence[Mapping[str, Sequence[str]]], all_cases: Sequence[str]
) -> frozenset[str]:
    """The cases a checkpoint's weights learned from: as noted, or as its fold and nnU-Net's splits say.

    Args:
        checkpoint: of the same dataset.
        splits: content of ``splits_final.json``.
        all_cases: of the dataset.
    """
    noted = noted_training_cases(checkpoint)
    if noted is not None:
        return noted
    fold = checkpoint["init_args"].get("fold")
    if isinstance(fold, int) and 0 <= fold < len(splits):
        return frozenset(splits[fold]["train"])
    return frozenset(all_cases)
