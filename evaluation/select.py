"""``nnunet_ima select``: among a training's snapshots, the most robust one that keeps clean Dice (supplement C.2)."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from nnunet_ima.checkpoints import safe_load
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import parse_attack
from nnunet_ima.evaluation.environment import choose_device
from nnunet_ima.evaluation.evaluate import Request, evaluate, read_fold
from nnunet_ima.evaluation.finished import begun_in, digest_of, is_of_this
from nnunet_ima.evaluation.models import load_model
from nnunet_ima.evaluation.protocols import parse_level
from nnunet_ima.evaluation.results import read_if_whole, read_summary
from nnunet_ima.evaluation.summary import UNLEARNED, UNLEARNED_NOTE, UNTRUSTED, UNTRUSTED_NOTE, nothing_learned
from nnunet_ima.files import atomic_path, read_json, write_text
from nnunet_ima.settings import KEY

SELECTED = "checkpoint_selected.pth"
FINAL, BEST_ROBUST = "checkpoint_final.pth", "checkpoint_best_robust.pth"
# How the command of a measurement made here begins.
MINE = "nnunet_ima select"
CANDIDATES = ("snapshot_epoch_*.pth", BEST_ROBUST, FINAL)


@dataclass(frozen=True)
class Candidate:
    """One checkpoint, measured.

    Attributes:
        checkpoint: name of the file.
        epoch: after how many it was kept.
        largest_margin: at that time, None if the file does not tell.
        clean, robust: TVDI in [0, 1], untouched and attacked.
        trained_on_these_cases: whether the weights learned from cases they were measured on.
        within_budget: whether its clean Dice is close enough to the best.
        learned: whether there is anything that an attack could take; see
            :func:`~nnunet_ima.evaluation.summary.nothing_learned`.
        trusted: whether all checks of its evaluation passed.
    """

    checkpoint: str
    epoch: int
    largest_margin: float | None
    clean: float
    robust: float
    trained_on_these_cases: bool = False
    within_budget: bool = True
    learned: bool = True
    trusted: bool = True


def select(request: Request, max_clean_drop: float, reference: Path | None) -> tuple[Candidate, Path]:
    """Measure every candidate, choose, draw the curve, and copy the chosen one to ``checkpoint_selected.pth``.

    Args:
        request: model, fold, attack (one), level (one) and sample; its checkpoint is not read.
        max_clean_drop: in points of TVDI, below the best candidate's clean Dice, or the reference's.
        reference: a model folder, such as the stock model's; None for the best candidate.

    Returns:
        The chosen candidate, and the folder of the results.

    Raises:
        UserError: there is no candidate, or none within the budget.
    """
    fold = _model_of(request) / f"fold_{request.fold}"
    files = sorted({file for pattern in CANDIDATES for file in fold.glob(pattern)})
    if not files:
        raise UserError(f"{fold} holds no snapshot and no final checkpoint; train with nnUNetTrainerIMA first.")
    _check(request, reference)
    output = request.output or fold / "nnunet_ima" / "selection"
    aim = -math.inf
    if reference is not None:
        theirs = replace(request, model=reference, checkpoint=FINAL)
        # Stock models of several seeds, say, bear one name.
        aim = _measure(_in_its_place(theirs, output, f"reference_{digest_of(_checkpoint_of(theirs))[:8]}")).clean
    measured = [_measure(_in_its_place(replace(request, checkpoint=file.name), output, file.stem)) for file in files]
    measured.sort(key=lambda candidate: (candidate.epoch, candidate.checkpoint))
    if reference is None:
        aim = max(candidate.clean for candidate in measured)
    lowest = aim - max_clean_drop / 100
    found = [replace(candidate, within_budget=candidate.clean >= lowest) for candidate in measured]
    allowed = [candidate for candidate in found if candidate.within_budget]
    if not allowed:
        best = max(found, key=lambda candidate: candidate.clean)
        raise UserError(
            f"No checkpoint is within {max_clean_drop:g} points of {100 * aim:.1f} % clean Dice; the closest, "
            f"{best.checkpoint}, has {100 * best.clean:.1f} %: raise --max-clean-drop, or train with a smaller epsilon."
        )
    chosen = max(allowed, key=_rank)
    with atomic_path(fold / SELECTED) as temporary:
        shutil.copyfile(fold / chosen.checkpoint, temporary)
    _write(output, found, chosen, aim, max_clean_drop, request)
    return chosen, output


def _rank(candidate: Candidate) -> tuple[bool, bool, float, float]:
    """Of two, the larger one is chosen: what hides its gradients looks most robust."""
    return candidate.learned, candidate.trusted, candidate.robust, candidate.clean


def _check(request: Request, reference: Path | None) -> None:
    """Find out now, not after hours, what cannot be measured."""
    parse_attack(request.attacks[0])
    parse_level((request.levels or [""])[0], request.norm)
    choose_device(request.device)
    if reference is not None:
        cpu, fold = torch.device("cpu"), read_fold(request.fold)
        theirs = load_model(reference, fold, FINAL, cpu).plans.dataset_name
        ours = str(read_json(_model_of(request) / "plans.json").get("dataset_name"))
        if theirs != ours:
            raise UserError(f"The reference {reference} is a model of {theirs}, not of {ours}; give one of {ours}.")


def _measure(request: Request) -> Candidate:
    """Clean and attacked TVDI; what the same program measured before of the same file in the same way is read."""
    assert request.output is not None
    checkpoint, folder = _checkpoint_of(request), request.output
    # Missing, or damaged: evaluate writes it anew, or says what is the matter.
    begun = begun_in(folder)
    same = is_of_this(begun, request.command, checkpoint)
    if not same and str(begun.get("command", "")).startswith(MINE):
        shutil.rmtree(folder)  # of a file or program that is no more; anybody else's is refused by evaluate
    summary = read_if_whole(folder) if same else None
    if summary is None:
        print(f"{folder.name}:", flush=True)
        evaluate(request)
        summary = read_summary(folder)
    content = safe_load(checkpoint)
    ours = content["init_args"].get(KEY, {})
    margin = ours.get("largest_margin") if isinstance(ours, Mapping) else None
    return Candidate(
        checkpoint=checkpoint.name,
        epoch=int(content.get("current_epoch", 0)),
        largest_margin=float(margin) if isinstance(margin, (int, float)) else None,
        clean=float(summary["clean"]["tvdi"]),
        robust=float(summary["results"][0]["tvdi"]),
        trained_on_these_cases=bool(summary["trained_on_these_cases"]),
        learned=not nothing_learned(summary),
        trusted=bool(summary["trusted"]),
    )


def _in_its_place(request: Request, output: Path, name: str) -> Request:
    """One folder for each way of measuring, so that another one costs none of what was found."""
    command = f"{MINE} {_way(request)}"
    return replace(request, command=command, output=output / hashlib.sha256(command.encode()).hexdigest()[:8] / name)


def _way(request: Request) -> tuple[Any, ...]:
    """What is measured, and how. Not the command as typed: another budget for clean Dice changes no measurement.

    Models are told apart as nnU-Net does, by the names of their folder and of the data set's, so that nothing is
    measured again where all results were moved.
    """
    dataset, model = _model_of(request).resolve().parts[-2:]
    seeds = (request.seed, request.samples_seed)
    measured = (dataset, model, request.fold)
    return (*measured, request.attacks, request.norm, request.levels, request.max_samples, *seeds, request.device)


def _checkpoint_of(request: Request) -> Path:
    return _model_of(request) / f"fold_{request.fold}" / request.checkpoint


def _model_of(request: Request) -> Path:
    assert request.model is not None
    return request.model


def _write(
    output: Path, found: Sequence[Candidate], chosen: Candidate, aim: float, budget: float, request: Request
) -> None:
    content = {
        "selected": chosen.checkpoint,
        "max_clean_drop": budget,
        "clean_aim": aim,
        "attack": request.attacks[0],
        "norm": request.norm,
        "level": (request.levels or [""])[0],
        "candidates": [asdict(candidate) for candidate in found],
    }
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "selection.json", json.dumps(content, indent=2) + "\n")
    write_text(output / "table.md", table(found, chosen))
    _draw(output / "selection.png", found, chosen, aim - budget / 100, request)


def table(found: Sequence[Candidate], chosen: Candidate) -> str:
    """For people, TVDI in %."""
    lines = ["| checkpoint | epoch | largest margin | clean | attacked | |", "| --- | --- | --- | --- | --- | --- |"]
    for candidate in found:
        margin = "" if candidate.largest_margin is None else f"{candidate.largest_margin:.2f}"
        marks = ["**selected**"] if candidate == chosen else [] if candidate.within_budget else ["clean Dice too low"]
        marks += [] if candidate.learned else [UNLEARNED]
        marks += [] if candidate.trusted else [UNTRUSTED]
        dice = f"{100 * candidate.clean:.1f} | {100 * candidate.robust:.1f}"
        lines.append(f"| {candidate.checkpoint} | {candidate.epoch} | {margin} | {dice} | {', '.join(marks)} |")
    if not all(candidate.learned for candidate in found):
        lines += ["", UNLEARNED_NOTE]
    if not all(candidate.trusted for candidate in found):
        lines += ["", UNTRUSTED_NOTE]
    if any(candidate.trained_on_these_cases for candidate in found):
        lines += ["", "The weights learned from some of these very cases; the figures flatter them."]
    return "\n".join(lines) + "\n"


def _draw(file: Path, found: Sequence[Candidate], chosen: Candidate, lowest: float, request: Request) -> None:
    """Clean against attacked Dice, a line in the order of training; what is left of the dashed one lost too much."""
    path = [c for c in found if c.checkpoint != BEST_ROBUST]
    with plt.style.context("default"):
        figure, axes = plt.subplots(figsize=(7, 5), dpi=130, layout="constrained")
        axes.plot([100 * c.clean for c in path], [100 * c.robust for c in path], "-o", color="#1f77b4", alpha=0.6)
        axes.plot([100 * c.clean for c in found], [100 * c.robust for c in found], "o", color="#1f77b4")
        for candidate in found:
            name = candidate.checkpoint.removesuffix(".pth").removeprefix("snapshot_").removeprefix("checkpoint_")
            axes.annotate(
                name.replace("_", " "), (100 * candidate.clean, 100 * candidate.robust),
                textcoords="offset points", xytext=(6, 4), fontsize=8,
            )  # fmt: skip
        axes.plot(100 * chosen.clean, 100 * chosen.robust, "*", markersize=18, color="#d62728", label="selected")
        axes.axvline(100 * lowest, color="grey", linestyle="--", label="lowest clean Dice allowed")
        axes.set_xlabel("clean Dice (TVDI, %)")
        level = (request.levels or [""])[0]
        axes.set_ylabel(f"Dice under {request.attacks[0]} at {request.norm.upper()} {level} (TVDI, %)")
        axes.grid(alpha=0.3)
        axes.legend()
        with atomic_path(file) as temporary:
            figure.savefig(temporary, format="png")
        plt.close(figure)
