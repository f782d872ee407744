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
from nnunet_ima.evaluation.environment import choose_device
from nnunet_ima.evaluation.models import Fold, find_model_folder, load_model, read_json
from nnunet_ima.evaluation.pictures import draw_dice_against_level, draw_worst
from nnunet_ima.evaluation.protocols import Protocol, ProtocolName, parse_level
from nnunet_ima.evaluation.run import Evaluation
from nnunet_ima.evaluation.summary import summarise, write_all
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
    batch_size: int
    seed: int
    case_level: bool
    device: str
    output: Path | None
    command: str


def evaluate(request: Request, progress: bool = True) -> Path:
    """Attack a model and write summary.json, samples.csv, cases.csv, table.md and two pictures.

    Returns:
        The folder they are in.

    Raises:
        UserError: anything about the request that cannot be done.
    """
    protocol = Protocol(request.protocol, request.norm)
    texts = request.levels or DEFAULT_LEVELS[request.norm]
    levels = [parse_level(text, request.norm) for text in dict.fromkeys(texts)]
    attacks = [parse_attack(text) for text in dict.fromkeys(request.attacks)]
    device = choose_device(request.device)
    _use_all_cores(device)
    folder = choose_model(request.model, request.dataset, request.configuration, request.trainer, request.plans)
    model = load_model(folder, read_fold(request.fold), request.checkpoint, device)
    output = request.output or _default_output(model.checkpoint, request)
    _make_writable(output)
    _refuse_other_results(output, request.command)
    evaluation = Evaluation(
        model=model,
        protocol=protocol,
        attacks=attacks,
        levels=levels,
        max_samples=request.max_samples,
        batch_size=request.batch_size,
        seed=request.seed,
        device=device,
        criterion=DiceCriterion(labels=model.labels),
        case_level=request.case_level,
        progress=progress,
    )
    try:
        outcomes = evaluation.run()
    except UserError:
        with contextlib.suppress(OSError):  # it was empty before, or is not now
            output.rmdir()
        raise
    summary = summarise(evaluation, outcomes, request.command)
    # It stands for a complete set: an older one must not stay beside newer tables if writing these fails.
    (output / "summary.json").unlink(missing_ok=True)
    # The tables first: no picture is worth the attacks of a night.
    write_all(output, evaluation, outcomes, summary)
    draw_dice_against_level(summary, output / "dice_against_level.png")
    # The panel shows the condition that took most Dice off the samples.
    strongest = min(outcomes[1:], key=lambda o: sum(score.dice for score in o.samples))
    draw_worst(strongest, summary["classes"], output / "worst_samples.png")
    return output


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


def _default_output(checkpoint: Path, request: Request) -> Path:
    name = f"{checkpoint.stem}_{request.protocol}_{request.norm}"
    return checkpoint.parent / "nnunet_ima" / name


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


def _refuse_other_results(folder: Path, command: str) -> None:
    """The same command may be repeated; results of another one are not overwritten."""
    file = folder / "summary.json"
    if file.is_file() and read_json(file).get("command") != command:
        raise UserError(
            f"{folder} holds the results of another command; move them away or choose another folder with -o."
        )


def _use_all_cores(device: torch.device) -> None:
    """As nnUNetv2_train does on a CPU; OMP_NUM_THREADS goes before."""
    if device.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
        use_threads_as_told(device)
