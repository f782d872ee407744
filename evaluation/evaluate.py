"""The command ``nnunet_ima evaluate``: from what the user asked for to the files of a report."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.end_to_end import EndToEnd, refuse_what_cannot
from nnunet_ima.evaluation.environment import choose_device
from nnunet_ima.evaluation.identity import FILE as RUN_FILE
from nnunet_ima.evaluation.merge import merge
from nnunet_ima.evaluation.models import Fold, find_model_folder, load_model
from nnunet_ima.evaluation.protocols import Protocol, ProtocolName, read_levels
from nnunet_ima.evaluation.records import RECORDS
from nnunet_ima.evaluation.run import Evaluation, default_batch_size
from nnunet_ima.lp import Norm
from nnunet_ima.threads import use_threads_as_told

DEFAULT_LEVELS: dict[Norm, tuple[str, ...]] = {"l2": ("5", "15", "25"), "linf": ("2/255", "4/255", "8/255")}


@dataclass(frozen=True)
class Request:
    """What the user asked for, as text; see ``nnunet_ima evaluate --help``."""

    dataset: str | None
    configuration: str | None
    fold: str
    trainer: str
    plans: str
    checkpoint: str
    model: Path | None
    protocol: ProtocolName
    norm: Norm
    levels: Sequence[str] | None
    attacks: Sequence[str]
    max_samples: int | None
    batch_size: int | None
    seed: int
    case_level: bool
    device: str
    output: Path | None
    command: str
    num_parts: int = 1
    part_id: int = 0
    end_to_end: EndToEnd = "off"
    samples_seed: int = 0


def evaluate(request: Request, progress: bool = True) -> Path:
    """Attack a model and write summary.json, samples.csv, cases.csv, table.md, two pictures; members.csv for ensembles.

    With ``end_to_end`` also end_to_end.csv.

    What an earlier, killed call found is not attacked again. With several parts only records are written, for
    :func:`~nnunet_ima.evaluation.merge.merge`.

    Returns:
        The folder they are in.

    Raises:
        UserError: anything about the request that cannot be done.
    """
    protocol = Protocol(request.protocol, request.norm)
    levels = read_levels(request.levels or DEFAULT_LEVELS[request.norm], request.norm)
    attacks = [parse_attack(text) for text in dict.fromkeys(request.attacks)]
    if not 0 <= request.part_id < request.num_parts:
        raise UserError(f"-part_id is {request.part_id}; it must be from 0 to {request.num_parts - 1}.")
    if request.end_to_end != "off":
        refuse_what_cannot(attacks, request.case_level)
    device = choose_device(request.device)
    _use_all_cores(device)
    folder = choose_model(request.model, request.dataset, request.configuration, request.trainer, request.plans)
    model = load_model(folder, read_fold(request.fold), request.checkpoint, device)
    output = request.output or default_output(folder, request.fold, request.checkpoint, request.protocol, request.norm)
    _make_writable(output)
    evaluation = Evaluation(
        model=model,
        protocol=protocol,
        attacks=attacks,
        levels=levels,
        max_samples=request.max_samples,
        batch_size=request.batch_size or default_batch_size(model, device),
        seed=request.seed,
        device=device,
        criterion=DiceCriterion(labels=model.labels),
        case_level=request.case_level,
        progress=progress,
        num_parts=request.num_parts,
        part_id=request.part_id,
        end_to_end=request.end_to_end,
        samples_seed=request.samples_seed,
    )
    begun_before = (output / RUN_FILE).exists()
    try:
        evaluation.run(output, request.command)
    except UserError:
        _remove_what_holds_nothing(output, begun_before)
        raise
    if request.num_parts == 1:
        merge(output)
    return output


def default_output(model: Path, fold: str, checkpoint: str, protocol: str, norm: str) -> Path:
    """Inside the fold's folder."""
    return model / f"fold_{fold}" / "nnunet_ima" / f"{Path(checkpoint).stem}_{protocol}_{norm}"


def choose_model(model: Path | None, dataset: str | None, configuration: str | None, trainer: str, plans: str) -> Path:
    """The model folder that the user means.

    Raises:
        UserError: neither a folder nor dataset and configuration were given, or there is no such model.
    """
    if model is not None:
        return model
    if dataset is None or configuration is None:
        raise UserError("Say which model: either -d and -c (with -tr and -p), or -m MODEL_FOLDER.")
    return find_model_folder(dataset, configuration, trainer, plans)


def read_fold(text: str) -> Fold:
    """A number or ``all``.

    Raises:
        UserError: it is neither.
    """
    if text == "all":
        return text
    if not text.isdecimal():
        raise UserError(f"The fold {text!r} is neither a number nor all.")
    return int(text)


def _make_writable(folder: Path) -> None:
    """Fail now rather than after hours: is there a folder, and can it be written to?"""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.tmp"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk of the folder {folder} is full; make room or choose another with -o.") from error
        raise UserError(f"The output folder {folder} cannot be written to; choose another one with -o.") from error


def _remove_what_holds_nothing(folder: Path, begun_before: bool) -> None:
    """Of a run that could not even begin nothing stays; its part is gone already, other parts are others' work."""
    records = folder / RECORDS
    with contextlib.suppress(OSError):  # a part was begun
        records.rmdir()
    if not begun_before and not records.exists():
        (folder / RUN_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it was not empty before, or is not now
        folder.rmdir()


def _use_all_cores(device: torch.device) -> None:
    """As nnUNetv2_train does on a CPU; OMP_NUM_THREADS goes before."""
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
        use_threads_as_told(device)
