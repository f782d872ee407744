"""Checkpoints of nnU-Net, read without running code that they bring along."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch

from nnunet_ima.errors import UserError


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
