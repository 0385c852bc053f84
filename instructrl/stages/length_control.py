"""Win rates at equal length: what a model would win if its answers were as long as the baseline's. Pure numpy.

Judges, people among them, like long answers, and training against a reward model makes answers longer (Singhal et al.
2023, arXiv 2310.03716). Dubois et al. (2024, arXiv 2404.04475) therefore regress the outcome on the difference of the
lengths, and read off what the regression says where there is none:

    P(win) = sigmoid(theta + phi * tanh(difference / std(differences))),   win rate at equal length = sigmoid(theta).

Their third term, the difficulty of each prompt, is estimated from a leaderboard of many models; there is none here, so
it is left out. Lengths are in tokens (theirs in characters); a tie is half a win.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from instructrl.stages.winrate import CHUNK, PRIOR, SAMPLES, SEED, Interval

STEPS = 60  # of Newton's method, which needs five to ten unless one side wins nearly all
LONGEST_STEP = 2.0
ADDED = np.array([(0, 1), (0, 0), (1, 1), (1, 0), (-1, 1), (-1, 0)], dtype=np.float64)
"""(x, outcome) of the observations that the interval adds: at equal length what `winrate.share` adds, and the same in
favour of no effect of length."""
WEIGHTS = np.array([1, 1, 0.5, 0.5, 0.5, 0.5]) * PRIOR
IN_ESTIMATE = 0.1  # of these weights, so that the estimate exists where one side, or the longer answer, wins all


def length_controlled(outcomes: ArrayLike, lengths: ArrayLike, others: ArrayLike, samples: int = SAMPLES) -> Interval:
    """The win rate at equal length and its interval. [N] outcomes, [N] and [N] lengths -> 3 numbers.

    The interval is the Bayesian bootstrap of `winrate.share`, here of the whole regression.
    """
    won = np.asarray(outcomes, dtype=np.float64)
    x = feature(np.asarray(lengths, dtype=np.float64) - np.asarray(others, dtype=np.float64))
    x, won = np.concatenate([x, ADDED[:, 0]]), np.concatenate([won, ADDED[:, 1]])
    data = np.ones(len(x) - len(ADDED))
    mean = float(sigmoid(fit(x, won, np.concatenate([data, IN_ESTIMATE * WEIGHTS])[None])[0, 0]))
    counts = np.concatenate([data, WEIGHTS])
    rng = np.random.default_rng(SEED)
    drawn = []
    left = samples
    while left:
        rows = min(left, max(1, CHUNK // len(x)))
        drawn.append(fit(x, won, rng.standard_gamma(counts, size=(rows, len(x))))[:, 0])
        left -= rows
    low, high = np.percentile(sigmoid(np.concatenate(drawn)), [2.5, 97.5])
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def feature(differences: NDArray[np.float64]) -> NDArray[np.float64]:
    """tanh(difference / their standard deviation), so that a few very long answers do not decide. [N] -> [N]."""
    spread = differences.std()
    return np.tanh(differences / spread) if spread else np.sign(differences)


def fit(x: NDArray[np.float64], won: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Maximum likelihood of (theta, phi) by Newton's method. [N], [N], [S, N] weights -> [S, 2]."""
    found = np.zeros((len(weights), 2))
    for _ in range(STEPS):
        chance = sigmoid(found[:, :1] + found[:, 1:] * x)
        residual = weights * (won - chance)
        curvature = weights * chance * (1 - chance)
        up = np.stack([residual.sum(-1), residual @ x], axis=-1)
        a, b, c = curvature.sum(-1) + 1e-12, curvature @ x, curvature @ (x * x) + 1e-12
        step = np.stack([c * up[:, 0] - b * up[:, 1], a * up[:, 1] - b * up[:, 0]], axis=-1) / (a * c - b * b)[:, None]
        step *= np.minimum(1, LONGEST_STEP / np.maximum(np.abs(step).max(-1, keepdims=True), 1e-12))
        found += step
        if np.abs(step).max() < 1e-8:
            break
    return found


def sigmoid(value: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(0.5 * value))
