"""Attack a model on its validation cases, sample by sample, and note what a report needs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.attacks import AttackResult, AutoAttackResult, check_network
from nnunet_ima.attacks.graphs import CudaGraphs
from nnunet_ima.attacks.oracle import Watch, finite_logits, undisturbed
from nnunet_ima.dice import DiceCriterion, confusion, sample_dice
from nnunet_ima.errors import UserError, is_out_of_memory
from nnunet_ima.evaluation.attack_choice import AttackChoice
from nnunet_ima.evaluation.batch import load_batch
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import Sample, ValidationCases
from nnunet_ima.evaluation.description import describe_run, identify
from nnunet_ima.evaluation.end_to_end import Carried, EndToEnd, EndToEndAttack
from nnunet_ima.evaluation.examples import Example, make_example
from nnunet_ima.evaluation.identity import digest, write_identity
from nnunet_ima.evaluation.metrics import Array, CaseScore
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.evaluation.most_passes import most_passes
from nnunet_ima.evaluation.outcomes import CLAMP, CLEAN, Condition, EndToEndScore, MemberScore, SampleKey, SampleScore
from nnunet_ima.evaluation.progress import Progress
from nnunet_ima.evaluation.protocols import Level, Protocol
from nnunet_ima.evaluation.records import Records, part_folder
from nnunet_ima.evaluation.run_file import restore_run
from nnunet_ima.overlap import Place
from nnunet_ima.precision import use_exact_convolutions

# The network always runs on chunks of this many voxels and samples, whatever --batch-size: see Oracle.
CHUNK_VOXELS = {"cpu": 2**16, "mps": 2**18, "cuda": 2**22}
LARGEST_CHUNK = {"cpu": 8, "mps": 16, "cuda": 128}
# Attacked at once, and lost by a kill, at the most, or one pass where that is more; on a CPU see default_batch_size.
BATCH_SIZE = 64
CHUNKS_IN_A_BATCH = 4
CHECKED_SAMPLES = 8

_T = TypeVar("_T")


@dataclass(frozen=True)
class Selection:
    """What one part attacks.

    Attributes:
        samples: in the order of the cases.
        complete_cases: those attacked completely; only these count at the case level.
        all_cases: names of the cases that all parts together attack.
    """

    samples: list[Sample]
    complete_cases: frozenset[str]
    all_cases: list[str]


@dataclass(frozen=True)
class Evaluation:
    """What to run on a model.

    Attributes:
        protocol: range and units.
        attacks: in the order in which they are reported.
        levels: noise levels.
        max_samples: attack no more samples than this, whole cases first; None for all.
        batch_size: samples attacked at once, and noted at once. It changes memory and speed, no number.
        seed: of attacks.
        num_parts, part_id: attack every ``num_parts``-th case only, from the ``part_id``-th.
        end_to_end: whether each attack is also run on whole cases, through the sliding window.
        samples_seed: of the choice of samples: apart from ``seed``, so that runs of other seeds can be compared sample
            by sample.
    """

    model: TrainedModel
    protocol: Protocol
    attacks: Sequence[AttackChoice]
    levels: Sequence[Level]
    max_samples: int | None
    batch_size: int
    seed: int
    device: torch.device
    criterion: DiceCriterion
    case_level: bool = True
    progress: bool = True
    num_parts: int = 1
    part_id: int = 0
    end_to_end: EndToEnd = "off"
    samples_seed: int = 0

    def run(self, folder: Path, command: str) -> None:
        """Attack whatever the records in ``folder`` do not hold yet; each result is noted there at once.

        Raises:
            UserError: there is nothing to attack, the data are not usable, or ``folder`` holds another run.
        """
        cases = ValidationCases(self.model)
        selection = select_samples(
            cases, self.max_samples, self.samples_seed, self.progress, self.num_parts, self.part_id, self.case_level
        )
        if not selection.samples and self.num_parts == 1:
            raise UserError(
                f"No validation case of fold {self.model.fold} holds any foreground, so nothing can be measured."
            )
        identity = identify(self, selection.all_cases, self.chunk)
        head = describe_run(self, selection.all_cases, command)
        restore_run(folder, identity, head)
        write_identity(folder, identity, head)
        steps = self.conditions()
        conditions = [condition for _, condition in steps]
        records = Records(part_folder(folder, self.num_parts, self.part_id), conditions, digest(identity))
        with records.writing():
            tiles: dict[str, list[int]] = {name: [] for name in selection.all_cases[self.part_id :: self.num_parts]}
            for sample in selection.samples:
                tiles[sample.case].append(sample.tile)
            fingerprints = {name: cases.fingerprints[name] for name in tiles}
            records.plan(tiles, sorted(selection.complete_cases), fingerprints)
            runner = Runner(self, cases, selection, records)
            runner.run(steps)
            runner.check()
            records.forget_tiles()

    def conditions(self) -> list[tuple[AttackChoice | None, Condition]]:
        """The clean one first, whose Dice the others refer to; None stands for no attack."""
        found: list[tuple[AttackChoice | None, Condition]] = [(None, Condition(CLEAN, None))]
        if self.protocol.name == "paper":
            found.append((None, Condition(CLAMP, None)))
        return found + [(attack, Condition(attack.text, level)) for attack in self.attacks for level in self.levels]

    @property
    def chunk(self) -> int:
        """How many samples go through the network at once; the last digits of a result depend on it."""
        return samples_in_a_pass(self.model, self.device)


def samples_in_a_pass(model: TrainedModel, device: torch.device) -> int:
    """How many samples go through a network at once."""
    configuration = model.configuration
    voxels = int(np.prod(configuration.patch_size))
    # Half of what fitted into memory in training, in mixed precision, fits here in single precision.
    fits = configuration.batch_size // 2 if device.type == "cuda" else configuration.batch_size
    most = max(1, min(LARGEST_CHUNK[device.type], fits))
    return int(np.clip(CHUNK_VOXELS[device.type] // voxels, 1, most))


def default_batch_size(model: TrainedModel, device: torch.device) -> int:
    """How many samples are attacked at once where nobody asked for a number.

    Once an attack is done with some of a batch, the others fill fewer chunks, and the last one is filled up with zeros:
    the fewer chunks a batch holds, the more that costs (docs/decisions.md). A chunk of one sample is never filled up.
    """
    chunk = samples_in_a_pass(model, device)
    if device.type != "cpu":
        return whole_passes(chunk)
    return chunk if chunk == 1 else CHUNKS_IN_A_BATCH * chunk


def whole_passes(chunk: int) -> int:
    """The most samples, but no more than :data:`BATCH_SIZE` or one pass, of which no pass is filled up with zeros.

    Args:
        chunk: samples in a pass.
    """
    return chunk * max(1, BATCH_SIZE // chunk)


def select_samples(
    cases: ValidationCases,
    max_samples: int | None,
    seed: int,
    progress: bool,
    num_parts: int = 1,
    part_id: int = 0,
    whole_cases: bool = True,
) -> Selection:
    """All samples, or ``max_samples`` of them, chosen with ``seed``; of these, every ``num_parts``-th case's.

    With ``whole_cases`` complete cases are taken in a random order, and only the last one is thinned out; else samples
    are drawn from all cases, as slices of one case resemble each other.
    """
    names = list(cases.names)

    def read(some: Sequence[str]) -> list[Sample]:
        return list(
            cases.samples(list(tqdm(some, desc="reading cases", unit="case", disable=not progress, leave=False)))
        )

    if max_samples is None:
        mine = names[part_id::num_parts]
        return Selection(read(mine), frozenset(mine), names)
    draws = random.Random(seed)
    if whole_cases:
        chosen, touched, complete = _whole_cases(cases, max_samples, draws)
    else:
        everything = read(names)
        chosen = draws.sample(everything, min(max_samples, len(everything)))
        touched, complete = {sample.case for sample in chosen}, set()
    selected = [name for name in names if name in touched]
    chosen.sort(key=lambda sample: (selected.index(sample.case), sample.tile))
    mine = selected[part_id::num_parts]
    return Selection([sample for sample in chosen if sample.case in mine], frozenset(complete & set(mine)), selected)


def _whole_cases(
    cases: ValidationCases, max_samples: int, draws: random.Random
) -> tuple[list[Sample], set[str], set[str]]:
    """Samples, the cases that they are of, and those of them that are complete; one may have no samples at all."""
    names = list(cases.names)
    draws.shuffle(names)
    chosen: list[Sample] = []
    touched: set[str] = set()
    complete: set[str] = set()
    for name in names:
        room = max_samples - len(chosen)
        if room <= 0:
            break
        here = list(cases.samples([name]))
        touched.add(name)
        if len(here) <= room:
            complete.add(name)
        # A case that does not fit is thinned out evenly.
        chosen += here if len(here) <= room else [here[i * len(here) // room] for i in range(room)]
    return chosen, touched, complete


class _Attacked(NamedTuple):
    """A sample after an attack: its score, its perturbed tile (C, *patch), and how to show it."""

    sample: Sample
    tile: Tensor
    score: SampleScore
    example: Example


class Runner:
    """Runs conditions one after the other; the clean one first, whose Dice the others refer to."""

    def __init__(self, evaluation: Evaluation, cases: ValidationCases, selection: Selection, records: Records) -> None:
        self.evaluation, self.cases, self.selection, self.records = evaluation, cases, selection, records
        self.model = evaluation.model
        self.case_level = CaseLevel(cases, evaluation.device) if evaluation.case_level else None
        self.end_to_end: EndToEndAttack | None = None
        if self.case_level is not None and evaluation.end_to_end != "off":
            self.end_to_end = EndToEndAttack(evaluation, self.case_level)
        # nnU-Net's predictor lets cuDNN choose kernels by timing them; a result must not depend on that.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        use_exact_convolutions()
        # What was too much before would be too much again.
        self.chunk, self.batch_size = records.smallest_chunk or evaluation.chunk, evaluation.batch_size
        self.graphs, self._told = self._new_graphs(), False
        self.progress = Progress(0, 0, shown=False)
        self._samples_of: dict[str, list[Sample]] = {name: [] for name in sorted(selection.complete_cases)}
        for sample in selection.samples:
            self._samples_of.setdefault(sample.case, []).append(sample)

    def run(self, steps: Sequence[tuple[AttackChoice | None, Condition]]) -> None:
        """Do whatever is not done yet."""
        shown, left = self.evaluation.progress, {condition: self.left(condition) for _, condition in steps}
        passes = {condition: self._most_passes(choice) for choice, condition in steps} if shown else {}
        work = done = 0
        for condition, each in passes.items():
            tiles = self._tiles_end_to_end(condition)
            work += each * (len(self.selection.samples) + sum(tiles.values()))
            finished = sum(number for name, number in tiles.items() if name in self.records.end_to_end[condition])
            done += each * (len(self.selection.samples) - len(left[condition]) + finished)
        self.progress = Progress(work, done, shown)
        with closing(self.progress):
            for choice, condition in steps:
                self._run(choice, condition, left[condition], passes.get(condition, 0))

    def left(self, condition: Condition) -> list[Sample]:
        """The samples that are not done yet."""
        return [sample for sample in self.selection.samples if not self._is_done(condition, sample)]

    def _run(self, choice: AttackChoice | None, condition: Condition, samples: Sequence[Sample], passes: int) -> None:
        """Attack these samples, and score the cases that are finished with them."""
        self._score_finished(choice, condition, self._samples_of, passes)
        begun = time.perf_counter()
        self._attack_in_batches(choice, condition, samples, passes)
        if choice is not None and samples and self.evaluation.progress:
            seconds = time.perf_counter() - begun
            tqdm.write(f"{condition}: {len(samples)} samples attacked, scored and noted in {seconds:.1f} s.")
        # Only now is it known which samples are shown. These are not in the bar: there are none but after a damage.
        lost = self.records.lost_examples(condition)
        self._attack_in_batches(choice, condition, [s for s in self.selection.samples if _key(s) in lost], 0)

    def _attack_in_batches(
        self, choice: AttackChoice | None, condition: Condition, samples: Sequence[Sample], passes: int
    ) -> None:
        """Attack and note samples; each moves the bar by ``passes``."""
        total = len(self.selection.samples)
        while samples:
            self.progress.tell(str(condition), f"{total - len(samples)} of {total} samples")
            batch, samples = samples[: self.batch_size], samples[self.batch_size :]
            done = self.attack_with_enough_memory(choice, condition, batch, passes)
            # First what a score stands for, then the score: a killed run does not lose the former.
            for one in done:
                if self._needs_tile(condition, one.sample):
                    self.records.save_tile(condition, one.score.sample, one.tile)
            if condition.level is not None:
                self.records.keep_examples(condition, [one.example for one in done], [one.score for one in done])
            self.records.add_samples(condition, [one.score for one in done])
            self._tell_of_graphs()
            self._score_finished(choice, condition, dict.fromkeys(sample.case for sample in batch), passes)
        self.progress.tell(str(condition), f"{total} of {total} samples")

    def check(self) -> None:
        """Does the network mislead attacks? Asked of the samples that it segments best."""
        if self.records.findings is not None or not self.selection.samples:
            return
        scores = self.records.samples[Condition(CLEAN, None)].values()
        surest = sorted(scores, key=lambda score: (-score.dice, score.sample))[:CHECKED_SAMPLES]
        chosen = {score.sample for score in surest if score.dice > 0}
        samples = [sample for sample in self.selection.samples if _key(sample) in chosen]
        if not samples:
            self.records.add_findings([])
            return
        evaluation = self.evaluation
        images, targets, threat = load_batch(self.cases, samples, evaluation.protocol, None, evaluation.device)
        network, criterion = self.model.network, evaluation.criterion
        self.records.add_findings(
            self._in_smaller_passes(
                lambda chunk: check_network(network, images, targets, threat, criterion, evaluation.seed, chunk)
            )
        )

    def _in_smaller_passes(self, call: Callable[[int], _T]) -> _T:
        """What ``call`` answers, given how many samples may go through the network at once; fewer, if it must be."""
        while True:
            try:
                return call(self.chunk)
            except RuntimeError as error:
                if not is_out_of_memory(error) or self.chunk == 1:
                    raise
            # Not in the handler: its traceback holds on to what fills the memory.
            self._use_less_memory(self.batch_size)

    def attack_with_enough_memory(
        self, choice: AttackChoice | None, condition: Condition, batch: Sequence[Sample], passes: int = 0
    ) -> list[_Attacked]:
        """As ``attack``; when the memory is not enough, in halves from then on."""
        try:
            with self.progress.doing(len(batch), passes) as watch:
                return list(self.attack(choice, condition, batch, watch))
        except RuntimeError as error:
            if not is_out_of_memory(error) or (self.chunk == 1 and len(batch) == 1):
                raise
        # Not in the handler: its traceback holds on to what fills the memory.
        self._use_less_memory(len(batch))
        # Once and for all: the first part may halve the size again.
        parts = list(_batches(batch, self.batch_size))
        return [one for part in parts for one in self.attack_with_enough_memory(choice, condition, part, passes)]

    def _use_less_memory(self, batch_size: int) -> None:
        self.chunk, self.batch_size = max(1, self.chunk // 2), max(1, batch_size // 2)
        self.graphs = self._new_graphs()
        if self.evaluation.device.type == "cuda":
            torch.cuda.empty_cache()
        self.records.note_chunk(self.chunk)
        tqdm.write(
            f"The memory was not enough: from here on {self.batch_size} samples are attacked at once, {self.chunk} in "
            f"each pass; the last digits of a result depend on the latter."
        )

    def _tell_of_graphs(self) -> None:
        if self.graphs is not None and self.graphs.refused is not None and not self._told:
            self._told = True
            tqdm.write(f"Some passes run without CUDA graphs: slower, with the same numbers ({self.graphs.refused}).")

    def _new_graphs(self) -> CudaGraphs | None:
        return CudaGraphs(self.chunk) if self.evaluation.device.type == "cuda" else None

    def attack(
        self,
        choice: AttackChoice | None,
        condition: Condition,
        batch: Sequence[Sample],
        watch: Watch | None = None,
    ) -> Iterator[_Attacked]:
        """Attack a batch; without a choice it stays as it is, or is only clamped."""
        protocol, device, level = self.evaluation.protocol, self.evaluation.device, condition.level
        images, targets, threat = load_batch(self.cases, batch, protocol, level, device)
        before = self._logits(images)
        passes, backward = torch.ones(len(batch), dtype=torch.long), torch.zeros(len(batch), dtype=torch.long)
        members: list[dict[str, MemberScore | None]] = [{} for _ in batch]
        if choice is None:
            perturbed = protocol.clamp(images) if condition.attack == CLAMP else images
        else:
            attack = choice.make(
                threat=threat,
                criterion=self.evaluation.criterion,
                seed=self.evaluation.seed,
                chunk=self.chunk,
                graphs=self.graphs,
                watch=watch,
            )
            result = attack(self.model.network, images, targets)
            perturbed, passes, backward = result.images, result.forward_passes, result.backward_passes
            if isinstance(result, AutoAttackResult):
                members = self._member_scores(result.by_attack, targets)
        after = self._logits(perturbed)
        counts, dice = self._score(after, targets)
        norms = threat.distance(perturbed, images) if level else torch.zeros(len(batch))
        radii = threat.radius(images).flatten(1).amax(1) if level else torch.zeros(len(batch))
        clean = self.records.samples[Condition(CLEAN, None)]
        for i, sample in enumerate(batch):
            score = SampleScore(
                _key(sample), counts[i], float(dice[i]),
                float(dice[i]) if condition.attack == CLEAN else clean[_key(sample)].dice,
                float(radii[i]), float(norms[i]), int(passes[i]), int(backward[i]),
                members[i],
            )  # fmt: skip
            example = self._example(i, score, images, perturbed, targets, before, after)
            yield _Attacked(sample, perturbed[i].cpu(), score, example)

    def _member_scores(self, found: Mapping[str, AttackResult], targets: Tensor) -> list[dict[str, MemberScore | None]]:
        """For each sample, what each member reached by itself: one more pass for every sample that it attacked."""
        scores: list[dict[str, MemberScore | None]] = [dict.fromkeys(found) for _ in targets]
        for name, part in found.items():
            attacked = (~part.dice.isnan()).nonzero()[:, 0]
            if not len(attacked):
                continue
            counts, dice = self._score(self._logits(part.images[attacked]), targets[attacked])
            for i, own_counts, own_dice in zip(attacked.tolist(), counts, dice.tolist(), strict=True):
                scores[i][name] = MemberScore(own_dice, own_counts)
        return scores

    def _score(self, logits: Tensor, targets: Tensor) -> tuple[Array, Tensor]:
        """Counts (B, F, 3) of tp, fp, fn, and Dice (B,)."""
        counts = confusion(logits, targets, self.model.labels)
        dice = sample_dice(counts, self.evaluation.criterion.reduction)
        return torch.stack(counts, -1).cpu().numpy().astype(float), dice

    def _logits(self, images: Tensor) -> Tensor:
        """Logits of all images, in the same chunks as the attacks use."""
        parts = []
        with undisturbed(self.model.network), torch.no_grad():
            for start in range(0, len(images), self.chunk):
                part = images[start : start + self.chunk]
                filled = torch.cat([part, part.new_zeros((self.chunk - len(part), *part.shape[1:]))])
                parts.append(finite_logits(self.model.network, filled, nullcontext, len(part))[: len(part)])
        return torch.cat(parts)

    def _example(
        self, i: int, score: SampleScore, images: Tensor, perturbed: Tensor, targets: Tensor, *logits: Tensor
    ) -> Example:
        labels = self.model.labels
        before, after = (labels.predicted_foreground(values[i : i + 1])[0] for values in logits)
        target = labels.foreground(targets[i : i + 1], logits[0].shape[1])[0]
        dice = score.clean_dice, score.dice
        return make_example(*score.sample, dice, images[i], perturbed[i], target, before, after)

    def _is_done(self, condition: Condition, sample: Sample) -> bool:
        key = _key(sample)
        if key not in self.records.samples[condition]:
            return False
        if not self._needs_tile(condition, sample) or self._is_scored(condition, sample.case):
            return True
        return self.records.load_tile(condition, key) is not None

    def _needs_tile(self, condition: Condition, sample: Sample) -> bool:
        """Whether a case's score will be made of it."""
        return (
            self.case_level is not None and condition.level is not None and sample.case in self.selection.complete_cases
        )

    def _is_scored(self, condition: Condition, name: str) -> bool:
        """Whether everything about a case is noted."""
        whole = self.end_to_end is None or condition.level is None or name in self.records.end_to_end[condition]
        return whole and name in self.records.cases[condition]

    def _most_passes(self, choice: AttackChoice | None) -> int:
        """Of a sample."""
        return 1 if choice is None else most_passes(choice.text, len(self.model.foreground))

    def _tiles_end_to_end(self, condition: Condition) -> dict[str, int]:
        """For each case that is attacked as a whole, how many tiles a pass through it is taken for.

        The windows that the attack reaches are known only once the case is read; in 2D they are mostly the samples.
        """
        if self.end_to_end is None or condition.level is None:
            return {}
        axes = self.model.mirroring_axes if self.evaluation.end_to_end == "mirroring" else None
        mirrored = 2 ** len(axes or ())
        return {name: mirrored * len(self._samples_of[name]) for name in self.selection.complete_cases}

    def _score_finished(
        self, choice: AttackChoice | None, condition: Condition, names: Iterable[str], passes: int
    ) -> None:
        """Score, and attack as a whole, those of the named cases all of whose samples are done."""
        if self.case_level is None:
            return
        done = self.records.samples[condition]
        for name in names:
            mine = self._samples_of[name]
            if self._is_scored(condition, name) or name not in self.selection.complete_cases:
                continue
            tiles = [self.records.load_tile(condition, _key(sample)) for sample in mine if condition.level]
            if all(_key(sample) in done for sample in mine) and all(tile is not None for tile in tiles):
                places = [sample.place for sample in mine]
                found = [(place, tile) for place, tile in zip(places, tiles, strict=False) if tile is not None]
                volume = self._volume(condition, name, found)
                score = self.case_level.score(self.cases.load(name), volume)
                if self.end_to_end and choice and name not in self.records.end_to_end[condition]:
                    self.progress.tell(str(condition), f"{name} end to end")
                    whole = self._attack_whole(self.end_to_end, choice, condition, name, places, volume, score, passes)
                    self.records.add_end_to_end(condition, name, whole)
                # Last: with it the tiles go.
                self.records.add_case(condition, name, score)

    def _volume(self, condition: Condition, name: str, tiles: Sequence[tuple[Place, Tensor]]) -> Tensor:
        """A case under a condition, from its perturbed tiles."""
        assert self.case_level is not None
        case = self.cases.load(name)
        if condition.attack == CLEAN:
            return case.image
        return self.evaluation.protocol.clamp(self.case_level.merge(case, tiles))

    def _attack_whole(
        self, attack: EndToEndAttack, choice: AttackChoice, condition: Condition, name: str,
        places: Sequence[Place], volume: Tensor, score: CaseScore, passes: int,
    ) -> EndToEndScore:  # fmt: skip
        """Attack a case through the sliding window; ``volume`` and ``score`` are what its samples' attacks make."""
        assert condition.level is not None
        level = condition.level
        before = Condition(CLAMP if self.evaluation.protocol.name == "paper" else CLEAN, None)
        carried = Carried(self.cases.load(name), places, volume, self.records.cases[before][name], score)

        def watched(chunk: int) -> EndToEndScore:
            with self.progress.doing(1, passes, self._tiles_end_to_end(condition)[name]) as watch:
                return attack(choice, level, carried, chunk, watch)

        return self._in_smaller_passes(watched)


def _key(sample: Sample) -> SampleKey:
    return SampleKey(sample.case, sample.tile)


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
