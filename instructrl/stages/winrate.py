"""Win rates and their 95 % intervals. Pure numpy.

A win rate is the mean over prompts of 1 (its answer is better than the baseline's), .5 (a tie) or 0. Its interval is
the percentile bootstrap over prompts (Efron 1979): prompts are what would be drawn anew, and all models answer the same
ones, so that differences between models are paired. The seed of the random numbers is fixed: a report is the same every
time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES = 2_000
SEED = 20_220_304  # any fixed number
CHUNK = 4_000_000  # entries of an index matrix held at a time


class Interval(NamedTuple):
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def outcomes(scores: ArrayLike, baseline: ArrayLike, tolerance: float = 1e-6) -> NDArray[np.float64]:
    """1, .5 or 0 for each prompt: [N], [N] -> [N]. Scores closer than `tolerance` tie."""
    gap = np.asarray(scores, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    if not np.isfinite(gap).all():
        raise ValueError("a score is not a number")
    return np.where(gap > tolerance, 1.0, np.where(gap < -tolerance, 0.0, 0.5))


def interval(values: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The mean of one value a prompt, and its interval. [N] -> 3 numbers."""
    values = np.asarray(values, dtype=np.float64)
    return ratio(values, np.ones_like(values), samples)


def difference(values: ArrayLike, others: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The difference of two means over the same prompts, and its interval, paired. [N], [N] -> 3 numbers."""
    return interval(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), samples)


def ratio(numerators: ArrayLike, denominators: ArrayLike, samples: int = SAMPLES) -> Interval:
    """sum(numerators) / sum(denominators), as a loss per token over documents. [N], [N] -> 3 numbers."""
    return ratio_difference([(numerators, denominators)], samples)


def ratio_difference(terms: Sequence[tuple[ArrayLike, ArrayLike]], samples: int = SAMPLES) -> Interval:
    """The first ratio minus the second (if there is one), over the same documents, paired."""
    arrays = [tuple(np.asarray(part, dtype=np.float64) for part in term) for term in terms]
    signs = (1.0, -1.0)[: len(arrays)]
    size = len(arrays[0][0])
    if not size or any(len(part) != size for term in arrays for part in term):
        raise ValueError("an interval needs one value or more, and as many of each kind")

    def statistic(index: NDArray | slice) -> NDArray:
        parts = [
            sign * top[index].sum(-1) / bottom[index].sum(-1) for sign, (top, bottom) in zip(signs, arrays, strict=True)
        ]
        return np.sum(parts, axis=0)

    rng = np.random.default_rng(SEED)
    drawn = []
    left = samples
    while left:
        rows = min(left, max(1, CHUNK // size))
        drawn.append(statistic(rng.integers(size, size=(rows, size))))
        left -= rows
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Interval(float(statistic(slice(None))), float(low), float(high))


def average_of_means(groups: Sequence[ArrayLike], samples: int = SAMPLES) -> Interval:
    """The mean of each group's mean, however large the groups; resampled within each group. G x [N_g] -> 3 numbers."""
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    rng = np.random.default_rng(SEED)
    drawn = [group[rng.integers(len(group), size=(samples, len(group)))].mean(-1) for group in arrays]
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    return Interval(float(np.mean([group.mean() for group in arrays])), float(low), float(high))
