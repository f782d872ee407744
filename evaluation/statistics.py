"""How sure a figure is: intervals by resampling cases, and a paired test between two models.

Slices of one case resemble each other, so cases are resampled, and samples only where there are too few cases: these
intervals are then too narrow, which whoever shows them has to say. Only what the choice of the cases does to a figure
is in an interval, not what another training run would.

For an ensemble the counts are of the points that were chosen for TVDI, once, on all samples. Resampling, and swapping
two models, keep that choice: what is resampled is fixed images. An attacker who had only the resampled cases might
choose again and reach a little less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import bootstrap, permutation_test

from nnunet_ima.evaluation.metrics import Array, pooled_dice

RESAMPLES = 2000
# Of each test of several: p of a difference that is as clear as can be is then below 1 % after Holm's correction.
PERMUTATIONS_A_TEST = 200
BATCH = 100  # resamples at once: what they gather takes memory
CONFIDENCE = 0.95
# With fewer, no paired permutation test can reach 5 %, and resampling says next to nothing.
FEWEST = 6


class Interval(NamedTuple):
    """A figure with its 95 % interval; NaN where there is too little to tell."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there was enough to tell."""
        return bool(self.low == self.low)


def units(cases: npt.ArrayLike, counts: Array) -> tuple[str, Array]:
    """What is resampled: ``cases`` with their samples' counts (n, F, 3) added up, or ``samples`` if there are too few.

    Args:
        cases: name of each sample's case.
        counts: (samples, F, 3) of tp, fp, fn.
    """
    names = np.asarray(cases)
    distinct = list(dict.fromkeys(names.tolist()))
    if len(distinct) < FEWEST:
        return "samples", counts
    return "cases", np.stack([counts[names == name].sum(0) for name in distinct])


def dice_sums(cases: npt.ArrayLike, dice: Array) -> Array:
    """What ADI is made of, (units, 1, 2): the sum of the samples' Dice (samples,), and how many there are.

    The units are those of :func:`units`. A sample without Dice (NaN) does not count.
    """
    known = ~np.isnan(dice)
    sums = np.stack([np.where(known, dice, 0.0), known.astype(float)], -1)[:, None]
    return units(cases, sums)[1]


def tvdi_interval(counts: Array, seed: int = 0) -> Interval:
    """Of the TVDI; percentile bootstrap.

    Args:
        counts: (units, F, 3) of tp, fp, fn of each unit, or (levels, units, F, 3) for the mean TVDI over levels.
        seed: of the resampling.
    """
    number = counts.shape[-3]
    value = float(_tvdi(counts, np.arange(number)))
    if number < FEWEST:
        return Interval(value, np.nan, np.nan)
    found = bootstrap(
        (np.arange(number),),
        lambda index, axis: _tvdi(counts, np.moveaxis(index, axis, -1)),
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


class Difference(NamedTuple):
    """One model's figure minus another's on the same units, its interval, and the p-value of a permutation test."""

    interval: Interval
    p: float

    @property
    def clear(self) -> bool:
        """Whether it is hardly chance: the interval is on one side of 0, and p below 5 %."""
        return bool((self.interval.low > 0 or self.interval.high < 0) and self.p < 1 - CONFIDENCE)

    @property
    def opposite(self) -> Difference:
        """Of the other model minus the one."""
        value, low, high = self.interval
        return Difference(Interval(-value, -high, -low), self.p)


def permutations_for(tests: int) -> int:
    """How many swaps a permutation test draws that is one of so many: p cannot be below what their number allows."""
    return max(RESAMPLES, PERMUTATIONS_A_TEST * tests)


def tvdi_difference(one: Array, other: Array, seed: int = 0, permutations: int = RESAMPLES) -> Difference:
    """Of two models on the same units: paired bootstrap, and permutation test that swaps the models' results of a unit.

    Args:
        one, other: (units, F, 3) each, or (levels, units, F, 3) for the mean TVDI over levels.
        seed: of the resampling.
        permutations: drawn at the most for p; all that there are if these are no more.
    """
    return _difference(one, other, _tvdi, seed, permutations)


def adi_difference(one: Array, other: Array, seed: int = 0, permutations: int = RESAMPLES) -> Difference:
    """The same of ADI, from :func:`dice_sums` (units, 1, 2) of each."""
    return _difference(one, other, _adi, seed, permutations)


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p of a family of tests, corrected for the number of them by Holm's step-down method.

    The smallest is multiplied by the number of tests, the next by one less, and so on; none comes out below one that
    was smaller before, nor above 1. Among what then is below 5 %, there is a false one with at most 5 % chance, however
    the tests depend on one another (Holm 1979). NaN, where there was too little to tell, is no test.

    Args:
        p_values: in any order.

    Returns:
        In the same order.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p == p)
    corrected, largest = list(map(float, p_values)), 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[place] = largest
    return corrected


def smallest_p(n_units: int, permutations: int = RESAMPLES) -> float:
    """Below which no permutation test of that many pairs can come.

    Both signs of the most extreme of all 2^n swaps; where not all are tried, of those that are drawn and the given one.
    """
    every = 2.0**n_units
    return 2 / every if every <= permutations else 2 / (permutations + 1)


def _difference(
    one: Array, other: Array, figure: Callable[[Array, np.ndarray], Array], seed: int, permutations: int
) -> Difference:
    if one.shape != other.shape:
        raise ValueError(f"counts of shapes {one.shape} and {other.shape} cannot be paired")
    cases = one.shape[-3]
    value = float(figure(one, np.arange(cases)) - figure(other, np.arange(cases)))
    if cases < FEWEST:
        return Difference(Interval(value, np.nan, np.nan), np.nan)
    both = np.concatenate([one, other], axis=-3)

    def difference(index: np.ndarray, opposite: np.ndarray, axis: int) -> Array:
        ours, theirs = (np.moveaxis(part, axis, -1) for part in (index, opposite))
        return np.asarray(figure(both, ours) - figure(both, theirs))

    pairs = (np.arange(cases), np.arange(cases) + cases)
    interval = bootstrap(
        pairs, difference, n_resamples=RESAMPLES, batch=BATCH, vectorized=True, paired=True,
        confidence_level=CONFIDENCE,
        method="percentile", random_state=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    p = permutation_test(
        pairs, difference, permutation_type="samples", vectorized=True, n_resamples=permutations, batch=BATCH,
        random_state=np.random.default_rng(seed),
    ).pvalue  # fmt: skip
    return Difference(Interval(value, float(interval.low), float(interval.high)), float(p))


def _tvdi(counts: Array, index: np.ndarray) -> Array:
    """TVDI (...,) of the units that ``index`` (..., n) names; of several levels their mean."""
    if counts.ndim == 4:
        return np.asarray(np.mean([_tvdi(level, index) for level in counts], axis=0))
    return pooled_dice(counts[index].sum(-3))


def _adi(sums: Array, index: np.ndarray) -> Array:
    """ADI (...,) of the units that ``index`` (..., n) names."""
    together = sums[index].sum(-3)[..., 0, :]
    total, number = together[..., 0], together[..., 1]
    return np.asarray(np.divide(total, number, out=np.full(number.shape, np.nan), where=number > 0))
