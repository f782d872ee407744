"""Scores of cases: distances between surfaces beside a slow, obvious reference, and structures that are gone."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from nnunet_ima.evaluation.metrics import (
    SURFACE_TOLERANCE_MM,
    CaseScore,
    count_hd95,
    mean_hd95,
    mean_surface_dice,
    score_case,
)
from nnunet_ima.evaluation.outcomes import CLEAN, Condition
from nnunet_ima.evaluation.records import Records

# No sum of their squares' multiples is within rounding of the tolerance, but for those that are it exactly.
SPACINGS = st.tuples(*[st.sampled_from([0.5, 0.7, 1.3, 2.5])] * 3)
SHAPES = st.one_of(st.tuples(*[st.integers(2, 6)] * 3), st.tuples(st.just(1), st.integers(2, 9), st.integers(2, 9)))


def surface(mask: np.ndarray) -> list[tuple[int, ...]]:
    """Voxels with a neighbour outside, along the axes that there are more than one voxel of."""
    axes = [axis for axis, size in enumerate(mask.shape) if size > 1]
    found = []
    for place in zip(*np.nonzero(mask), strict=True):
        for axis in axes:
            for step in (-1, 1):
                beside = list(place)
                beside[axis] += step
                inside = 0 <= beside[axis] < mask.shape[axis] and mask[tuple(beside)]
                if not inside and place not in found:
                    found.append(place)
    return found


def distances(of: list, to: list, spacing: tuple[float, ...]) -> list[float]:
    return [
        min(math.sqrt(sum((s * (a - b)) ** 2 for s, a, b in zip(spacing, one, other, strict=True))) for other in to)
        for one in of
    ]


def reference(found: np.ndarray, truth: np.ndarray, spacing: tuple[float, ...]) -> tuple[float, float]:
    """HD95 and surface Dice."""
    one, other = surface(found), surface(truth)
    if not one or not other:
        return math.nan, 0.0 if one or other else math.nan
    there, back = distances(one, other, spacing), distances(other, one, spacing)
    near = sum(distance <= SURFACE_TOLERANCE_MM for distance in there + back)
    return max(np.percentile(there, 95), np.percentile(back, 95)), near / len(there + back)


@given(st.data(), SHAPES, SPACINGS)
def test_distances_are_those_between_voxels_of_the_surfaces(data, shape, spacing):
    masks = [data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, 1))) for _ in range(2)]
    # Not only specks.
    masks = [np.maximum(mask, np.roll(mask, 1, 1)) for mask in masks]
    score = score_case(masks[0], masks[1], [1], None, spacing)
    hd95, share = reference(masks[0], masks[1], spacing)
    assert score.hd95[0] == pytest.approx(hd95, rel=1e-5, nan_ok=True)
    assert score.surface_dice[0] == pytest.approx(share, rel=1e-5, nan_ok=True)


def test_the_surface_of_a_single_slice_is_its_contour():
    """A disc that grows by a ring of pixels: inside, nothing is surface."""
    y, x = np.mgrid[:41, :41] - 20
    small, large = ((y**2 + x**2 <= radius**2).astype(np.uint8)[None] for radius in (10, 14))
    score = score_case(small, large, [1], None, (999.0, 1.0, 1.0))
    assert score.hd95[0] == pytest.approx(4, abs=0.6)
    assert score.surface_dice == (0.0,)


def test_a_structure_that_is_gone_or_made_up_has_the_surface_dice_0():
    something, nothing = np.zeros((5, 6, 7), np.uint8), np.zeros((5, 6, 7), np.uint8)
    something[1:3, 2:4, 2:5] = 1
    for found, truth in ((nothing, something), (something, nothing)):
        score = score_case(found, truth, [1], None, (1.0, 1.0, 1.0))
        assert score.surface_dice == (0.0,)
        assert score.dice == (0.0,)
        assert math.isnan(score.hd95[0])
    score = score_case(nothing, nothing, [1], None, (1.0, 1.0, 1.0))
    assert all(math.isnan(values[0]) for values in (score.dice, score.hd95, score.surface_dice))


def test_a_model_that_loses_nine_of_ten_is_not_shown_with_the_tenth():
    lost, kept = CaseScore((0.0,), (math.nan,), (0.0,)), CaseScore((0.9,), (1.5,), (0.95,))
    neither = CaseScore((math.nan,), (math.nan,), (math.nan,))
    scores = [*[lost] * 9, kept, neither]
    assert mean_surface_dice(scores) == pytest.approx(0.095)
    assert mean_hd95(scores) == 1.5
    assert count_hd95(scores) == (1, 10)
    assert count_hd95([]) == (0, 0)


def test_what_is_ignored_makes_no_surface():
    truth = np.zeros((4, 5, 6), np.uint8)
    truth[1:3, 1:3, 1:3], truth[3] = 1, 2
    found = (truth > 0).astype(np.uint8)
    score = score_case(found, truth, [1], 2, (1.0, 1.0, 1.0))
    assert (score.dice, score.hd95, score.surface_dice) == ((1.0,), (0.0,), (1.0,))


def test_records_of_before_tell_which_structures_were_gone(tmp_path):
    """They hold no surface Dice where one of the segmentations is empty."""
    clean = Condition(CLEAN, None)
    records = Records(tmp_path / "part", [clean], "")
    with records.writing():
        records.add_case(clean, "old", CaseScore((0.0, math.nan, 0.8), (math.nan, math.nan, 2.0),
                                                 (math.nan, math.nan, 0.7)))  # fmt: skip
    (read,) = Records(tmp_path / "part", [clean], "").cases[clean].values()
    assert read.surface_dice[0] == 0.0
    assert math.isnan(read.surface_dice[1])
    assert read.surface_dice[2] == 0.7
