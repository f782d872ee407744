"""``nnunet_ima attack``: perturbed scans as files, for any other tool."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.dice import DiceCriterion
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import AttackChoice, parse_attack
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import Case, Sample, ValidationCases
from nnunet_ima.evaluation.description import identify
from nnunet_ima.evaluation.environment import versions
from nnunet_ima.evaluation.identity import read_sealed, refuse_different, sealed
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.metrics import Segmentation, nan_mean
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.evaluation.normalisation import normalisation_of, scale_of
from nnunet_ima.evaluation.outcomes import CLEAN, Condition
from nnunet_ima.evaluation.protocols import Protocol, parse_level
from nnunet_ima.evaluation.records import Records
from nnunet_ima.evaluation.run import Evaluation, Runner, Selection, samples_in_a_pass, whole_passes
from nnunet_ima.evaluation.scan_files import ScanFiles, Volume
from nnunet_ima.evaluation.scans import beyond_range, perturb_scan
from nnunet_ima.files import write_text
from nnunet_ima.lp import Norm
from nnunet_ima.overlap import Place
from nnunet_ima.units import short

FILE, LOCK = "attack.json", ".lock"
SCHEMA = "nnunet_ima/attack/4"
IMAGES = ("images", "perturbation")
PARTS = (*IMAGES, "before", "after")
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
        fingerprint: a number that changes with the preprocessed case.
        dice_before, dice_after: of what ``nnUNetv2_predict`` finds in the scan and in the perturbed one, mean of the
            classes; None if no class is there or was found.
        dice_in_evaluation: what ``nnunet_ima evaluate`` reports for the case, without the way back to a file.
        largest_tile_norm: of the tiles that were attacked, in the norm of the attack and the unit of the network's
            input: z-scores, unless the plans normalise otherwise.
        preprocessed: of the perturbation put together, in that unit.
        scan: of the perturbation of the scan, in its intensities.
        beyond_range: by how much the written scan leaves the range of the raw one, in its intensities.
        lost: how far what the network sees of the written scan is from what was attacked (L2), as a share of the
            perturbation, but for the scale and offset of the new normalisation: by resampling to the scan's grid and
            back; None if nothing was perturbed, as in a case without foreground.
        samples_in_a_pass: of the network; fewer than those of other cases if the memory was not enough.
    """

    case: str
    fingerprint: int
    dice_before: float | None
    dice_after: float | None
    dice_in_evaluation: float | None
    largest_tile_norm: float
    preprocessed: Norms
    scan: Norms
    beyond_range: float
    lost: float | None
    samples_in_a_pass: int


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
    batch_size: int | None = None,
) -> list[PerturbedCase]:
    """Write, for each case, ``images`` (perturbed), ``perturbation``, and what is found ``before`` and ``after``.

    ``images`` is a folder as ``nnUNetv2_predict -i`` takes it. Perturbed scans are 32-bit floats: rounding to whole
    intensities can undo a small perturbation. Cases that an earlier call with the same request finished are kept.

    Args:
        model: that is attacked, under the protocol ``sound``.
        attack: as for ``nnunet_ima evaluate``.
        norm: l2 or linf.
        level: as for ``nnunet_ima evaluate``.
        names: of validation cases of the model's fold; None for all.
        output: a folder that is empty, or not there, or that the same request began.
        device: to run on.
        seed: of the attack.
        command: that is noted.
        progress: whether to show a bar.
        batch_size: samples attacked at once, None for as many as fill whole passes; fewer where the memory is not
            enough.

    Returns:
        What was asked for, in that order.

    Raises:
        UserError: the request, the data or the folder are no use.
    """
    choice, strength, protocol = parse_attack(attack), parse_level(level, norm), Protocol("sound", norm)
    if model.configuration.previous_stage_name is not None:
        raise UserError(
            f"{model.folder.name} is the second stage of a cascade, whose input is no scan alone; attack its first "
            f"stage, or measure this one with nnunet_ima evaluate."
        )
    files, cases = ScanFiles(model), ValidationCases(model)
    chosen = list(cases.names) if names is None else list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in cases.names]
    if unknown:
        raise UserError(
            f"{unknown[0]} is no validation case of fold {model.fold}; these are: {', '.join(cases.names[:8])}"
            f"{', ...' if len(cases.names) > 8 else ''}."
        )
    size = batch_size or whole_passes(samples_in_a_pass(model, device))
    evaluation = Evaluation(
        model, protocol, [choice], [strength], None, size, seed, device, DiceCriterion(labels=model.labels),
        progress=progress,
    )  # fmt: skip
    identity, scale = identify(evaluation, [], evaluation.chunk), scale_of(normalisation_of(model))
    _finished(output, identity, cases)  # what is no folder for this gets no lock either
    head = {
        "schema": SCHEMA, "model": model.describe(), "attack": attack, "norm": norm, "level": level, "seed": seed,
        "unit": protocol.unit_in(scale), "range": protocol.range_in(scale), "command": command, "versions": versions(),
        "identity": identity,
    }  # fmt: skip
    with _at_work_alone(output), tempfile.TemporaryDirectory() as folder:
        done = _finished(output, identity, cases)
        attacker = _Attacker(evaluation, cases, files, choice, Path(folder))
        with attacker.records.writing():
            for name in tqdm([name for name in chosen if name not in done], unit="case", disable=not progress):
                with _whole_or_not(output, name) as room:
                    found = attacker(name, room)
                    # Before the first files are there, so that they are known for what they are.
                    _note(output, head, done)
                done[name] = found
                _note(output, head, done)
    return [done[name] for name in chosen]


def _note(output: Path, head: Mapping[str, Any], done: Mapping[str, PerturbedCase]) -> None:
    content = sealed({**head, "cases": [asdict(one) for one in done.values()]})
    write_text(output / FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")


def table(found: Sequence[PerturbedCase], model: TrainedModel) -> str:
    """For people."""
    unit = short(scale_of(normalisation_of(model)))
    columns = ["case", "Dice before", "after", "in evaluate", f"L2 ({unit})", "lost (%)", "L2 (scan)"]
    columns += ["largest change (scan)"]
    leaves = any(one.beyond_range for one in found)
    columns += ["beyond range (scan)"] if leaves else []
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for one in found:
        dice = [_percent(value, ".1f") for value in (one.dice_before, one.dice_after, one.dice_in_evaluation)]
        norms = [f"{value:.4g}" for value in (one.preprocessed.l2, one.scan.l2, one.scan.linf)]
        cells = [*dice, norms[0], _percent(one.lost, ".4g"), *norms[1:]]
        cells += [f"{one.beyond_range:.4g}"] if leaves else []
        lines.append(f"| {one.case} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"\n{sentence}" for sentence in differences(found))])


def differences(found: Sequence[PerturbedCase]) -> list[str]:
    """A sentence for each case whose file has another Dice than the evaluation reports, by more than a point."""
    return [
        f"{one.case}: of the file {_percent(one.dice_after, '.1f')} % Dice are left, not "
        f"{_percent(one.dice_in_evaluation, '.1f')} % as in nnunet_ima evaluate: {_percent(one.lost, '.0f')} % of the "
        f"perturbation were lost on the way to the scan's grid and back, as a scan whose voxels are larger than the "
        f"network's cannot hold all of it, and nnU-Net normalises the perturbed scan anew."
        for one in found
        if one.dice_after is not None
        and one.dice_in_evaluation is not None
        and abs(one.dice_after - one.dice_in_evaluation) > NEAR
    ]


class _Attacker:
    """Attacks one case after the other, with less memory once it was not enough."""

    def __init__(
        self, evaluation: Evaluation, cases: ValidationCases, files: ScanFiles, choice: AttackChoice, folder: Path
    ) -> None:
        self._evaluation, self._cases, self._files, self._choice = evaluation, cases, files, choice
        self._clean, self._condition = Condition(CLEAN, None), Condition(choice.text, evaluation.levels[0])
        self.records = Records(folder / "part", [self._clean, self._condition], "")
        self._runner = Runner(evaluation, cases, Selection([], frozenset(), []), self.records)
        self._whole = CaseLevel(cases, evaluation.device)

    def __call__(self, name: str, output: Path) -> PerturbedCase:
        """Attack a case, and write what comes of it into the parts of ``output``."""
        model, whole = self._evaluation.model, self._whole
        scan, case = self._files.read(name), self._cases.load(name)
        tiles, largest = self._attacked_tiles(list(self._cases.samples([name])))
        merged = whole.merge(case, tiles)
        inside = (slice(0, model.channels), *case.unpad)
        difference = (merged - case.image)[inside].numpy()
        perturbed = perturb_scan(model, scan, case, difference)
        before, _ = whole.predict_scan(scan.image, scan.properties)
        after, seen = whole.predict_scan(perturbed, scan.properties)
        self._files.write_image(scan, perturbed, output / "images", name)
        self._files.write_image(scan, perturbed - scan.image, output / "perturbation", name)
        self._files.write_segmentation(scan, before, output / "before", name)
        self._files.write_segmentation(scan, after, output / "after", name)
        sizes = _norms(difference), _norms(perturbed - scan.image)
        off = _distance_but_for_normalisation(seen, merged[inside].numpy(), ~case.fixed[inside].numpy())
        return PerturbedCase(
            case=name,
            fingerprint=self._cases.fingerprints[name],
            dice_before=self._dice(case, before),
            dice_after=self._dice(case, after),
            dice_in_evaluation=_known(nan_mean(list(whole.score(case, merged).dice))),
            largest_tile_norm=largest,
            preprocessed=sizes[0],
            scan=sizes[1],
            beyond_range=beyond_range(scan.image, perturbed),
            lost=off / sizes[0].l2 if sizes[0].l2 > 0 else None,
            samples_in_a_pass=self._runner.chunk,
        )

    def _attacked_tiles(self, samples: Sequence[Sample]) -> tuple[list[tuple[Place, Tensor]], float]:
        """Perturbed tiles and where they belong, and the largest norm of their perturbations."""
        runner, largest = self._runner, 0.0
        tiles: list[tuple[Place, Tensor]] = []
        while samples:
            batch, samples = samples[: runner.batch_size], samples[runner.batch_size :]
            clean = runner.attack_with_enough_memory(None, self._clean, batch)
            self.records.add_samples(self._clean, [one.score for one in clean])
            for one in runner.attack_with_enough_memory(self._choice, self._condition, batch):
                tiles.append((one.sample.place, one.tile))
                largest = max(largest, one.score.norm)
        return tiles, largest

    def _dice(self, case: Case, segmentation: Segmentation) -> float | None:
        return _known(nan_mean(list(self._whole.score_segmentation(case, segmentation).dice)))


def _finished(output: Path, identity: dict[str, Any], cases: ValidationCases) -> dict[str, PerturbedCase]:
    """The cases that the same request finished in an earlier call, by name.

    Raises:
        UserError: the folder holds anything else, or a case has changed since.
    """
    if not output.exists():
        return {}
    mine = [entry for entry in output.iterdir() if not _is_leftover(entry)] if output.is_dir() else [output]
    if not mine:
        return {}
    if not (output / FILE).is_file():
        raise UserError(f"{output} is not empty; give a new folder with -o.")
    content = read_sealed(output / FILE, SCHEMA, "give a new folder with -o")
    refuse_different(content["identity"], identity, output)
    found = {}
    for row in content["cases"]:
        one = PerturbedCase(**{**row, "preprocessed": Norms(**row["preprocessed"]), "scan": Norms(**row["scan"])})
        cases.load(one.case)
        if cases.fingerprints[one.case] != one.fingerprint:
            raise UserError(
                f"The preprocessed case {one.case} has changed since {output} was begun; give a new folder with -o."
            )
        if all(file.is_file() for file in _files(cases.model, output, one.case)):
            found[one.case] = one
    return found


def _files(model: TrainedModel, output: Path, name: str) -> list[Path]:
    """All that is written for a case."""
    ending = model.dataset_json["file_ending"]
    channels = [f"{name}_{channel:04d}{ending}" for channel in range(model.channels)]
    return [output / part / file for part in PARTS for file in (channels if part in IMAGES else [f"{name}{ending}"])]


@contextmanager
def _whole_or_not(output: Path, name: str) -> Iterator[Path]:
    """A folder with the parts of a case, which come to those of ``output`` once all of them are there."""
    room = output / f".{name}.tmp"
    shutil.rmtree(room, ignore_errors=True)
    try:
        for part in PARTS:
            (room / part).mkdir(parents=True)
        yield room
        for part in PARTS:
            (output / part).mkdir(exist_ok=True)
            for file in (room / part).iterdir():
                file.replace(output / part / file.name)
    finally:
        shutil.rmtree(room, ignore_errors=True)


@contextmanager
def _at_work_alone(output: Path) -> Iterator[None]:
    """Hold the folder, which is made, and goes again if nothing came into it.

    Raises:
        UserError: another process is writing into it.
    """
    was_there = output.is_dir()
    refusal = f"Another process is writing perturbed scans to {output}; wait until it has ended, or give another folder"
    with alone(output / LOCK, refusal):
        try:
            yield
        finally:
            if not was_there and all(map(_is_leftover, output.iterdir())):
                shutil.rmtree(output)


def _is_leftover(entry: Path) -> bool:
    """Whether it is no result: the lock, or what a killed call left of a case."""
    return entry.name == LOCK or (entry.name.startswith(".") and entry.name.endswith(".tmp"))


def _distance_but_for_normalisation(seen: Volume, wanted: Volume, where: np.ndarray[Any, Any]) -> float:
    """L2 distance between two volumes (C, Z, Y, X), each channel of ``wanted`` scaled and shifted as fits best.

    Only ``where`` (C, Z, Y, X) is looked at: a background that is left out of the normalisation is not shifted.
    """
    squares = 0.0
    for found, target, here in zip(seen.astype(np.float64), wanted.astype(np.float64), where, strict=True):
        slope, offset = np.polyfit(target[here], found[here], 1)
        squares += float(((slope * target[here] + offset - found[here]) ** 2).sum())
    return float(np.sqrt(squares))


def _norms(difference: Volume) -> Norms:
    values = difference.astype(np.float64)
    return Norms(float(np.sqrt((values**2).sum())), float(np.abs(values).max(initial=0.0)))


def _known(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value


def _percent(share: float | None, form: str) -> str:
    return "–" if share is None else f"{100 * share:{form}}"
