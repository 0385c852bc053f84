"""Win rates by hand, and intervals that cover the truth as often as they say."""

import itertools

import numpy as np
import pytest

from instructrl.stages.winrate import (
    Interval,
    difference,
    interval,
    mirrored,
    outcomes,
    ratio,
    ratio_difference,
    share,
    share_difference,
)


def test_outcomes_by_hand():
    assert outcomes([2, 1, 0, 1 + 1e-9], [1, 1, 1, 1]).tolist() == [1, 0.5, 0, 0.5]
    with pytest.raises(ValueError, match="not a number"):
        outcomes([1, float("nan")], [1, 1])


def test_win_rates_of_two_models_against_each_other_sum_to_one():
    rng = np.random.default_rng(0)
    scores, others = rng.integers(5, size=(2, 300))
    assert outcomes(scores, others).mean() + outcomes(others, scores).mean() == 1


def test_interval_of_a_small_case_is_the_exact_bootstrap():
    """All n^n resamples of four values, against the drawn ones."""
    values = np.array([0.0, 0.2, 0.5, 1.0])
    exact = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    found = interval(values, samples=20_000)
    assert found.mean == pytest.approx(0.425)
    assert found.low == pytest.approx(np.percentile(exact, 2.5, method="inverted_cdf"))
    assert found.high == pytest.approx(np.percentile(exact, 97.5, method="inverted_cdf"))


def test_intervals_are_the_same_every_time_and_shrink_with_the_root_of_n():
    values = np.random.default_rng(1).random(4_000)
    assert interval(values) == interval(values)
    few, many = interval(values[:250]), interval(values)
    assert (few.high - few.low) / (many.high - many.low) == pytest.approx(4, rel=0.15)
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def covered(found, truth):
    """The share of intervals in which the truth lies."""
    return np.mean([low <= truth <= high for _, low, high in found])


@pytest.mark.parametrize("prompts", [50, 512])
@pytest.mark.parametrize(("loss", "tie"), [(0.4, 0.0), (0.3, 0.3), (0.85, 0.05), (0.05, 0.7)])
def test_coverage_of_the_win_rate(loss, tie, prompts):
    """Of 1,000 studies with a simulated judge, the intervals of 93 to 97 % hold the true win rate."""
    rng = np.random.default_rng(2)
    draws = rng.choice([0.0, 0.5, 1.0], p=[loss, tie, 1 - loss - tie], size=(1_000, prompts))
    assert 0.93 <= covered([share(study) for study in draws], 1 - loss - tie / 2) <= 0.97


@pytest.mark.parametrize(("win", "prompts"), [(0.02, 20), (0.06, 20), (0.97, 50)])
def test_coverage_where_a_model_nearly_always_wins_or_loses(win, prompts):
    """A count has few possible values there, so no interval covers exactly 95 %. The percentile bootstrap fails."""
    rng = np.random.default_rng(3)
    draws = (rng.random((1_000, prompts)) < win).astype(float)
    found = covered([share(study) for study in draws], win)
    assert found >= 0.93
    assert covered([interval(study, samples=200) for study in draws[:300]], win) < min(0.91, found)


def test_coverage_of_labels_that_are_means_and_of_differences():
    """Two judgements a prompt, in shared and in own noise: quarters; and two models against the same third."""
    rng = np.random.default_rng(4)
    chance = rng.beta(2, 1, size=(1_000, 100))  # of a win, which differs by prompt; mean 2/3
    one, other = ((rng.random((2, *chance.shape)) < chance).mean(0) for _ in range(2))
    assert 0.93 <= covered([share(study) for study in one], 2 / 3) <= 0.97
    worse = other * (rng.random(chance.shape) < 0.8)
    gaps = [share_difference(ours, theirs) for ours, theirs in zip(one, worse, strict=True)]
    assert 0.93 <= covered(gaps, 2 / 3 * 0.2) <= 0.97


def test_a_share_of_zeros_and_ones_has_jeffreys_interval():
    """The 2.5 and 97.5 % points of Beta(3.5, 17.5) and Beta(.5, 20.5), as tables print them (Brown et al. 2001)."""
    found = share([1.0] * 3 + [0.0] * 17, samples=200_000)
    assert found.mean == pytest.approx(0.15)
    assert (found.low, found.high) == pytest.approx((0.0442, 0.3481), abs=1.5e-3)
    none = share(np.zeros(20), samples=200_000)
    assert (none.mean, none.low) == (0, 0)
    assert none.high == pytest.approx(0.1168, abs=1.5e-3)
    assert mirrored(none) == (1, 1 - none.high, 1)


def test_a_share_is_of_values_between_its_ends():
    with pytest.raises(ValueError, match="each between 0 and 1"):
        share([0.5, 1.1])
    with pytest.raises(ValueError, match="one value or more"):
        share([])


def test_a_difference_is_paired():
    """Two models that differ on few prompts: pairing takes the noise that they share out of the interval."""
    rng = np.random.default_rng(3)
    one = rng.integers(2, size=500).astype(float)
    other = one.copy()
    other[:10] = 1 - other[:10]
    found = difference(one, other)
    assert found.mean == pytest.approx(one.mean() - other.mean())
    assert found.high - found.low < 0.3 * (interval(one).high - interval(one).low)
    covers = []
    for _ in range(300):
        shared = rng.normal(size=100)
        gap = difference(shared + rng.normal(0.1, 0.5, size=100), shared, samples=400)
        covers.append(gap.low <= 0.1 <= gap.high)
    assert np.mean(covers) == pytest.approx(0.95, abs=0.04)


def test_a_loss_per_token_weighs_documents_by_their_tokens():
    losses, tokens = [10.0, 1.0], [10, 1]
    assert ratio(losses, tokens).mean == 1.0
    assert ratio([10.0, 4.0], [10, 1]).mean == pytest.approx(14 / 11)
    found = ratio_difference([([10.0, 4.0], [10, 1]), ([10.0, 1.0], [10, 1])])
    assert found.mean == pytest.approx(3 / 11)
    rng = np.random.default_rng(4)
    tokens = rng.integers(5, 50, size=200)
    better = tokens * 1.0 + rng.normal(size=200)
    gap = ratio_difference([(better + 0.1 * tokens, tokens), (better, tokens)])
    assert (gap.mean, gap.low, gap.high) == pytest.approx((0.1, 0.1, 0.1))


def test_nothing_has_no_interval():
    with pytest.raises(ValueError, match="one value or more"):
        interval([])
