"""Where nnU-Net keeps things, and which versions are at work."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import os
import pkgutil
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.sources import SOURCES

# A module that is imported lazily may do the same; what still goes on after so many rounds is left alone.
MOST_ROUNDS = 5
# Of the sources' digest, among the versions.
OUR_SOURCES = "nnunet_ima's sources"


def nnunet_folder(variable: str) -> Path:
    """The folder that an environment variable of nnU-Net names.

    Raises:
        UserError: it is not set, or there is no such folder.
    """
    value = os.environ.get(variable)
    if not value:
        raise UserError(f"The environment variable {variable} is not set; export it as nnU-Net's set-up describes.")
    if not Path(value).is_dir():
        raise UserError(f"The environment variable {variable} names {value}, which is no folder; create or correct it.")
    return Path(value)


def trainers_folder() -> Path:
    """The folder that nnU-Net finds our trainers in (for ``nnUNet_extTrainer``)."""
    spec = importlib.util.find_spec("nnunet_ima.trainers")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("The trainers of nnunet_ima are not installed; install the package again.")
    return Path(next(iter(spec.submodule_search_locations)))


def find_trainer(name: str) -> Any:
    """The class of a trainer: ours by import, any other as nnU-Net looks it up, ``nnUNet_extTrainer`` included.

    nnU-Net's look-up imports every trainer of its own and goes through all modules that are loaded, so it can fail for
    reasons that have nothing to do with ours (``transformers``' aliases import others when asked for their path).

    Raises:
        UserError: there is none, one that is no nnUNetTrainer, or the look-up failed.
    """
    try:
        return _found_trainer(name)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Could not find requested"):
            raise UserError(
                f"There is no trainer {name}; add its folder to the environment variable nnUNet_extTrainer (ours are "
                f"found without)."
            ) from None
        # nnU-Net imports all of its own trainers first, and what these need must be there.
        raise UserError(
            f"nnU-Net could not look up the trainer {name} ({reason[:200]}); see that all of its trainers import, and "
            f"that this one is a subclass of nnUNetTrainer."
        ) from error


def _found_trainer(name: str) -> Any:
    for module in pkgutil.iter_modules([str(trainers_folder())]):
        content = importlib.import_module(f"nnunet_ima.trainers.{module.name}")
        found = getattr(content, name, None)
        # Not what the module itself only imported, such as nnU-Net's own trainer.
        if isinstance(found, type) and found.__module__ == content.__name__:
            return found
    with our_trainers_too():
        return recursive_find_trainer_class_by_name(name)


@contextlib.contextmanager
def our_trainers_too() -> Iterator[None]:
    """Let nnU-Net find our trainers beside those of ``nnUNet_extTrainer``, quietly, for the time of a look-up."""
    before = os.environ.get("nnUNet_extTrainer")
    os.environ["nnUNet_extTrainer"] = os.pathsep.join([*([before] if before else []), str(trainers_folder())])
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _settle_modules()
            yield
    finally:
        if before is None:
            del os.environ["nnUNet_extTrainer"]
        else:
            os.environ["nnUNet_extTrainer"] = before


def _settle_modules() -> None:
    """Let modules that import others when asked for their path do so now.

    nnU-Net asks all of them in a loop, which ends with an error if one is added meanwhile.
    """
    asked = 0
    for _ in range(MOST_ROUNDS):
        if asked == len(sys.modules):
            return
        asked = len(sys.modules)
        for module in list(sys.modules.values()):
            with contextlib.suppress(Exception):
                _ = module.__path__


def versions() -> dict[str, str]:
    """Versions that a result depends on; our own is told by a digest of the sources, too, which change more often."""
    packages = ("nnunet_ima", "nnunetv2", "torch", "numpy", "monai", "batchgeneratorsv2")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found, OUR_SOURCES: SOURCES}


def default_device() -> str:
    """The name of the device to run on where the user names none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_device(name: str) -> torch.device:
    """The device to run on.

    Raises:
        UserError: it is not there.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(name, False):
        usable = ", ".join(device for device, there in available.items() if there)
        raise UserError(f"The device {name!r} is not available on this machine; usable with -device are: {usable}.")
    return torch.device(name)
