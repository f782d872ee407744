"""Intervals and tests: against the plain definition, and against what must hold for all inputs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_ima.evaluation.metrics import adi, class_scores, tvdi
from nnunet_ima.evaluation.statistics import (
    RESAMPLES,
    adi_difference,
    dice_sums,
    holm,
    permutations_for,
    smallest_p,
    tvdi_difference,
    tvdi_interval,
)


def some_cases(seed: int, cases: int, dice: float, spread: float = 0.1) -> np.ndarray:
    """Counts of cases whose Dice lie around a value, of two classes."""
    draws = np.random.default_rng(seed)
    size = draws.integers(200, 1000, (cases, 2))
    hits = (size * np.clip(draws.normal(dice, spread, (cases, 2)), 0, 1)).astype(int)
    return np.stack([hits, size - hits, size - hits], -1).astype(float)


@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0.05, 0.95))
def test_the_value_is_the_tvdi_and_lies_in_its_interval(seed, cases, dice):
    counts = some_cases(seed, cases, dice)
    interval = tvdi_interval(counts)
    assert interval.value == pytest.approx(tvdi(counts))
    assert interval.known == (cases >= 6)
    if interval.known:
        # Pooled, a class lies between its lowest and highest case; the mean of the classes then does too.
        by_class = class_scores(counts[..., 0], counts[..., 1], counts[..., 2])
        assert by_class.min(0).mean() - 1e-9 <= interval.low <= interval.high <= by_class.max(0).mean() + 1e-9
        assert interval == tvdi_interval(counts)


def test_the_interval_is_that_of_a_slow_bootstrap():
    counts = some_cases(1, 20, 0.7)
    draws = np.random.default_rng(3)
    values = [tvdi(counts[draws.integers(0, 20, 20)]) for _ in range(4000)]
    low, high = np.percentile(values, [2.5, 97.5])
    interval = tvdi_interval(counts)
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """95 % of 200, give or take what 200 draws scatter; resampling so few cases is known to be a little narrow."""
    truth = tvdi(some_cases(0, 20_000, 0.7))
    intervals = [tvdi_interval(some_cases(seed, 30, 0.7)) for seed in range(1, 201)]
    inside = sum(interval.low <= truth <= interval.high for interval in intervals)
    assert 178 <= inside <= 199


@given(st.integers(0, 10**6), st.integers(6, 12))
def test_a_model_does_not_differ_from_itself(seed, cases):
    counts = some_cases(seed, cases, 0.6)
    found = tvdi_difference(counts, counts)
    assert tuple(found.interval) == (0, 0, 0)
    assert found.p == 1


@given(st.integers(0, 10**6), st.integers(6, 14), st.floats(0.1, 0.9), st.floats(0.1, 0.9))
def test_the_other_way_round_is_the_opposite(seed, cases, one, other):
    first, second = some_cases(seed, cases, one), some_cases(seed + 1, cases, other)
    there, back = tvdi_difference(first, second), tvdi_difference(second, first)
    assert there.interval.value == pytest.approx(-back.interval.value)
    assert there.interval.low == pytest.approx(-back.interval.high, abs=0.02)
    assert there.p == pytest.approx(back.p, abs=0.05)


def test_pairing_finds_what_unpaired_cases_would_hide():
    """Cases differ much more than models do: one model is always two points better."""
    hard_and_easy = some_cases(5, 40, 0.6, spread=0.25)
    better = hard_and_easy.copy()
    gain = 0.02 * better.sum(-1)
    better[..., 0] += gain
    better[..., 1:] = np.maximum(better[..., 1:] - gain[..., None], 0)
    found = tvdi_difference(better, hard_and_easy)
    assert found.interval.low > 0
    assert found.p < 0.01
    one, other = tvdi_interval(better), tvdi_interval(hard_and_easy)
    assert one.low < other.high  # apart they overlap


def test_without_a_difference_a_small_p_is_rare():
    p = []
    for seed in range(100):
        both = some_cases(seed, 15, 0.7)
        noise = np.random.default_rng(seed).random(15) < 0.5
        other = some_cases(seed + 1000, 15, 0.7)
        p.append(tvdi_difference(np.where(noise[:, None, None], both, other),
                                 np.where(noise[:, None, None], other, both)).p)  # fmt: skip
    assert sum(value < 0.05 for value in p) <= 12
    assert sum(value > 0.5 for value in p) >= 30


def test_a_class_that_never_occurs_does_not_count():
    counts = some_cases(2, 6, 0.8)
    counts[:, 1] = 0
    assert tvdi_interval(counts).value == pytest.approx(tvdi(counts[:, :1]))
    assert tvdi_interval(counts).known


@given(st.integers(0, 10**6), st.integers(6, 10), st.integers(1, 4))
def test_the_mean_over_levels_is_that_of_the_levels(seed, cases, levels):
    one, other = (np.stack([some_cases(seed + 100 * n + which, cases, 0.5) for n in range(levels)]) for which in (0, 7))
    found = tvdi_difference(one, other)
    wanted = np.mean([tvdi(a) - tvdi(b) for a, b in zip(one, other, strict=True)])
    assert found.interval.value == pytest.approx(wanted)
    if levels == 1:
        assert found == tvdi_difference(one[0], other[0])


def test_cases_and_not_levels_are_swapped():
    """Ten levels that say the same of six cases say no more than one level."""
    one, other = some_cases(3, 6, 0.8), some_cases(4, 6, 0.5)
    assert tvdi_difference(np.stack([one] * 10), np.stack([other] * 10)).p == tvdi_difference(one, other).p


def test_other_cases_cannot_be_paired():
    with pytest.raises(ValueError, match="cannot be paired"):
        tvdi_difference(some_cases(0, 4, 0.5), some_cases(0, 5, 0.5))


# ---- the mean over levels, and ADI


def test_the_interval_of_a_mean_over_levels_is_that_of_a_slow_bootstrap():
    """The same cases are drawn for all levels: they are the same scans."""
    levels = np.stack([some_cases(1, 20, dice) for dice in (0.8, 0.4)])
    draws = np.random.default_rng(3)
    drawn = [draws.integers(0, 20, 20) for _ in range(4000)]
    values = [np.mean([tvdi(level[index]) for level in levels]) for index in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    interval = tvdi_interval(levels)
    assert interval.value == pytest.approx(np.mean([tvdi(level) for level in levels]))
    assert interval.low == pytest.approx(low, abs=0.004)
    assert interval.high == pytest.approx(high, abs=0.004)


def some_dice(seed: int, cases: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples of cases of different length: names, and the Dice of two models; a few have none."""
    draws = np.random.default_rng(seed)
    names = np.repeat([f"case {number}" for number in range(cases)], draws.integers(1, 6, cases))
    one, other = (np.clip(draws.normal(middle, 0.2, len(names)), 0, 1) for middle in (0.7, 0.6))
    first_of_its_case = np.r_[True, names[1:] != names[:-1]]
    one[(draws.random(len(names)) < 0.2) & ~first_of_its_case] = np.nan
    return names, one, other


@given(st.integers(0, 10**6), st.integers(6, 14))
def test_the_difference_of_adi_is_that_of_the_means_of_the_samples(seed, cases):
    names, one, other = some_dice(seed, cases)
    found = adi_difference(dice_sums(names, one), dice_sums(names, other))
    assert found.interval.value == pytest.approx(adi(one) - adi(other))
    assert found.interval.low <= found.interval.high


def test_the_interval_of_a_difference_of_adi_is_that_of_a_slow_bootstrap_of_cases():
    names, one, other = some_dice(4, 25)
    distinct = list(dict.fromkeys(names))
    draws = np.random.default_rng(5)
    values = []
    for _ in range(4000):
        drawn = [np.flatnonzero(names == distinct[number]) for number in draws.integers(0, 25, 25)]
        index = np.concatenate(drawn)
        values.append(adi(one[index]) - adi(other[index]))
    low, high = np.percentile(values, [2.5, 97.5])
    interval = adi_difference(dice_sums(names, one), dice_sums(names, other)).interval
    assert interval.low == pytest.approx(low, abs=0.006)
    assert interval.high == pytest.approx(high, abs=0.006)


@pytest.mark.parametrize("cases", [6, 7, 9])
def test_no_p_is_below_the_smallest_and_a_clear_difference_reaches_it(cases):
    """All cases differ in the same direction: only the swaps of none and of all are as extreme."""
    worse, better = some_cases(7, cases, 0.3, spread=0.01), some_cases(7, cases, 0.8, spread=0.01)
    assert tvdi_difference(better, worse).p == pytest.approx(smallest_p(cases)) == 2 / 2**cases


@pytest.mark.parametrize(("cases", "tests"), [(11, 1), (12, 1), (20, 1), (20, 55), (12, 55), (13, 55), (16, 190)])
def test_no_number_of_tests_makes_a_clear_difference_of_enough_cases_chance(cases, tests):
    """Of random swaps, too, p cannot be below what their number allows; the more tests, the more swaps are drawn."""
    worse, better = some_cases(7, cases, 0.3, spread=0.01), some_cases(7, cases, 0.8, spread=0.01)
    least = smallest_p(cases, permutations_for(tests))
    found = tvdi_difference(better, worse, permutations=permutations_for(tests)).p
    assert least <= found <= 2.5 * least
    assert tests * least < (0.011 if cases > 13 else 0.03)
    # 2,000 of them, as before, would leave none of 55 below 5 %.
    assert permutations_for(1) == RESAMPLES == 2000
    assert 55 * smallest_p(20, RESAMPLES) > 0.05


def test_holm_is_what_the_definition_says_of_an_example():
    """Holm 1979: .01, .02, .03, .04 are multiplied by 4, 3, 2, 1, and never fall below one before."""
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_test_rejects(p_values):
    """Step down: the k-th smallest of n is rejected while it is at most 5 % / (n - k + 1)."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = set()
    for rank, place in enumerate(order):
        if (len(p_values) - rank) * p_values[place] > 0.05:
            break
        rejected.add(place)
    corrected = holm(p_values)
    assert {place for place, p in enumerate(corrected) if p <= 0.05} == rejected
    assert all(own <= p <= 1 for own, p in zip(p_values, corrected, strict=True))


def test_what_is_no_test_does_not_count():
    found = holm([0.01, float("nan"), 0.04])
    assert np.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.04])
