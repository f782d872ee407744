"""What an evaluation finds: scores of samples and cases under each condition."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from nnunet_ima.attacks import Finding
from nnunet_ima.evaluation.examples import Example
from nnunet_ima.evaluation.metrics import Array, CaseScore
from nnunet_ima.evaluation.protocols import Level

CLEAN, CLAMP = "clean", "clamp-only"
# The image of a sample that an attack keeps: that of the lowest Dice.
KEPT = "kept"
WORST_KEPT = 4
LOTS_KEPT = 2


class SampleKey(NamedTuple):
    """Which sample: a tile of a case, by its number in nnU-Net's sliding-window order."""

    case: str
    tile: int


class Condition(NamedTuple):
    """What is done to the samples: an attack as the user wrote it at a level; no level for clean and clamp only."""

    attack: str
    level: Level | None

    def __str__(self) -> str:
        return f"{self.attack} {self.level.text}" if self.level else self.attack


@dataclass(frozen=True)
class MemberScore:
    """The best point that a member of an ensemble found for a sample by itself.

    Attributes:
        dice: of that point, in [0, 1].
        counts: (F, 3) of tp, fp, fn for each foreground class or region.
    """

    dice: float
    counts: Array


class Point(NamedTuple):
    """A point of a sample that an attacker holds: ``kept``, ``clean``, ``clamp-only`` or a member's; counts (F, 3)."""

    name: str
    counts: Array


@dataclass(frozen=True)
class SampleScore:
    """One sample under one condition.

    Attributes:
        counts: (F, 3) of tp, fp, fn for each foreground class or region.
        dice: of the perturbed sample, in [0, 1].
        clean_dice: of the same sample untouched.
        epsilon: the largest perturbation allowed, in z-scores.
        norm: of the perturbation found.
        passes: forward passes spent.
        backward_passes: backward passes spent.
        by_attack: what each member of an ensemble found, None where it was not asked any more.
    """

    sample: SampleKey
    counts: Array
    dice: float
    clean_dice: float
    epsilon: float
    norm: float
    passes: int
    backward_passes: int = 0
    by_attack: Mapping[str, MemberScore | None] = field(default_factory=dict)


@dataclass(frozen=True)
class EndToEndScore:
    """A case after an attack that went through the sliding window.

    Attributes:
        score: of the volume with the lowest case Dice that is known.
        found_by: where it comes from: ``end-to-end``, or if that found nothing lower ``carried over`` from the samples,
            or ``unperturbed``.
        norm: the largest that the attack's own perturbation has in a window of the network, in z-scores.
        carried_norm: the same of the perturbation that is carried over from the samples.
        forward_passes, backward_passes: of the whole case.
    """

    score: CaseScore
    found_by: str
    norm: float
    carried_norm: float
    forward_passes: int
    backward_passes: int


@dataclass
class Outcome:
    """Everything about one condition.

    Attributes:
        attack: as the user wrote it; ``clean`` or ``clamp-only`` without an attack.
        level: None without an attack.
        samples: in the order of the cases, then of the tiles.
        cases: by name; only cases all of whose samples were attacked.
        end_to_end: by name; of the same cases, if whole cases were attacked too.
        worst: the samples that lost most Dice, to be shown.
        findings: of the clean condition: what the checks of the network found.
        points: for each sample, the point whose counts TVDI pools; see
            :func:`~nnunet_ima.evaluation.ensembles.points_for_tvdi`.
    """

    attack: str
    level: Level | None
    samples: list[SampleScore] = field(default_factory=list)
    cases: dict[str, CaseScore] = field(default_factory=dict)
    end_to_end: dict[str, EndToEndScore] = field(default_factory=dict)
    worst: list[Example] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)


def unperturbed(outcomes: Sequence[Outcome]) -> Outcome:
    """What attacks begin with: the clean samples, under the protocol ``paper`` the clamped ones."""
    return next((outcome for outcome in outcomes if outcome.attack == CLAMP), outcomes[0])


def lost_most(scores: Iterable[SampleScore]) -> list[SampleScore]:
    """The few samples that lost most Dice; of equal ones those that come first."""
    return sorted(scores, key=lambda score: (score.dice - score.clean_dice, score.sample))[:WORST_KEPT]


def drawn_by_lot(scores: Iterable[SampleScore]) -> list[SampleScore]:
    """A few samples drawn by lot, the more voxels there are to segment the likelier; always the same ones.

    What a model or an attack makes of them has no part in it: so they can be shown of several models side by side, and
    nobody chose them. The lots of all samples are among those of any parts of them (Efraimidis and Spirakis 2006).
    """

    def lot(score: SampleScore) -> tuple[float, SampleKey]:
        return _lot(score.sample, float(score.counts[:, [0, 2]].sum())), score.sample

    return sorted(scores, key=lot)[:LOTS_KEPT]


@lru_cache(maxsize=2**16)
def _lot(sample: SampleKey, size: float) -> float:
    number = hashlib.sha256(f"{sample.case}, tile {sample.tile}".encode(errors="backslashreplace")).digest()
    # Exponentially distributed; the more voxels, the smaller.
    return -math.log((int.from_bytes(number[:6], "big") + 1) / 2**48) / size if size else math.inf
