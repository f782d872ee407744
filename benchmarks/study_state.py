"""What a study needs to go on elsewhere, in files of at most 15 MiB: for machines that keep nothing.

A model's checkpoint and its notes (what is done, the records of its evaluations) are one content, so that a note of a
training that ended is never taken up without that training.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch
from study_parts import load, read_manifest, store
from torch import Tensor

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.files import atomic_path
from nnunet_ima.settings import KEY

RECORDS = "records"
ROUNDED = ("network_weights", "optimizer_state")
HALVED = "single precision, stored in half"
# In a finished checkpoint whose weights are the rounded ones, and were before anything was measured of them.
ROUNDED_MARK = "weights_rounded_to"
HALF = "half precision"
FINAL, LATEST = "checkpoint_final.pth", "checkpoint_latest.pth"
# In the order in which a training would go on from them.
CHECKPOINTS = (FINAL, LATEST)
# What is made anew from the data, or from what is carried, or is too large to carry.
LEFT = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "staged", "results")
# What torch raises of a file that is no checkpoint, or only a part of one.
UNREADABLE = (RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, pickle.UnpicklingError)
# Which cases validate: nnU-Net makes it when a training begins, and may have none to begin elsewhere.
SPLITS = "nnUNet_preprocessed/*/splits_final.json"
# Of processes, which are none of another machine; nor is a file that one is just writing.
OF_PROCESSES = ("running.pid", "lock", ".*.tmp")
# TE's averages while it is trained are probabilities, of which at the paper's scale there are 52 million. Rounded to
# this they take a seventh of their 100 MB, compressed; a machine gives back 64 MiB in all.
FINEST = 1 / 1024


class Stage(NamedTuple):
    """How far a model is; the later one is larger."""

    finished: bool
    epochs: int
    rounded: bool


def round_before_evaluations(fold: Path, results: Sequence[Path]) -> None:
    """Make a finished training what :func:`pack` carries of it, so that all evaluations are of what is carried.

    Args:
        fold: nnU-Net's folder of the trained fold.
        results: folders of the model's evaluations.

    Raises:
        UserError: the model was evaluated with weights that were not rounded.
    """
    file = fold / FINAL
    checkpoint = _read(file)
    if checkpoint.get(ROUNDED_MARK) == HALF:
        return
    _refuse_unrounded_results([folder for folder in results if (folder / "run.json").is_file()])
    lean = _lean(checkpoint)
    rounded = {name: _single(_halved(lean[name])) for name in ROUNDED if name in lean}
    _save({**lean, **rounded, ROUNDED_MARK: HALF}, file)


def pack(work: Path, state: Path) -> None:
    """Write all trainings' checkpoints, in half precision, with their notes, and all else that is carried.

    What was written before stays until all of this is, and for a model that cannot be read beyond that. Trainings and
    evaluations may be at work meanwhile.

    Raises:
        UserError: a checkpoint cannot be read, said once everything else is written; or ``state`` is of an older
            version.
        OSError: a file was removed while it was read; ``state`` stays as it was.
    """
    state.mkdir(parents=True, exist_ok=True)
    read_manifest(state)
    before: dict[str, bytes] | None = None
    contents: dict[str, bytes] = {}
    of_models: set[Path] = set()
    refused: list[str] = []
    for fold in _folds(work / "nnUNet_results"):
        if _newest(fold) is None:
            continue
        of_models |= set(_notes_of(work, fold))
        name = f"{fold.parent.name}_{fold.name}"
        try:
            contents[name] = _packed_model(work, fold)
        except UserError as error:
            refused.append(str(error))
            before = _carried_before(state) if before is None else before
            contents.update({name: before[name]} if name in before else {})
    rest = [
        entry
        for entry in (sorted(work.iterdir()) if work.is_dir() else [])
        if entry.name not in LEFT
        and not entry.name.endswith("_report")
        and entry not in of_models
        and not _is_half_done(entry)
    ]
    contents[RECORDS] = _tar(work, [*rest, *sorted(work.glob(SPLITS))])
    store(state, contents)
    if refused:
        raise UserError(" ".join(refused))


def _carried_before(state: Path) -> dict[str, bytes]:
    """Nothing where that is damaged, which must not keep what can be read now from being carried."""
    try:
        return load(state)
    except UserError:
        return {}


def unpack(state: Path, work: Path) -> None:
    """Put what :func:`pack` wrote back where it was, unless ``work`` holds a later stage of the same model.

    The task must have been converted before: nnU-Net refuses to convert one of which it finds results.

    Raises:
        UserError: the state is not whole, is of other validation cases, or holds another finished training of a model
            than ``work``; before anything of that model is written.
    """
    work.mkdir(parents=True, exist_ok=True)
    # All of it, before anything is written.
    contents = load(state)
    archive = contents.pop(RECORDS, None)
    rest = {} if archive is None else _files_in(archive, work, state / RECORDS)
    for name, content in rest.items():
        if Path(name).match(SPLITS) and (work / name).is_file() and json.loads(content) != _json_of(work / name):
            raise UserError(f"{work / name} has other validation cases than the state {state}; use the same task.")
    for name in sorted(contents):
        _take_up_model(contents[name], work, state / name)
    for name, content in rest.items():
        if not (work / name).exists():
            _put(work / name, content)


# ---- one model


def _packed_model(work: Path, fold: Path) -> bytes:
    """Everything of a model, of one moment: a note of what came after its checkpoint would be believed elsewhere."""
    while True:
        file = _newest(fold)
        assert file is not None
        before = _moment(file)
        packed = gzip.compress(_bytes_of(_model(work, fold, file)), 6, mtime=0)
        if _newest(fold) == file and _moment(file) == before:
            return packed


def _moment(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns


def _model(work: Path, fold: Path, file: Path) -> dict[str, Any]:
    """Checkpoint, plans, notes."""
    checkpoint = _read(file)
    stage = _stage(file.name, checkpoint)
    # Those whose weights were rounded before may be known by the checkpoint's digest: it stays the same file.
    lean = _lean(checkpoint) if stage.finished and not stage.rounded else _coarse(checkpoint)
    notes = _notes_of(work, fold)
    if not (stage.finished and stage.rounded):
        # Elsewhere they would be continued with other weights.
        notes = [entry for entry in notes if not _is_half_done(entry)]
    return {
        "name": file.name,
        "fold": fold.relative_to(work).as_posix(),
        "checkpoint": {**lean, **{name: _halved(lean[name]) for name in ROUNDED if name in lean}},
        "model": {name: (fold.parent / name).read_bytes() for name in ("plans.json", "dataset.json")},
        "notes": _tar(work, notes),
    }


def _take_up_model(content: bytes, work: Path, source: Path) -> None:
    stored = torch.load(io.BytesIO(gzip.decompress(content)), map_location="cpu", weights_only=False)
    fold = _inside(work, stored["fold"], source)
    theirs, file = _stage(stored["name"], stored["checkpoint"]), _newest(fold)
    notes = _files_in(stored["notes"], work, source)
    if file is not None:
        checkpoint = _read(file)
        ours = _stage(file.name, checkpoint)
        if ours.finished and theirs.finished and not _same_weights(checkpoint, stored["checkpoint"]):
            raise UserError(
                f"{file} and the state {source.parent} hold two trainings of {fold.parent.name} that have both ended; "
                f"remove the one that shall not count, or give another folder with --state."
            )
        if ours == theirs and ours.finished:
            _take_further_evaluations(notes, work)
        if ours >= theirs:
            return
        _refuse_unrounded_results(
            [entry for entry in _notes_of(work, fold) if theirs.rounded and (entry / "run.json").is_file()]
        )
    fold.mkdir(parents=True, exist_ok=True)
    for name, text in stored["model"].items():
        _put(fold.parent / name, text)
    _save(_single(stored["checkpoint"]), fold / stored["name"])
    if theirs.finished:
        (fold / LATEST).unlink(missing_ok=True)
    # Now that the checkpoint is there: what is done would be skipped without it.
    for logs in {name.split("/")[0] for name in notes if name.startswith("logs_")}:
        shutil.rmtree(work / logs, ignore_errors=True)
    for name, text in notes.items():
        if name.startswith("logs_"):
            _put(work / name, text)
    _take_further_evaluations(notes, work)


def _take_further_evaluations(notes: Mapping[str, bytes], work: Path) -> None:
    """Of each evaluation what is further, with the notes of it; one that is finished here stays."""
    for name in dict.fromkeys(name.split("/")[0] for name in notes):
        theirs = {path.partition("/")[2]: content for path, content in notes.items() if path.startswith(f"{name}/")}
        if "run.json" not in theirs or not _may_go_on_here(name, theirs):
            continue
        folder = work / name
        ours = {file.relative_to(folder).as_posix(): file.stat().st_size for file in _files_under(folder)}
        if "summary.json" in ours or _progress({path: len(text) for path, text in theirs.items()}) <= _progress(ours):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        # What says that something is there comes after it.
        for path in sorted(theirs, key=lambda path: (path == "summary.json", path.startswith("records/"), path)):
            _put(folder / path, theirs[path])
        for path, content in notes.items():
            logs, _, file = path.partition("/")
            if logs.startswith("logs_") and file.startswith(f"{name}."):
                _put(work / path, content)


def _progress(files: Mapping[str, int]) -> tuple[bool, int]:
    """Whether an evaluation is finished, and the size of its records, to which is only ever added."""
    return "summary.json" in files, sum(size for name, size in files.items() if name.endswith("journal.jsonl"))


def _may_go_on_here(name: str, files: Mapping[str, bytes]) -> bool:
    """Whether an evaluation is finished, or these versions would go on with it."""
    if "summary.json" in files or json.loads(files["run.json"])["identity"].get("version of") == versions():
        return True
    sys.stdout.write(f"{name} was begun with other versions than these, and begins anew here.\n")
    return False


def _refuse_unrounded_results(folders: Sequence[Path]) -> None:
    if folders:
        raise UserError(
            f"{', '.join(map(str, folders))} hold results of weights in single precision, but a state holds weights in "
            f"half precision; remove these folders, or go on without --state."
        )


def _notes_of(work: Path, fold: Path) -> list[Path]:
    """A model's logs and evaluations, named as :class:`~nnunet_ima.evaluation.study.Study` names them."""
    trainer, _, rest = fold.parent.name.partition("__")
    own = trainer.removeprefix("nnUNetTrainer")
    _, found, variant = rest.partition("__")[2].partition(f"_{own}")
    if not found:
        return []
    logs = work / f"logs_{trainer}{variant}"
    results = [entry for entry in sorted(work.glob(f"*_{own}{variant}")) if entry.is_dir()]
    return [*([logs] if logs.is_dir() else []), *results]


def _is_half_done(entry: Path) -> bool:
    """An evaluation that is not finished."""
    return (entry / "run.json").is_file() and not (entry / "summary.json").is_file()


def _folds(results: Path) -> Iterator[Path]:
    yield from sorted(fold for fold in results.glob("Dataset*/*/fold_*") if fold.is_dir())


def _newest(fold: Path) -> Path | None:
    return next((fold / name for name in CHECKPOINTS if (fold / name).is_file()), None)


# ---- checkpoints


def _read(file: Path) -> dict[str, Any]:
    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    except (
        RuntimeError,
        EOFError,
        LookupError,
        ValueError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise UserError(f"The checkpoint {file} cannot be read; remove it to go on from an older one.") from error
    return checkpoint


def _stage(name: str, checkpoint: Mapping[str, Any]) -> Stage:
    return Stage(name == FINAL, int(checkpoint["current_epoch"]), checkpoint.get(ROUNDED_MARK) == HALF)


def _lean(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A finished training's checkpoint without what only further training would need: momenta, and TE's averages."""
    lean = dict(checkpoint)
    if "optimizer_state" in lean:
        # nnU-Net loads it before it validates: what it must hold stays.
        lean["optimizer_state"] = {**lean["optimizer_state"], "state": {}}
    ours = lean.get("init_args", {}).get(KEY, {})
    if "averages" in ours.get("state", {}):
        ours = {**ours, "state": {**ours["state"], "averages": {}}}
        lean["init_args"] = {**lean["init_args"], KEY: ours}
    return lean


def _coarse(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint of a training that goes on, TE's averages rounded to :data:`FINEST`."""
    ours = checkpoint.get("init_args", {}).get(KEY, {})
    if not ours.get("state", {}).get("averages"):
        return dict(checkpoint)
    averages = {
        case: {kind: ((values.float() / FINEST).round() * FINEST).half() for kind, values in stored.items()}
        for case, stored in ours["state"]["averages"].items()
    }
    ours = {**ours, "state": {**ours["state"], "averages": averages}}
    return {**checkpoint, "init_args": {**checkpoint["init_args"], KEY: ours}}


def _same_weights(checkpoint: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether the weights of a checkpoint become those that were stored, once they are rounded."""
    ours, theirs = _single(_halved(checkpoint["network_weights"])), _single(stored["network_weights"])
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


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


def _save(content: dict[str, Any], file: Path) -> None:
    _put(file, _bytes_of(content))


def _bytes_of(content: dict[str, Any]) -> bytes:
    """In memory: torch writes a file's name into it, and the same content should be the same file."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


# ---- files


def _put(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        temporary.write_bytes(content)


def _json_of(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _tar(work: Path, entries: Iterable[Path]) -> bytes:
    """Files and folders of ``work``, compressed; the same for the same files."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for entry in entries:
            for file in [entry] if entry.is_file() else _files_under(entry):
                if not any(fnmatch(file.name, pattern) for pattern in OF_PROCESSES):
                    # Read at once: a journal may be written to, and a member must be as long as it says.
                    content = file.read_bytes()
                    member = tar.gettarinfo(file, file.relative_to(work).as_posix())
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return gzip.compress(stream.getvalue(), mtime=0)


def _files_under(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _files_in(archive: bytes, work: Path, source: Path) -> dict[str, bytes]:
    """The files of :func:`_tar`, by their place in ``work``.

    Raises:
        UserError: one would be outside.
    """
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for member in tar.getmembers():
            place = _inside(work, member.name, source)
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None:
                found[place.relative_to(work.resolve()).as_posix()] = content.read()
    return found


def _inside(work: Path, name: str, source: Path) -> Path:
    """Where something is to be put; tarfile's own filter is missing in Python 3.11.3 and before.

    Raises:
        UserError: outside ``work``.
    """
    place = (work / name).resolve()
    if work.resolve() not in place.parents:
        raise UserError(f"{source} wants to put something outside {work}; it is no state of this study.")
    return place
