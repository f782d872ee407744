"""The choice of points for TVDI: never above any one point throughout, and against all choices where these are few."""

from itertools import product

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nnunet_ima.evaluation.lowest_tvdi import lowest_tvdi
from nnunet_ima.evaluation.metrics import Array, tvdi

seeds, points, samples, classes = st.integers(0, 10**9), st.integers(1, 5), st.integers(1, 12), st.integers(1, 4)
few_points, few_samples, sizes = st.integers(1, 4), st.integers(1, 6), st.sampled_from([2, 6, 40, 1000])


def problem(seed: int, shape: tuple[int, int, int], size: int) -> Array:
    """Counts (P, n, F, 3): the reference of a sample is the same for all its points; classes may be missing."""
    draws = np.random.default_rng(seed)
    reference = draws.integers(0, size, shape[1:])
    reference[0, 0] += 1
    hits = draws.integers(0, np.broadcast_to(reference, shape) + 1)
    false = draws.integers(0, size, shape) * (draws.random(shape) < 0.8)
    return np.stack([hits, false, reference - hits], -1).astype(float)


def reached(counts: Array, choice: np.ndarray) -> float:
    return tvdi(counts[choice, np.arange(counts.shape[1])])


def lowest_of_all(counts: Array) -> float:
    """Slowly and obviously."""
    number, count = counts.shape[:2]
    return min(reached(counts, np.array(choice)) for choice in product(range(number), repeat=count))


@given(seeds, points, samples, classes, sizes)
def test_it_is_never_above_any_point_taken_throughout(seed, number, count, kinds, size):
    counts = problem(seed, (number, count, kinds), size)
    found = reached(counts, lowest_tvdi(counts))
    assert all(found <= tvdi(whole) for whole in counts)


@given(seeds, points, samples, classes, sizes)
def test_no_exchange_of_one_sample_lowers_it(seed, number, count, kinds, size):
    counts = problem(seed, (number, count, kinds), size)
    choice = lowest_tvdi(counts)
    found = reached(counts, choice)
    for sample, point in product(range(count), range(number)):
        other = choice.copy()
        other[sample] = point
        assert reached(counts, other) >= found - 1e-12


@given(seeds, few_points, few_samples, sizes)
def test_with_one_class_it_is_the_lowest_of_all_choices(seed, number, count, size):
    counts = problem(seed, (number, count, 1), size)
    assert reached(counts, lowest_tvdi(counts)) == pytest.approx(lowest_of_all(counts), abs=1e-12)


def test_with_several_classes_it_nearly_always_is():
    draws = np.random.default_rng(0)
    above = []
    for seed in range(300):
        shape = int(draws.integers(2, 5)), int(draws.integers(1, 6)), int(draws.integers(2, 5))
        counts = problem(seed, shape, int(draws.choice([6, 40, 1000])))
        above.append(reached(counts, lowest_tvdi(counts)) - lowest_of_all(counts))
    assert min(above) > -1e-12
    assert np.mean(np.array(above) > 1e-12) <= 0.01
    assert max(above) < 0.01


# In these the samples would be exchanged another way in another order.
@example(180, 2, 6, 3, 6)
@example(187, 4, 3, 3, 40)
@given(seeds, points, samples, classes, sizes)
def test_neither_the_order_of_samples_nor_a_point_twice_matters(seed, number, count, kinds, size):
    counts = problem(seed, (number, count, kinds), size)
    found = reached(counts, lowest_tvdi(counts))
    turned = counts[:, np.random.default_rng(seed).permutation(count)]
    assert reached(turned, lowest_tvdi(turned)) == found
    twice = np.concatenate([counts, counts])
    choice = lowest_tvdi(twice)
    assert reached(twice, choice) == found
    assert (choice < number).all()


@given(seeds, samples, classes)
def test_the_first_point_is_taken_where_no_other_is_better(seed, count, kinds):
    (first,) = problem(seed, (1, count, kinds), 40)
    worse = first.copy()
    worse[..., 1] = np.maximum(worse[..., 1] - 1, 0)
    worse[..., 0] += worse[..., 2]
    worse[..., 2] = 0
    assert lowest_tvdi(np.stack([first, worse, first])).tolist() == [0] * count


def test_what_a_point_is_worth_depends_on_the_other_samples():
    """The lowest Dice of the small sample is dear: many false positives of the other point count in the large one."""
    large = [[50, 50, 50]], [[50, 50, 50]]
    small = [[0, 0, 2]], [[1, 60, 1]]
    counts = np.array([[large[point], small[point]] for point in (0, 1)], float)
    assert tvdi(counts[0, 1:]) < tvdi(counts[1, 1:])
    assert lowest_tvdi(counts).tolist() == [0, 1]
    assert reached(counts, lowest_tvdi(counts)) == pytest.approx(102 / (102 + 110 + 51))


def test_a_class_that_is_nowhere_does_not_count_until_it_is_found():
    """Then its Dice is 0, which lowers the mean: that is how TVDI is defined."""
    absent = [[5, 0, 5], [0, 0, 0]]
    found = [[5, 0, 5], [0, 1, 0]]
    assert lowest_tvdi(np.array([[absent], [found]], float)).tolist() == [1]
    nothing = np.zeros((2, 3, 2, 3))
    assert lowest_tvdi(nothing).tolist() == [0, 0, 0]
    # Nothing to find, and nothing found: undefined, so that a wrong voxel is worth something to the attacker.
    assert lowest_tvdi(np.array([[[[0, 0, 0]]], [[[0, 5, 0]]]], float)).tolist() == [1]
