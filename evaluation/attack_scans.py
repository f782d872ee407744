"""``nnunet_ima attack``: perturbed scans as files, for any other tool."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import AttackChoice, parse_attack
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import Sample, ValidationCases
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.metrics import nan_mean
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.evaluation.outcomes import CLEAN, Condition
from nnunet_ima.evaluation.protocols import Level, Protocol, parse_level
from nnunet_ima.evaluation.records import Records
from nnunet_ima.evaluation.run import Evaluation, Runner, Selection
from nnunet_ima.evaluation.scans import Scan, Volume, perturb_scan, read_scan, write_channels, write_like
from nnunet_ima.files import write_text
from nnunet_ima.lp import Norm

FILE = "attack.json"
SCHEMA = "nnunet_ima/attack/2"
# A point of Dice.
NEAR = 0.01


@dataclass(frozen=True)
class Norms:
    """How large a perturbation is: L2 norm, and largest change of a voxel."""

    l2: float
    linf: float


@dataclass(frozen=True)
class PerturbedCase:
    """What was written for a case.

    Attributes:
        dice_before, dice_after: of what ``nnUNetv2_predict`` finds in the scan and in the perturbed one, mean of the
            classes.
        dice_in_evaluation: what ``nnunet_ima evaluate`` reports for the case, without the way back to a file.
        largest_tile_norm: of the tiles that were attacked, in the norm of the attack, z-scores.
        preprocessed: of the perturbation put together, in z-scores.
        scan: of the perturbation of the scan, in its intensities.
        lost: how far what the network sees of the written scan is from what was attacked (L2), as a share of the
            perturbation, but for the scale and offset of the new normalisation: by resampling to the scan's grid and
            back.
    """

    case: str
    dice_before: float
    dice_after: float
    dice_in_evaluation: float
    largest_tile_norm: float
    preprocessed: Norms
    scan: Norms
    lost: float


def attack_scans(
    model: TrainedModel,
    attack: str,
    norm: Norm,
    level: str,
    names: Sequence[str] | None,
    output: Path,
    device: torch.device,
    seed: int,
    command: str,
    progress: bool = True,
) -> list[PerturbedCase]:
    """Write, for each case, ``images`` (perturbed), ``perturbation``, and what is found ``before`` and ``after``.

    ``images`` is a folder as ``nnUNetv2_predict -i`` takes it. Perturbed scans are 32-bit floats: rounding to whole
    intensities can undo a small perturbation.

    Args:
        model: that is attacked, under the protocol ``sound``.
        attack: as for ``nnunet_ima evaluate``.
        norm: l2 or linf.
        level: as for ``nnunet_ima evaluate``.
        names: of validation cases of the model's fold; None for all.
        output: a folder that is empty, or not there.
        device: to run on.
        seed: of the attack.
        command: that is noted.
        progress: whether to show a bar.

    Raises:
        UserError: the request, the data or the folder are no use.
    """
    choice, strength, protocol = parse_attack(attack), parse_level(level, norm), Protocol("sound", norm)
    if model.configuration.previous_stage_name is not None:
        raise UserError(
            f"{model.folder.name} is the second stage of a cascade, whose input is no scan alone; attack its first "
            f"stage, or measure this one with nnunet_ima evaluate."
        )
    cases = ValidationCases(model)
    chosen = list(cases.names) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in cases.names]
    if unknown:
        raise UserError(
            f"{unknown[0]} is no validation case of fold {model.fold}; these are: {', '.join(cases.names[:8])}"
            f"{', ...' if len(cases.names) > 8 else ''}."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} is not empty; give a new folder with -o.")
    for part in ("images", "perturbation", "before", "after"):
        (output / part).mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(
        model, protocol, [choice], [strength], None, 64, seed, device, DiceCriterion(labels=model.labels),
        progress=progress,
    )  # fmt: skip
    found: list[PerturbedCase] = []
    for name in tqdm(chosen, unit="case", disable=not progress):
        found.append(_attack_case(evaluation, cases, name, choice, strength, output))
        content = {
            "schema": SCHEMA, "model": model.describe(), "attack": attack, "norm": norm, "level": level, "seed": seed,
            "unit": protocol.unit, "range": protocol.range, "command": command, "versions": versions(),
            "cases": [asdict(one) for one in found],
        }  # fmt: skip
        write_text(output / FILE, json.dumps(content, indent=2) + "\n")
    return found


def table(found: Sequence[PerturbedCase]) -> str:
    """For people."""
    lines = [
        "| case | Dice before | after | in evaluate | L2 (z-scores) | lost (%) | L2 (scan) | largest change (scan) |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for one in found:
        dice = [f"{100 * value:.1f}" for value in (one.dice_before, one.dice_after, one.dice_in_evaluation)]
        norms = [f"{value:.4g}" for value in (one.preprocessed.l2, 100 * one.lost, one.scan.l2, one.scan.linf)]
        lines.append(f"| {one.case} | {' | '.join(dice)} | {' | '.join(norms)} |")
    return "\n".join([*lines, *(f"\n{sentence}" for sentence in differences(found))])


def differences(found: Sequence[PerturbedCase]) -> list[str]:
    """A sentence for each case whose file has another Dice than the evaluation reports, by more than a point."""
    return [
        f"{one.case}: of the file {100 * one.dice_after:.1f} % Dice are left, not {100 * one.dice_in_evaluation:.1f} % "
        f"as in nnunet_ima evaluate: {100 * one.lost:.0f} % of the perturbation were lost on the way to the scan's "
        f"grid and back. A scan whose voxels are larger than the network's cannot hold all of it."
        for one in found
        if abs(one.dice_after - one.dice_in_evaluation) > NEAR
    ]


def _attack_case(
    evaluation: Evaluation, cases: ValidationCases, name: str, choice: AttackChoice, level: Level, output: Path
) -> PerturbedCase:
    model = evaluation.model
    scan, case = read_scan(model, name), cases.load(name)
    whole = CaseLevel(cases, evaluation.device)
    samples = list(cases.samples([name]))
    tiles, largest = _attacked_tiles(evaluation, cases, name, samples, choice, level)
    merged = whole.merge(case, tiles)
    inside = (slice(0, model.channels), *case.unpad)
    difference = (merged - case.image)[inside].numpy()
    perturbed = perturb_scan(model, scan, case, difference)
    before, _ = whole.predict_scan(scan.image, scan.properties)
    after, seen = whole.predict_scan(perturbed, scan.properties)
    lost = _distance_but_for_normalisation(seen, merged[inside].numpy()) / max(_norms(difference).l2, 1e-12)
    _write(model, scan, perturbed, {"before": before, "after": after}, name, output)
    dice_before, dice_after = (nan_mean(list(whole.score_segmentation(case, one).dice)) for one in (before, after))
    return PerturbedCase(
        name,
        dice_before,
        dice_after,
        nan_mean(list(whole.score(case, merged).dice)),
        largest,
        _norms(difference),
        _norms(perturbed - scan.image),
        lost,
    )


def _attacked_tiles(
    evaluation: Evaluation, cases: ValidationCases, name: str, samples: list[Sample], choice: AttackChoice, level: Level
) -> tuple[list[Any], float]:
    clean, condition = Condition(CLEAN, None), Condition(choice.text, level)
    with tempfile.TemporaryDirectory() as folder:
        records = Records(Path(folder) / "part", [clean, condition], "")
        runner = Runner(evaluation, cases, Selection(samples, frozenset([name]), [name]), records)
        tiles, largest = [], 0.0
        with records.writing():
            for start in range(0, len(samples), evaluation.batch_size):
                batch = samples[start : start + evaluation.batch_size]
                records.add_samples(clean, [one.score for one in runner.attack(None, clean, batch)])
                for one in runner.attack(choice, condition, batch):
                    tiles.append((one.sample.place, one.tile))
                    largest = max(largest, one.score.norm)
    return tiles, largest


def _write(model: TrainedModel, scan: Scan, perturbed: Volume, found: dict[str, Any], name: str, output: Path) -> None:
    ending = str(model.dataset_json["file_ending"])
    write_channels(scan, perturbed, output / "images", name, ending)
    write_channels(scan, perturbed - scan.image, output / "perturbation", name, ending)
    for part, segmentation in found.items():
        write_like(scan.files[0], segmentation.astype(np.uint8), output / part / f"{name}{ending}")


def _distance_but_for_normalisation(seen: Volume, wanted: Volume) -> float:
    """L2 distance between two volumes (C, Z, Y, X), each channel of ``wanted`` scaled and shifted as fits best."""
    squares = 0.0
    for found, target in zip(seen.astype(np.float64), wanted.astype(np.float64), strict=True):
        slope, offset = np.polyfit(target.ravel(), found.ravel(), 1)
        squares += float(((slope * target + offset - found) ** 2).sum())
    return float(np.sqrt(squares))


def _norms(difference: Volume) -> Norms:
    values = difference.astype(np.float64)
    return Norms(float(np.sqrt((values**2).sum())), float(np.abs(values).max(initial=0.0)))
