"""What a part of an evaluation has done so far, on disk: a killed run goes on from here, and parts are merged."""

from __future__ import annotations

import io
import math
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nnunet_ima.attacks import Finding
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.checked_file import read_checked, write_checked
from nnunet_ima.evaluation.examples import Example, load_example, save_example
from nnunet_ima.evaluation.journal import Journal, Record
from nnunet_ima.evaluation.locks import alone
from nnunet_ima.evaluation.metrics import CaseScore
from nnunet_ima.evaluation.outcomes import (
    Condition,
    EndToEndScore,
    MemberScore,
    SampleKey,
    SampleScore,
    drawn_by_lot,
    lost_most,
)
from nnunet_ima.files import remove_leftovers

RECORDS = "records"
# In the sentence that refuses to go on, by which a study knows it.
CASE_HAS_CHANGED = "has changed since"


def part_folder(run: Path, num_parts: int, part_id: int) -> Path:
    """Where part ``part_id`` of ``num_parts`` keeps what it has done."""
    return run / RECORDS / f"part_{part_id}_of_{num_parts}"


def part_folders(run: Path) -> list[Path]:
    """Of all parts that were begun."""
    return sorted(folder for folder in (run / RECORDS).glob("part_*_of_*") if folder.is_dir())


def options_of(part: Path) -> str:
    """Of ``nnunet_ima evaluate``, to run a part, or the one that it is a copy of: ``-num_parts 2 -part_id 1``."""
    _, part_id, _, num_parts, *_ = part.name.split("_")
    return f"-num_parts {num_parts} -part_id {part_id}"


def runs_noted(part: Path) -> set[str] | None:
    """Digests of the runs that a part's records say they belong to; None if it holds no record that is whole."""
    records = list(_journal_of(part).read())
    return {record["run"] for record in records if record.get("kind") == "run"} if records else None


class Records:
    """Scores of samples and cases, tiles of cases that are not finished, and examples, in one folder.

    Args:
        folder: of the part; it need not exist to be read.
        conditions: of the evaluation, in its order; records of others are ignored.
        run: a digest of the identity of the run that the records belong to.

    Raises:
        UserError: the folder holds records of another run.
    """

    def __init__(self, folder: Path, conditions: Sequence[Condition], run: str) -> None:
        self.folder, self.run = folder, run
        # So that copies of parts can be told apart.
        self.name: str | None = None
        self._journal = _journal_of(folder)
        self._number = {condition: number for number, condition in enumerate(conditions)}
        self.samples: dict[Condition, dict[SampleKey, SampleScore]] = {condition: {} for condition in conditions}
        self.cases: dict[Condition, dict[str, CaseScore]] = {condition: {} for condition in conditions}
        self.end_to_end: dict[Condition, dict[str, EndToEndScore]] = {condition: {} for condition in conditions}
        self.planned: dict[str, list[int]] = {}
        self.fingerprints: dict[str, int] = {}
        self.complete_cases: set[str] = set()
        self.findings: list[Finding] | None = None
        self.smallest_chunk: int | None = None
        known = {_name_of(condition): condition for condition in conditions}
        for record in self._journal.read():
            self._take(record, known)
        if self.name is None and self.samples and any(self.samples.values()):
            raise UserError(f"{folder} does not say which run its records belong to; move it away.")

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Only one process may add to a part.

        If a :class:`UserError` ends the block, a part that was not there before and has no sample yet is removed.

        Raises:
            UserError: another one does.
        """
        refusal = (
            f"Another process is at work on {self.folder}; wait for it, or give each machine a -part_id of its own"
        )
        with alone(self.folder / "lock", refusal), self._begun():
            yield

    @contextmanager
    def _begun(self) -> Iterator[None]:
        # Looked at under the lock: what another process began is not this one's to remove.
        fresh = not self._journal.file.exists()
        try:
            for place in [self.folder, *self.folder.glob("tiles/*/*"), *self.folder.glob("examples/*")]:
                remove_leftovers(place)
            for condition in self._number:
                self._drop_examples(condition)
            self.name = self.name or uuid.uuid4().hex[:12]
            yield
        except UserError:
            if fresh and not any(self.samples.values()):
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def plan(
        self, samples: Mapping[str, Sequence[int]], complete_cases: Sequence[str], fingerprints: Mapping[str, int]
    ) -> None:
        """Note which tiles of which cases this part is to do, which cases it does completely, and what they are.

        Raises:
            UserError: a case is not what it was when the part was begun.
        """
        changed = [name for name, number in fingerprints.items() if self.fingerprints.get(name, number) != number]
        if changed:
            raise UserError(
                f"The preprocessed case {changed[0]} {CASE_HAS_CHANGED} {self.folder} was begun; start again in "
                f"another folder (-o), or restore the data."
            )
        self._add(
            {
                "kind": "plan",
                "samples": {case: list(tiles) for case, tiles in samples.items()},
                "complete_cases": sorted(complete_cases),
                "fingerprints": dict(fingerprints),
            }
        )

    def add_samples(self, condition: Condition, scores: Sequence[SampleScore]) -> None:
        """Note scores; once this returns, they are safe, and examples that are beaten by theirs are gone."""
        self._add(*(_sample_record(condition, score) for score in scores))
        self._drop_examples(condition)

    def add_case(self, condition: Condition, name: str, score: CaseScore) -> None:
        """Note a case's score, and forget the tiles it was made of."""
        self._add_twice({"kind": "case", "condition": _name_of(condition), "case": name, **asdict(score)})
        shutil.rmtree(self._tiles(condition, name), ignore_errors=True)

    def add_end_to_end(self, condition: Condition, name: str, found: EndToEndScore) -> None:
        """Note what an attack through the sliding window did to a case."""
        self._add_twice({"kind": "end to end", "condition": _name_of(condition), "case": name, **asdict(found)})

    def add_findings(self, findings: Sequence[Finding]) -> None:
        """Note what the checks of the network found."""
        self._add({"kind": "findings", "findings": [list(finding) for finding in findings]})

    def note_chunk(self, chunk: int) -> None:
        """Note that from now on the network runs on fewer images at once, for want of memory."""
        self._add({"kind": "chunk", "chunk": chunk})

    def save_tile(self, condition: Condition, sample: SampleKey, tile: Tensor) -> None:
        """Keep a perturbed tile (C, *patch) until its case is scored."""
        file = self._tiles(condition, sample.case) / f"{sample.tile}.npy"
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = io.BytesIO()
        np.save(stream, tile.numpy())
        write_checked(file, stream.getvalue())

    def load_tile(self, condition: Condition, sample: SampleKey) -> Tensor | None:
        """A perturbed tile; None if it is not there, or damaged."""
        stored = read_checked(self._tiles(condition, sample.case) / f"{sample.tile}.npy")
        return None if stored is None else torch.from_numpy(np.load(io.BytesIO(stored), allow_pickle=False))

    def forget_tiles(self) -> None:
        """Remove what is left of tiles once everything is scored."""
        shutil.rmtree(self.folder / "tiles", ignore_errors=True)

    def keep_examples(self, condition: Condition, examples: Sequence[Example], scores: Sequence[SampleScore]) -> None:
        """Of these examples, whose scores are noted next, keep those that lost most of all samples, and some by lot."""
        folder = self._examples(condition)
        known = {**self.samples[condition], **{score.sample: score for score in scores}}
        wanted = _shown(known.values())
        folder.mkdir(parents=True, exist_ok=True)
        for example in examples:
            sample = SampleKey(example.case, example.tile)
            if sample in wanted:
                save_example(example, folder / _example_file(sample))

    def load_example(self, condition: Condition, sample: SampleKey) -> Example | None:
        """An example that was kept."""
        return load_example(self._examples(condition) / _example_file(sample), *sample)

    def lost_examples(self, condition: Condition) -> set[SampleKey]:
        """The samples that are to be shown, of those that are noted, but whose example is gone or damaged."""
        wanted = _shown(self.samples[condition].values()) if condition.level else set()
        return {sample for sample in wanted if self.load_example(condition, sample) is None}

    def _drop_examples(self, condition: Condition) -> None:
        """Only once the scores that beat them are noted: a killed run needs them still."""
        if condition.level is None:
            return
        wanted = {_example_file(sample) for sample in _shown(self.samples[condition].values())}
        for file in self._examples(condition).glob("*.npz"):
            if file.name not in wanted:
                file.unlink()

    def _examples(self, condition: Condition) -> Path:
        return self.folder / "examples" / str(self._number[condition])

    def _tiles(self, condition: Condition, case: str) -> Path:
        return self.folder / "tiles" / str(self._number[condition]) / case

    def _add_twice(self, record: Record) -> None:
        """What would cost a whole case to find again, should one of them be damaged."""
        self._add(record, record)

    def _add(self, *records: Record) -> None:
        # With each addition, so that no damage takes from all others whose they are.
        mine: Record = {"kind": "run", "run": self.run, "name": self.name, "chunk": self.smallest_chunk}
        self._journal.append([mine, *records])
        known = {_name_of(condition): condition for condition in self._number}
        for record in records:
            self._take(record, known)

    def _take(self, record: Record, known: Mapping[str, Condition]) -> None:
        kind = record.get("kind")
        if kind == "run":
            if record["run"] != self.run:
                raise UserError(f"{self.folder} holds records of another run than run.json says; move them away.")
            self.name = self.name or record["name"]
            self._take_chunk(record.get("chunk"))
        elif kind == "plan":
            self.planned = record["samples"]
            self.complete_cases = set(record["complete_cases"])
            self.fingerprints.update(record["fingerprints"])
        elif kind == "findings":
            self.findings = [Finding(*finding) for finding in record["findings"]]
        elif kind == "chunk":
            self._take_chunk(record["chunk"])
        elif kind in ("sample", "case", "end to end") and record["condition"] in known:
            condition = known[record["condition"]]
            if kind == "sample":
                score = _sample_score(record)
                self.samples[condition][score.sample] = score
            elif kind == "case":
                self.cases[condition][record["case"]] = _case_score(record)
            else:
                self.end_to_end[condition][record["case"]] = _end_to_end_score(record)

    def _take_chunk(self, chunk: int | None) -> None:
        if chunk is not None:
            self.smallest_chunk = min(chunk, self.smallest_chunk or chunk)


def _journal_of(part: Path) -> Journal:
    return Journal(part / "journal.jsonl")


def _shown(scores: Collection[SampleScore]) -> set[SampleKey]:
    """Of which an example is kept."""
    return {score.sample for score in (*lost_most(scores), *drawn_by_lot(scores))}


def _name_of(condition: Condition) -> str:
    return f"{condition.attack} @ {condition.level.text if condition.level else 'none'}"


def _example_file(sample: SampleKey) -> str:
    return f"{sample.case}__{sample.tile}.npz"


def _sample_record(condition: Condition, score: SampleScore) -> Record:
    return {
        "kind": "sample",
        "condition": _name_of(condition),
        "case": score.sample.case,
        "tile": score.sample.tile,
        "counts": score.counts.tolist(),
        "dice": score.dice,
        "clean_dice": score.clean_dice,
        "epsilon": score.epsilon,
        "norm": score.norm,
        "passes": score.passes,
        "backward_passes": score.backward_passes,
        "by_attack": {
            name: None if part is None else {"dice": part.dice, "counts": part.counts.tolist()}
            for name, part in score.by_attack.items()
        },
    }


def _sample_score(record: Record) -> SampleScore:
    values: dict[str, Any] = {key: value for key, value in record.items() if key not in ("kind", "condition")}
    sample = SampleKey(values.pop("case"), values.pop("tile"))
    members = {
        name: None if part is None else MemberScore(part["dice"], np.array(part["counts"], float))
        for name, part in values.pop("by_attack").items()
    }
    return SampleScore(sample, np.array(values.pop("counts"), float), by_attack=members, **values)


def _case_score(record: Record) -> CaseScore:
    dice, hd95, surface = (tuple(record[name]) for name in ("dice", "hd95", "surface_dice"))
    # In records of before, a structure that was wiped out or made up has no surface Dice. A Dice it always had.
    missed = (math.isnan(share) and not math.isnan(one) for share, one in zip(surface, dice, strict=True))
    return CaseScore(dice, hd95, tuple(0.0 if miss else share for miss, share in zip(missed, surface, strict=True)))


def _end_to_end_score(record: Record) -> EndToEndScore:
    values = {key: value for key, value in record.items() if key not in ("kind", "condition", "case")}
    return EndToEndScore(_case_score(values.pop("score")), **values)
