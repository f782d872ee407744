"""What a study needs to go on elsewhere, in files under 16 MiB: for machines that keep nothing."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.files import atomic_path

LARGEST = 16 * 2**20
RECORDS = "records.tar.gz"
ROUNDED = ("network_weights", "optimizer_state")
HALVED = "single precision, stored in half"
# In a finished checkpoint whose weights are the rounded ones, and were before anything was measured of them.
ROUNDED_MARK = "weights_rounded_to"
HALF = "half precision"
# In the order in which a training would go on from them.
CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth")
# What is made anew from the data, or is too large to carry.
LEFT = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "staged")


def round_before_evaluations(fold: Path, results: Sequence[Path]) -> None:
    """Round the weights of a finished training as :func:`pack` does, so that all evaluations are of what is carried.

    Args:
        fold: nnU-Net's folder of the trained fold.
        results: folders of the model's evaluations.

    Raises:
        UserError: the model was evaluated with weights that were not rounded.
    """
    file = fold / "checkpoint_final.pth"
    checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    if checkpoint.get(ROUNDED_MARK) == HALF:
        return
    there = [folder for folder in results if (folder / "run.json").is_file()]
    if there:
        raise UserError(
            f"{', '.join(map(str, there))} hold results of weights in single precision, but a state holds weights in "
            f"half precision; remove these folders, or go on without --state."
        )
    rounded = {name: _single(_halved(checkpoint[name])) for name in ROUNDED if name in checkpoint}
    _save({**checkpoint, **rounded, ROUNDED_MARK: HALF}, file)


def pack(work: Path, state: Path) -> None:
    """Write the checkpoints of all trainings, in half precision, and all records to ``state``.

    Raises:
        UserError: a file would be too large.
    """
    state.mkdir(parents=True, exist_ok=True)
    for fold in _folds(work / "nnUNet_results"):
        there = [fold / name for name in CHECKPOINTS if (fold / name).is_file()]
        if there:
            checkpoint = torch.load(there[0], map_location="cpu", weights_only=False)
            rounded = {name: _halved(checkpoint[name]) for name in ROUNDED if name in checkpoint}
            stored = {
                "name": there[0].name,
                "fold": str(fold.relative_to(work)),
                "checkpoint": {**checkpoint, **rounded},
            }
            stored["model"] = {name: (fold.parent / name).read_bytes() for name in ("plans.json", "dataset.json")}
            _write(stored, state / f"{fold.parent.name}_{fold.name}.pth")
    with atomic_path(state / RECORDS) as temporary, tarfile.open(temporary, "w:gz") as tar:
        for entry in sorted(work.iterdir()) if work.is_dir() else []:
            if entry.name not in LEFT and not entry.name.endswith("_report") and not _is_half_done(entry):
                tar.add(entry, entry.name)
    _refuse_if_large(state / RECORDS)


def unpack(state: Path, work: Path) -> None:
    """Put what :func:`pack` wrote back where it was, unless something newer is there.

    The task must have been converted before: nnU-Net refuses to convert one of which it finds results.
    """
    work.mkdir(parents=True, exist_ok=True)
    for file in sorted(state.glob("*.pth")):
        stored = torch.load(file, map_location="cpu", weights_only=False)
        fold = _inside(work, stored["fold"], file)
        if any((fold / name).is_file() for name in CHECKPOINTS):
            continue
        fold.mkdir(parents=True, exist_ok=True)
        for name, content in stored["model"].items():
            (fold.parent / name).write_bytes(content)
        _save(_single(stored["checkpoint"]), fold / stored["name"])
    if (state / RECORDS).is_file():
        with tarfile.open(state / RECORDS) as tar:
            for member in tar.getmembers():
                place = _inside(work, member.name, state / RECORDS)
                content = tar.extractfile(member) if member.isfile() else None
                # A process of another machine is none here.
                if content is not None and not place.exists() and place.name != "running.pid":
                    place.parent.mkdir(parents=True, exist_ok=True)
                    with atomic_path(place) as temporary:
                        temporary.write_bytes(content.read())


def _inside(work: Path, name: str, source: Path) -> Path:
    """Where something is to be put; tarfile's own filter is missing in Python 3.11.3 and before.

    Raises:
        UserError: outside ``work``.
    """
    place = (work / name).resolve()
    if work.resolve() not in place.parents:
        raise UserError(f"{source} wants to put something outside {work}; it is no state of this study.")
    return place


def _is_half_done(entry: Path) -> bool:
    """An evaluation that is not finished: it begins anew elsewhere, where a GPU may round differently."""
    return (entry / "run.json").is_file() and not (entry / "summary.json").is_file()


def _folds(results: Path) -> Iterator[Path]:
    yield from sorted(fold for fold in results.glob("Dataset*/*/fold_*") if fold.is_dir())


def _halved(value: Any, known: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] | None = None) -> Any:
    """Tensors of single precision in half, marked as such; a weight is then off by 0.05 % at most, or by 3e-8.

    nnU-Net's decoder holds its encoder once more: what is the same memory stays the same.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        if value.dtype != torch.float32:
            return value
        return {HALVED: known.setdefault((value.data_ptr(), value.shape, value.stride()), value.half())}
    if isinstance(value, dict):
        return {key: _halved(part, known) for key, part in value.items()}
    if isinstance(value, list):
        return [_halved(part, known) for part in value]
    return value


def _single(value: Any, known: dict[tuple[int, torch.Size, tuple[int, ...]], Tensor] | None = None) -> Any:
    """What was halved in single precision again; what is the same memory stays the same."""
    known = {} if known is None else known
    if isinstance(value, dict):
        if value.keys() == {HALVED}:
            half = value[HALVED]
            return known.setdefault((half.data_ptr(), half.shape, half.stride()), half.float())
        return {key: _single(part, known) for key, part in value.items()}
    if isinstance(value, list):
        return [_single(part, known) for part in value]
    return value


def _write(content: dict[str, Any], file: Path) -> None:
    _save(content, file)
    _refuse_if_large(file)


def _save(content: dict[str, Any], file: Path) -> None:
    """By way of memory: torch writes a file's name into it, and the same content should be the same file."""
    stream = io.BytesIO()
    torch.save(content, stream)
    with atomic_path(file) as temporary:
        temporary.write_bytes(stream.getbuffer())


def _refuse_if_large(file: Path) -> None:
    if file.stat().st_size > LARGEST:
        raise UserError(f"{file} has {file.stat().st_size / 2**20:.1f} MiB, more than the 16 MiB that may be carried.")
