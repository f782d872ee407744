"""Attack a model on its validation cases, sample by sample, and gather what a report needs."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nnunet_ima.attacks import Attack, AutoAttackResult, Finding, check_network
from nnunet_ima.attacks.oracle import finite_logits, undisturbed
from nnunet_ima.dice import DiceCriterion, confusion, sample_dice
from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.attack_choice import AttackChoice
from nnunet_ima.evaluation.case_level import CaseLevel
from nnunet_ima.evaluation.cases import Case, Place, Sample, ValidationCases
from nnunet_ima.evaluation.metrics import Array, CaseScore
from nnunet_ima.evaluation.models import TrainedModel
from nnunet_ima.evaluation.protocols import Level, Protocol
from nnunet_ima.precision import use_exact_convolutions
from nnunet_ima.threat import ThreatModel

# The network always runs on chunks of this many voxels and samples, whatever --batch-size: see Oracle.
CHUNK_VOXELS = {"cpu": 2**18, "mps": 2**18, "cuda": 2**22}
LARGEST_CHUNK = {"cpu": 16, "mps": 16, "cuda": 128}

WORST_KEPT = 4
CHECKED_SAMPLES = 8


@dataclass(frozen=True)
class SampleScore:
    """One sample under one attack.

    Attributes:
        counts: (F, 3) of tp, fp, fn for each foreground class or region.
        dice: of the perturbed sample, in [0, 1].
        clean_dice: of the same sample untouched.
        epsilon: the largest perturbation allowed, in z-scores.
        norm: of the perturbation found.
        passes: forward passes spent.
        backward_passes: backward passes spent.
        by_attack: Dice under each member of an ensemble, NaN where it was not needed any more.
    """

    sample: Sample
    counts: Array
    dice: float
    clean_dice: float
    epsilon: float
    norm: float
    passes: int
    backward_passes: int = 0
    by_attack: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """A sample to be shown: image and perturbed image (C, *patch), target and predictions (F, *patch) of bool."""

    title: str
    dice_before: float
    dice_after: float
    image: Tensor
    perturbed: Tensor
    target: Tensor
    before: Tensor
    after: Tensor


@dataclass
class Outcome:
    """Everything about one condition: clean, clamp only, or an attack at a level."""

    attack: str
    level: Level | None
    samples: list[SampleScore] = field(default_factory=list)
    cases: dict[str, CaseScore] = field(default_factory=dict)
    worst: list[Example] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Selection:
    """Which samples are attacked, and which cases are attacked completely (only those count at the case level)."""

    samples: list[Sample]
    complete_cases: frozenset[str]


@dataclass(frozen=True)
class Evaluation:
    """What to run on a model.

    Attributes:
        protocol: range and units.
        attacks: in the order in which they are reported.
        levels: noise levels.
        max_samples: attack no more samples than this, whole cases first; None for all.
        batch_size: samples attacked at once. It changes memory and speed, no number.
        seed: of attacks and of the choice of samples.
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

    def run(self) -> list[Outcome]:
        """All outcomes, clean first."""
        cases = ValidationCases(self.model)
        selection = select_samples(cases, self.max_samples, self.seed, self.progress)
        if not selection.samples:
            raise UserError(
                f"No validation case of fold {self.model.fold} holds any foreground, so nothing can be measured."
            )
        runner = _Runner(self, cases, selection)
        conditions: list[tuple[AttackChoice | None, Level | None]] = [(None, None)]
        if self.protocol.name == "paper":
            conditions.append((CLAMP_ONLY, None))
        conditions += [(attack, level) for attack in self.attacks for level in self.levels]
        total = len(selection.samples) * len(conditions)
        with tqdm(total=total, unit="sample", disable=not self.progress, dynamic_ncols=True) as bar:
            outcomes = [runner.condition(attack, level, bar) for attack, level in conditions]
        outcomes[0].findings = runner.check(outcomes[0])
        return outcomes


CLEAN, CLAMP = "clean", "clamp-only"
CLAMP_ONLY = AttackChoice(CLAMP, "", lambda **_: _never())


def _never() -> Attack:
    raise AssertionError("the clamp is no attack")


def select_samples(cases: ValidationCases, max_samples: int | None, seed: int, progress: bool) -> Selection:
    """All samples, or ``max_samples`` of them: whole cases in a random, seeded order, the last one cut."""
    names = list(cases.names)
    if max_samples is None:
        reading = tqdm(names, desc="reading cases", unit="case", disable=not progress, leave=False)
        return Selection(list(cases.samples(list(reading))), frozenset(names))
    random.Random(seed).shuffle(names)
    chosen: list[Sample] = []
    complete: set[str] = set()
    for name in names:
        here = list(cases.samples([name]))
        room = max_samples - len(chosen)
        if room <= 0:
            break
        if len(here) <= room:
            complete.add(name)
        # A case that does not fit is thinned out evenly.
        keep = here if len(here) <= room else [here[i * len(here) // room] for i in range(room)]
        chosen += keep
    order = {name: i for i, name in enumerate(cases.names)}
    chosen.sort(key=lambda sample: (order[sample.case], sample.tile))
    return Selection(chosen, frozenset(complete))


def load_batch(
    cases: ValidationCases, batch: Sequence[Sample], protocol: Protocol, level: Level | None, device: torch.device
) -> tuple[Tensor, Tensor, ThreatModel]:
    """Images (B, C, *patch), targets (B, 1 or R, *patch) and what an attacker may do to them at a level."""
    loaded = [(cases.load(sample.case), sample.place) for sample in batch]

    def stack(pick: Callable[[Case], Tensor]) -> Tensor:
        return torch.stack([cases.patch(pick(case), place) for case, place in loaded]).to(device)

    images, targets, fixed = stack(lambda c: c.image), stack(lambda c: c.target), stack(lambda c: c.fixed)
    low, high = (torch.stack([getattr(case, end) for case, _ in loaded]).to(device) for end in ("low", "high"))
    return images, targets, protocol.threat(level or Level("0", 0.0), images, low, high, fixed)


class _Runner:
    """Runs conditions one after the other; the clean one first, whose Dice the others refer to."""

    def __init__(self, evaluation: Evaluation, cases: ValidationCases, selection: Selection) -> None:
        self.evaluation, self.cases, self.selection = evaluation, cases, selection
        self.model = evaluation.model
        self.case_level = CaseLevel(cases, evaluation.device) if evaluation.case_level else None
        # nnU-Net's predictor lets cuDNN choose kernels by timing them; a result must not depend on that.
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        use_exact_convolutions()
        self.clean_dice: dict[Sample, float] = {}
        voxels, device = int(np.prod(self.model.configuration.patch_size)), evaluation.device.type
        # Half of what fitted into memory in training, in mixed precision, fits here in single precision.
        fits = self.model.configuration.batch_size // 2 if device == "cuda" else self.model.configuration.batch_size
        most = max(1, min(LARGEST_CHUNK[device], fits))
        self.chunk = int(np.clip(CHUNK_VOXELS[device] // voxels, 1, most))

    def condition(self, choice: AttackChoice | None, level: Level | None, bar: tqdm[None]) -> Outcome:
        name = CLEAN if choice is None else choice.name
        outcome = Outcome(name if choice is None else choice.text or name, level)
        bar.set_description(f"{outcome.attack} {level.text}" if level else outcome.attack)
        pending: dict[str, list[tuple[Place, Tensor]]] = {}
        for batch in _batches(self.selection.samples, self.evaluation.batch_size):
            for sample, tile, score, example in self._attack(choice, level, batch):
                outcome.samples.append(score)
                _keep_worst(outcome.worst, example)
                pending.setdefault(sample.case, []).append((sample.place, tile))
            bar.update(len(batch))
            for finished in [case for case in pending if case != batch[-1].case]:
                self._score_case(outcome, finished, pending.pop(finished))
        for case in list(pending):
            self._score_case(outcome, case, pending.pop(case))
        self._score_cases_without_samples(outcome)
        return outcome

    def check(self, clean: Outcome) -> list[Finding]:
        """Does the network mislead attacks? Asked of the samples that it segments best."""
        surest = sorted(clean.samples, key=lambda score: -score.dice)[:CHECKED_SAMPLES]
        chosen = {score.sample for score in surest if score.dice > 0}
        samples = [sample for sample in self.selection.samples if sample in chosen]
        if not samples:
            return []
        evaluation = self.evaluation
        images, targets, threat = load_batch(self.cases, samples, evaluation.protocol, None, evaluation.device)
        network, criterion = self.model.network, evaluation.criterion
        return check_network(network, images, targets, threat, criterion, evaluation.seed, self.chunk)

    def _attack(
        self, choice: AttackChoice | None, level: Level | None, batch: Sequence[Sample]
    ) -> Iterator[tuple[Sample, Tensor, SampleScore, Example]]:
        protocol, device = self.evaluation.protocol, self.evaluation.device
        images, targets, threat = load_batch(self.cases, batch, protocol, level, device)
        before = self._logits(images)
        passes, backward = torch.ones(len(batch), dtype=torch.long), torch.zeros(len(batch), dtype=torch.long)
        members: dict[str, Tensor] = {}
        if choice is None:
            perturbed = images
        elif level is None:
            perturbed = self.evaluation.protocol.clamp(images)
        else:
            attack = choice.make(
                threat=threat,
                criterion=self.evaluation.criterion,
                seed=self.evaluation.seed,
                chunk=self.chunk,
            )
            result = attack(self.model.network, images, targets)
            perturbed, passes, backward = result.images, result.forward_passes, result.backward_passes
            if isinstance(result, AutoAttackResult):
                members = {name: part.dice for name, part in result.by_attack.items()}
        after = self._logits(perturbed)
        counts = confusion(after, targets, self.model.labels)
        dice = sample_dice(counts, self.evaluation.criterion.reduction)
        stacked = torch.stack(counts, -1).cpu().numpy().astype(float)
        norms = threat.distance(perturbed, images) if level else torch.zeros(len(batch))
        radii = threat.radius(images).flatten(1).amax(1) if level else torch.zeros(len(batch))
        for i, sample in enumerate(batch):
            clean = self.clean_dice.setdefault(sample, float(dice[i])) if choice is None else self.clean_dice[sample]
            score = SampleScore(
                sample, stacked[i], float(dice[i]), clean, float(radii[i]), float(norms[i]), int(passes[i]),
                int(backward[i]), {name: float(values[i]) for name, values in members.items()},
            )  # fmt: skip
            yield sample, perturbed[i].cpu(), score, self._example(i, score, images, perturbed, targets, before, after)

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
        before, after = (labels.predicted_foreground(values[i : i + 1])[0].cpu() for values in logits)
        return Example(
            title=f"{score.sample.case}, tile {score.sample.tile}",
            dice_before=score.clean_dice,
            dice_after=score.dice,
            image=images[i].cpu(),
            perturbed=perturbed[i].cpu(),
            target=labels.foreground(targets[i : i + 1], logits[0].shape[1])[0].cpu(),
            before=before,
            after=after,
        )

    def _score_case(self, outcome: Outcome, name: str, tiles: Sequence[tuple[Place, Tensor]]) -> None:
        if self.case_level is None or name not in self.selection.complete_cases:
            return
        case = self.cases.load(name)
        image = case.image if outcome.attack == CLEAN else self.case_level.merge(case, tiles)
        if outcome.attack != CLEAN:
            image = self.evaluation.protocol.clamp(image)
        outcome.cases[name] = self.case_level.score(case, image)

    def _score_cases_without_samples(self, outcome: Outcome) -> None:
        """A complete case without foreground has no samples, but counts at the case level."""
        for name in sorted(self.selection.complete_cases - outcome.cases.keys()):
            self._score_case(outcome, name, [])


def _keep_worst(worst: list[Example], example: Example) -> None:
    """Keep those that lost most Dice."""
    worst.append(example)
    worst.sort(key=lambda e: e.dice_after - e.dice_before)
    del worst[WORST_KEPT:]


def _batches(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]
