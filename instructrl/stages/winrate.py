"""Win rates and their 95 % intervals. Pure numpy.

A win rate is the mean over prompts of 1 (its answer is better than the baseline's), .5 (a tie) or 0. All intervals are
bootstraps over prompts: prompts are what would be drawn anew, and all models answer the same ones, so that differences
between models are paired. The seed of the random numbers is fixed: a report is the same every time.

Means without bounds (lengths, rewards, losses) have the percentile bootstrap (Efron 1979). For win rates and other
shares it fails where a model nearly always wins or loses: the resamples of twenty losses are all twenty losses, an
interval of no width, which covers a true win rate of .02 in a third of all studies. Shares have the Bayesian bootstrap
(Rubin 1981), with half an observation of either extreme added. Of values that are 0 or 1 that is Jeffreys' interval,
which Brown, Cai and DasGupta (2001, doi.org/10.1214/ss/1009213286) recommend for small n; ties and means of several
labels need nothing further. `tests/test_winrate.py` has the coverage of both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

SAMPLES = 2_000
SEED = 20_220_304  # any fixed number
CHUNK = 4_000_000  # entries of an index matrix held at a time
PRIOR = 0.5  # observations of either extreme that a share's interval adds (Jeffreys)


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


def decided(outcomes: NDArray[np.float64], *others: ArrayLike) -> tuple[NDArray[np.float64], ...]:
    """The outcomes that are not nan (no verdict), and what else belongs to their prompts. [N] each -> [M] each."""
    there = ~np.isnan(outcomes)
    return outcomes[there], *(np.asarray(values, dtype=np.float64)[there] for values in others)


def interval(values: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The mean of one value a prompt, and its interval. [N] -> 3 numbers."""
    values = np.asarray(values, dtype=np.float64)
    return ratio(values, np.ones_like(values), samples)


def difference(values: ArrayLike, others: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The difference of two means over the same prompts, and its interval, paired. [N], [N] -> 3 numbers."""
    return interval(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), samples)


def share(values: ArrayLike, samples: int = SAMPLES, low: float = 0.0, high: float = 1.0) -> Interval:
    """The mean of values between `low` and `high`, one a prompt, and its interval. [N] -> 3 numbers."""
    values = np.asarray(values, dtype=np.float64)
    if not values.size or not ((values >= low) & (values <= high)).all():
        raise ValueError(f"a share needs one value or more, each between {low:g} and {high:g}")
    kinds, counts = np.unique(np.concatenate([[low, high], values]), return_counts=True)
    counts = counts.astype(np.float64)
    counts[[0, -1]] -= 1 - PRIOR
    rng = np.random.default_rng(SEED)
    drawn = []
    left = samples
    while left:
        rows = min(left, max(1, CHUNK // len(kinds)))
        weights = rng.standard_gamma(counts, size=(rows, len(kinds)))  # normalized: a draw of Dirichlet(counts)
        drawn.append(weights @ kinds / weights.sum(-1))
        left -= rows
    mean = float(values.mean())
    ends = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Interval(mean, min(float(ends[0]), mean), max(float(ends[1]), mean))  # all lost: from 0 on


def share_difference(values: ArrayLike, others: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The difference of two shares over the same prompts, and its interval, paired. [N], [N] -> 3 numbers."""
    return share(np.asarray(values, dtype=np.float64) - np.asarray(others, dtype=np.float64), samples, -1.0, 1.0)


def mirrored(rate: Interval) -> Interval:
    """The win rate of the other of two models."""
    return Interval(1 - rate.mean, 1 - rate.high, 1 - rate.low)


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
