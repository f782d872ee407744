"""Finished evaluations whose figures a test chooses, written as ``nnunet_ima evaluate`` writes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from nnunet_ima.attacks import Finding
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.identity import digest, write_identity
from nnunet_ima.evaluation.merge import merge
from nnunet_ima.evaluation.metrics import CaseScore
from nnunet_ima.evaluation.outcomes import CLAMP, CLEAN, Condition, EndToEndScore, MemberScore, SampleKey, SampleScore
from nnunet_ima.evaluation.protocols import Protocol, parse_level
from nnunet_ima.evaluation.records import Records, part_folder

# Of a structure's voxels, standard deviation over the attacks' seeds.
MOVED_BY_A_SEED = 0.018
# As in the head of a summary; runs of before do not tell.
Z_SCORED = {"channels": 1, "normalization_schemes": ["ZScoreNormalization"], "use_mask_for_norm": [False]}
MASKED, MASKED_WORDS = {**Z_SCORED, "use_mask_for_norm": [True]}, "ZScoreNormalization (nonzero region)"
CT = {
    "channels": 1, "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
    "intensities": {"0": {"mean": 99.5, "std": 39.5}},
}  # fmt: skip
CT_WORDS = "CTNormalization (mean 99.5, std 39.5)"
NOISE, ATTACK, ENSEMBLE = "white-noise:draws=3", "apgd:steps=4", "autoattack:version=fast"


def make_run(
    folder: Path, *, clean: float = 0.9, attacked: Mapping[str, float] | None = None,
    noise: Mapping[str, float] | None = None, cases: int = 8, tiles: int = 5, seed: int = 0, jitter: int = 0,
    title: str = "nnUNetTrainerSTD", dataset: str = "Dataset004_Hippocampus", norm: str = "l2",
    protocol: str = "sound", classes: tuple[str, ...] = ("anterior", "posterior"), case_name: str = "case_{:03d}",
    margins: Mapping[str, list[float]] | None = None, whole_cases: bool = True, trained_on: bool = False,
    further: Mapping[str, Mapping[str, float]] | None = None, patch: tuple[int, ...] = (24, 20),
    clamped: float | None = None, members: Mapping[str, Mapping[str, float]] | None = None,
    end_to_end: float | None = None, date: str | None = "2026-11-26", shift: int = 0,
    about: Mapping[str, Any] | None = None, files: Mapping[str, str | None] | None = None,
    asked: Mapping[str, Any] | None = None,
) -> Path:  # fmt: skip
    """A run whose samples' Dice scatter around the given ones.

    Args:
        clean: without attack.
        attacked: by level.
        noise: by the same levels; None for no noise.
        further: attacks by name, with the same levels.
        clamped: under the protocol paper, without attack.
        members: of an ensemble, by name, with the same levels; the ensemble keeps the lowest Dice of each sample.
        end_to_end: what the cases lose more when they are attacked as a whole.
        date: on which it was begun; None as in runs that do not tell.
        shift: by which the structures of samples that are shown lie elsewhere.
        jitter: 0, or another seed of the attacks: of each attacked sample some voxels fall out differently, as many as
            move TVDI by as much as real seeds did (docs/gate.md).
        about: entries of the summary's head that differ; None for those that runs of before did not have.
        files: what of the model differs: ``sha256``, ``plans.json`` or ``dataset.json``.
        asked: more of its identity, such as :func:`~nnunet_ima.evaluation.finished.asked_for` tells of a command.
    """
    attacked = attacked or {"2": 0.8, "8": 0.5}
    by_attack = {**({NOISE: noise} if noise else {}), ATTACK: attacked, **(further or {})}
    by_attack |= {ENSEMBLE: dict.fromkeys(attacked, clean)} if members else {}
    levels = [parse_level(text, norm) for text in attacked]
    conditions = [Condition(CLEAN, None), *([Condition(CLAMP, None)] if protocol == "paper" else [])]
    conditions += [Condition(attack, level) for attack in by_attack for level in levels]
    names = [case_name.format(number) for number in range(cases)]
    model = {
        "dataset": dataset, "trainer": title, "plans": "nnUNetPlans", "configuration": "2d", "fold": 0,
        "checkpoint": "checkpoint_final.pth", "sha256": f"{title} {seed} {clean}",
        "plans.json": "planned", "dataset.json": "described", **(files or {}),
    }  # fmt: skip
    identity = {
        "model": model, "protocol": protocol, "norm": norm, "levels": list(attacked), "attacks": list(by_attack),
        "case level": whole_cases, "cases": names,
        **({} if end_to_end is None else {"end to end": "window"}),
    }  # fmt: skip
    model.update((asked or {}).get("model", {}))
    identity = {**identity, **(asked or {}), "model": model}
    head = _head(model, Protocol(protocol, norm), classes, margins or {}, trained_on, patch, date)
    head["attacks"] = {attack: {"attack": attack.partition(":")[0], "steps": 4} for attack in by_attack}
    for name, value in (about or {}).items():
        head[name] = value
        if value is None:
            del head[name]
    if end_to_end is not None:
        head["end_to_end"] = {"mirrored_axes": [0, 1], "mirroring_known_to_the_attack": False}
    folder.mkdir(parents=True)
    write_identity(folder, identity, head)
    records = Records(part_folder(folder, 1, 0), conditions, digest(identity))
    with records.writing():
        records.plan({name: list(range(tiles)) for name in names}, names, {})
        for condition in conditions:
            untouched = clamped if clamped is not None and condition.attack == CLAMP else clean
            wanted = untouched if condition.level is None else by_attack[condition.attack][condition.level.text]
            scores = [
                _score(SampleKey(name, tile), wanted, clean, len(classes), seed, jitter)
                for name in names
                for tile in range(tiles)
            ]
            if members and condition.level is not None and condition.attack == ENSEMBLE:
                of_level = {name: levels[condition.level.text] for name, levels in members.items()}
                scores = [_ensemble(score.sample, of_level, clean, len(classes), seed) for score in scores]
            if condition.level is not None:
                examples = [_example(score, len(classes), shift) for score in scores]
                records.keep_examples(condition, examples, scores)
            records.add_samples(condition, scores)
            for name in names if whole_cases else ():
                dice = tuple(float(np.clip(wanted + 0.01 * number, 0, 1)) for number in range(len(classes)))
                surface = tuple(min(1.0, value + 0.05) for value in dice)
                score = CaseScore(dice, tuple(5 - 4 * value for value in dice), surface)
                if end_to_end is not None and condition.level is not None:
                    lower = replace(score, dice=tuple(value - end_to_end for value in dice))
                    records.add_end_to_end(condition, name, EndToEndScore(lower, "end-to-end", 5.0, 5.0, 9, 8))
                records.add_case(condition, name, score)
        records.add_findings([Finding("same_output_twice", True, "the network gives the same output twice")])
    # The pictures take seconds, and are tested elsewhere.
    drawn = "nnunet_ima.evaluation.merge.draw_"
    with mock.patch(f"{drawn}worst"), mock.patch(f"{drawn}dice_against_level"):
        merge(folder)
    return folder


def _score(sample: SampleKey, wanted: float, clean: float, classes: int, seed: int, jitter: int) -> SampleScore:
    number = _number(sample)
    size = np.random.default_rng([number, 0]).integers(100, 900, classes)
    # What makes a sample hard is the same for all models; the seed adds what is particular to one.
    hard, own = (np.random.default_rng([number, which]).normal(0, 0.05) for which in (1, seed + 2))
    hits = np.round(size * np.clip(wanted + hard + 0.3 * own, 0, 1))
    if jitter and wanted != clean:
        moved = np.random.default_rng([number, jitter, 7]).normal(0, MOVED_BY_A_SEED, classes)
        hits = np.clip(np.round(hits + size * moved), 0, size)
    counts = np.stack([hits, size - hits, size - hits], -1).astype(float)
    untouched = clean if wanted == clean else _score(sample, clean, clean, classes, seed, jitter).dice
    return SampleScore(sample, counts, float((hits / size).mean()), untouched, 5.0, 5.0, 9, 8)


def _ensemble(sample: SampleKey, members: Mapping[str, float], clean: float, classes: int, seed: int) -> SampleScore:
    """The members differ in how much they find that is not there; the last one was not asked about every sample."""
    found: dict[str, MemberScore] = {}
    for number, (name, wanted) in enumerate(members.items(), start=1):
        counts = _score(sample, wanted, clean, classes, seed, jitter=0).counts
        draws = np.random.default_rng([_number(sample), number, 9])
        counts[:, 1] += draws.integers(0, 200, classes) * (draws.random(classes) < 0.5)
        found[name] = MemberScore(float((2 * counts[:, 0] / (counts @ [2, 1, 1])).mean()), counts)
    lowest = min(found.values(), key=lambda one: one.dice)
    by_attack: dict[str, MemberScore | None] = {**found}
    if lowest is not found[name] and sample.tile == 0:
        by_attack[name] = None
    before = _score(sample, clean, clean, classes, seed, jitter=0).dice
    return SampleScore(sample, lowest.counts, lowest.dice, before, 5.0, 5.0, 9, 8, by_attack)


def _number(sample: SampleKey) -> int:
    return sum((position + 1) * ord(letter) for position, letter in enumerate(sample.case)) * 1000 + sample.tile


def _example(score: SampleScore, classes: int, elsewhere: int) -> Example:
    draws = np.random.default_rng(_number(score.sample))
    image = draws.normal(size=(24, 20)).astype(np.float32)
    masks = np.zeros((3, classes, 24, 20), bool)
    for shift, mask in enumerate(masks):
        for number in range(classes):
            top = 4 + elsewhere + shift + 6 * number
            mask[number, top : top + 5, 5 + shift : 14] = True
    return Example(*score.sample, score.clean_dice, score.dice, image, image + 0.2, *masks)


def _head(
    model: dict[str, Any], protocol: Protocol, classes: tuple[str, ...], margins: Mapping[str, list[float]],
    trained_on: bool, patch: tuple[int, ...], date: str | None,
) -> dict[str, Any]:  # fmt: skip
    return {
        "model": model,
        "protocol": {
            "name": protocol.name, "norm": protocol.norm, "range": protocol.range_in("z-scores"),
            "unit": protocol.unit_in("z-scores"),
        },
        "criterion": {"dice_threshold": 0.6, "dice_reduction": "mean"},
        "classes": list(classes),
        "labels": [str(number + 1) for number in range(len(classes))],
        "patch_size": list(patch), "normalisation": Z_SCORED,
        "seed": 0, "max_samples": None, "trained_on_these_cases": trained_on, "started_from_unknown_weights": False,
        "margins_by_epoch": dict(margins), "device": "cpu", "command": "nnunet_ima evaluate ...",
        "versions": {"nnunet_ima": "0.1.0", "nnunet_ima's sources": "a1"}, "training": {"epsilon": 15.0, "steps": 20},
        **({} if date is None else {"date": date}),
    }  # fmt: skip
