"""What the members of an ensemble found by themselves, and what the ensemble's TVDI is made of.

An ensemble keeps the image of the lowest Dice of each sample. So its ADI is at or below each member's, but its TVDI
need not be: TVDI pools voxels, and weighs a sample by its size. The attacker whose aim is TVDI therefore chooses again,
among the points that the attack left him with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from nnunet_ima.evaluation.lowest_tvdi import lowest_tvdi
from nnunet_ima.evaluation.metrics import Array, nan_mean, tvdi
from nnunet_ima.evaluation.outcomes import KEPT, MemberScore, Outcome, Point, SampleKey


def members_of(outcome: Outcome) -> list[str]:
    """Names of the members in the order in which they ran; empty if the attack is no ensemble."""
    return list(outcome.samples[0].by_attack) if outcome.samples else []


def points_for_tvdi(outcome: Outcome, unperturbed: Outcome) -> list[Point]:
    """The point of each sample whose counts TVDI pools.

    Of an ensemble: one of the image that was kept, each member's, and the unperturbed one, chosen by
    :func:`~nnunet_ima.evaluation.lowest_tvdi.lowest_tvdi` over all samples at once. Of any other attack: the image that
    was kept.

    Args:
        outcome: all its samples.
        unperturbed: the same samples before the attack.
    """
    kept = [score.counts for score in outcome.samples]
    members = members_of(outcome)
    if not members:
        return [Point(KEPT, counts) for counts in kept]
    before = {score.sample: score.counts for score in unperturbed.samples}
    clean = [before[score.sample] for score in outcome.samples]
    counts = np.array([kept, *(_member_counts(outcome, name) for name in members), clean])
    names = [KEPT, *members, unperturbed.attack]
    chosen = lowest_tvdi(counts)
    return [Point(names[point], counts[point, sample]) for sample, point in enumerate(chosen)]


def figures_of_members(outcome: Outcome, threshold: float) -> dict[str, Any]:
    """For summary.json: what each member reached by itself, and how many samples TVDI takes from whom.

    ``adi`` and ``robust_share`` are over the samples that a member attacked, ``tvdi`` over all samples: of those that
    it was not asked about any more with the image that the ensemble kept.
    """
    members = members_of(outcome)
    if not members:
        return {}
    found: dict[str, Any] = {}
    for name in members:
        dice = [part.dice for _, part in attacked_by(outcome, name)]
        found[name] = {
            "adi": nan_mean(dice),
            "tvdi": tvdi(_member_counts(outcome, name)),
            "robust_share": nan_mean([float(value > threshold) for value in dice]),
            "attacked_samples": len(dice),
        }
    return {"by_attack": found, "tvdi_points": dict(Counter(point.name for point in outcome.points))}


def attacked_by(outcome: Outcome, member: str) -> Iterator[tuple[SampleKey, MemberScore]]:
    """The samples that a member attacked, with what it found."""
    for score in outcome.samples:
        part = score.by_attack[member]
        if part is not None:
            yield score.sample, part


def _member_counts(outcome: Outcome, member: str) -> Array:
    """(n, F, 3) of its own points; of samples that it was not asked about any more, of the image that was kept."""
    found = dict(attacked_by(outcome, member))
    return np.array([found[s.sample].counts if s.sample in found else s.counts for s in outcome.samples])
