"""Best-of-n by brute force over all subsets, a bandit whose truth is known, and gains among answers of like length."""

import itertools
import math

import numpy as np
import pytest

from instructrl.stages import overoptimisation
from instructrl.stages.overoptimisation import Point
from instructrl.trainers.selection import kl_bound


def brute_force(n, proxy, scores):
    """Every subset of n answers; of its best by `proxy` the mean score."""
    means = []
    for subset in itertools.combinations(range(len(proxy)), n):
        highest = max(proxy[i] for i in subset)
        means.append(np.mean([scores[i] for i in subset if proxy[i] == highest]))
    return np.mean(means)


@pytest.mark.parametrize("drawn", [1, 2, 5, 8])
def test_best_of_n_is_the_mean_over_all_subsets(drawn):
    rng = np.random.default_rng(drawn)
    distinct = rng.normal(size=(6, drawn)), rng.normal(size=(6, drawn))
    tied = rng.integers(3, size=(6, drawn)), rng.normal(size=(6, drawn))
    equal = np.zeros((6, drawn)), rng.normal(size=(6, drawn))
    for proxy, scores in (distinct, tied, equal):
        for n in range(1, drawn + 1):
            expected = [brute_force(n, *row) for row in zip(proxy, scores, strict=True)]
            np.testing.assert_allclose(overoptimisation.best_of(n, proxy, scores), expected, atol=1e-12)
    for n in (0, drawn + 1):
        with pytest.raises(ValueError, match=f"n={n}: of {drawn} answers"):
            overoptimisation.best_of(n, *distinct)


def test_the_sizes_of_best_of_n():
    assert overoptimisation.sizes(1) == [1]
    assert overoptimisation.sizes(8) == [1, 2, 4, 8]
    assert overoptimisation.sizes(12) == [1, 2, 4, 8, 12]


# ---- a bandit: one prompt, nine answers; the proxy prefers ever longer ones, the gold preference those in the middle

ARMS = np.arange(9)
PROXY, GOLD = ARMS / 4 - 1.0, 1.0 - ((ARMS - 5) / 3.0) ** 2
START = np.exp(-0.8 * ARMS) / np.exp(-0.8 * ARMS).sum()


def best_of_n_policy(n):
    """Of n answers drawn from START the one with the highest proxy: exact."""
    below = np.concatenate([[0.0], np.cumsum(START)])
    return below[1:] ** n - below[:-1] ** n


def tilted(beta):
    """What PPO with this KL coefficient goes to: the maximum of E[proxy] - beta KL."""
    weights = START * np.exp(PROXY / beta)
    return weights / weights.sum()


def kl(policy):
    used = policy > 0
    return float((policy[used] * np.log(policy[used] / START[used])).sum())


def test_the_estimate_of_a_bandits_best_of_n_is_its_expectation():
    """From 8 answers to each of 10,000 prompts that are all the same: the exact value is within its error."""
    drawn = np.random.default_rng(0).choice(ARMS, p=START, size=(10_000, 8))
    rows = overoptimisation.best_of_n(PROXY[drawn], GOLD[drawn], samples=50)
    assert [row["n"] for row in rows] == [1, 2, 4, 8]
    for row in rows:
        policy = best_of_n_policy(row["n"])
        for key, values in (("proxy", PROXY), ("judge", GOLD)):
            assert row[key][0] == pytest.approx(float(policy @ values), abs=0.03)
        assert row["kl_bound"] == kl_bound(row["n"]) == pytest.approx(row["distance"] ** 2)
        assert kl(policy) <= row["kl_bound"] + 1e-12


def test_a_bandit_is_over_optimised_where_its_gold_score_turns():
    """Ever smaller KL coefficients: the proxy rises to the end, the gold score has its maximum on the way."""
    policies = [START, *(tilted(beta) for beta in (1.0, 0.5, 0.3, 0.2, 0.1))]
    exact = [float(policy @ GOLD) for policy in policies]
    turn = int(np.argmax(exact))
    assert 0 < turn < len(policies) - 1
    rng, points = np.random.default_rng(1), []
    for step, policy in enumerate(policies):
        arms = rng.choice(ARMS, p=policy, size=20_000)
        points.append(Point(step, arms, PROXY[arms], np.log(policy[arms] / START[arms]), GOLD[arms]))
    rows = overoptimisation.curve(points, batch_size=64, baseline=points[0].judge, samples=50)
    for row, policy, gold in zip(rows, policies, exact, strict=True):
        assert row["episodes"] == 64 * row["step"]
        assert row["distance"] ** 2 == pytest.approx(kl(policy), abs=0.05)
        assert row["judge"][1] - 0.02 <= gold <= row["judge"][2] + 0.02
        assert row["length"] == pytest.approx(float(policy @ ARMS), abs=0.1)
    assert [row["proxy"][0] for row in rows] == sorted(row["proxy"][0] for row in rows)
    assert rows[0]["win_rate"] == pytest.approx([0.5, 0.5, 0.5], abs=1e-3)
    assert overoptimisation.best(points, "judge").iteration == turn
    assert overoptimisation.best(points, "proxy").iteration == len(policies) - 1


def test_a_judge_that_scores_nothing_leaves_the_rewards():
    point = Point(4, [3, 5], [0.5, 1.5], [-0.1, -0.3], None)
    [row] = overoptimisation.curve([point], 16, None, 100)
    assert (row["judge"], row["win_rate"]) == (None, None)
    assert (row["proxy"][0], row["kl"], row["distance"], row["length"]) == (1.0, pytest.approx(-0.2), 0.0, 4.0)
    assert overoptimisation.best_of_n([[0.0, 1.0]], None, 100)[1]["judge"] is None


# ---- length


def test_buckets_hold_about_as_many_answers_each():
    assert overoptimisation.buckets(range(1, 11)) == [(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)]
    assert overoptimisation.buckets([3] * 10, [3, 3]) == [(3, 3)]
    assert overoptimisation.buckets([0, 0, 0, 0, 9], [0, 0, 0, 0, 2]) == [(0, 0), (1, 9)]


def by_hand(ranges, policy, baseline):
    """The gain in each range and their mean by the answers in them, one answer at a time."""
    gains, shares = [], []
    for low, high in ranges:
        ours = [r for length, r in zip(*policy, strict=True) if low <= length <= high]
        theirs = [r for length, r in zip(*baseline, strict=True) if low <= length <= high]
        gains.append(sum(ours) / len(ours) - sum(theirs) / len(theirs))
        shares.append(len(ours) + len(theirs))
    return gains, sum(g * s for g, s in zip(gains, shares, strict=True)) / sum(shares)


def test_gains_among_answers_of_like_length():
    rng = np.random.default_rng(2)
    short, long = rng.integers(1, 30, 500), rng.integers(10, 40, 500)
    policy, baseline = (long, rng.normal(0.3, 1, 500)), (short, rng.normal(0, 1, 500))
    ranges = [(1, 14), (15, 24), (25, 40)]
    found, within = overoptimisation.length_gains(ranges, policy, baseline, 500)
    gains, mean = by_hand(ranges, policy, baseline)
    assert [each.mean for each in found] == pytest.approx(gains)
    assert within.mean == pytest.approx(mean)
    assert all(each.low < each.mean < each.high for each in (*found, within))


def test_a_reward_for_length_alone_gains_nothing_among_like_lengths():
    """Singhal et al.'s worst case: all of the gain is length."""
    rng = np.random.default_rng(3)
    short, long = rng.choice([5, 10, 15], 600, p=[0.5, 0.3, 0.2]), rng.choice([5, 10, 15], 600, p=[0.2, 0.3, 0.5])
    rows, whole = overoptimisation.by_length({"ppo": (long, long / 10)}, (short, short / 10), 200)
    assert [row["bucket"] for row in rows] == ["5 tokens", "6-10 tokens", "11-15 tokens"]
    assert [row["gain"]["ppo"] for row in rows] == [pytest.approx([0, 0, 0], abs=1e-12)] * 3
    assert sum(row["n"]["ppo"] for row in rows) == sum(row["n"]["sft"] for row in rows) == 600
    assert whole["ppo"]["gain"][0] == pytest.approx((long.mean() - short.mean()) / 10)
    assert whole["ppo"]["gain"][1] > 0.1
    assert whole["ppo"]["within"] == pytest.approx([0, 0, 0], abs=1e-12)


def test_a_bucket_with_few_answers_has_no_gain():
    lengths = np.array([1] * 30 + [9] * 30)
    other = np.array([1] * 55 + [9] * 5)
    rows, whole = overoptimisation.by_length({"ppo": (lengths, lengths + 1.0)}, (other, other * 1.0), 200)
    assert [row["gain"]["ppo"] and row["gain"]["ppo"][0] for row in rows] == [1.0, None]
    assert whole["ppo"]["within"][0] == 1.0
    none, within = overoptimisation.length_gains([(0, 9)], ([1], [1.0]), ([1], [1.0]), 100)
    assert (none, within) == ([None], None)


# ---- in words


FOUND = {
    "notes": ["How to read it."],
    "judge": "gold",
    "policies": {
        "ppo": [
            {"step": s, "episodes": 64 * s, "kl": s / 4, "distance": math.sqrt(s / 4), "length": 9.0 + s}
            | {"proxy": [s / 2, 0, 1], "judge": [j, 0, 1], "win_rate": None}
            for s, j in ((0, 0.1), (2, 0.4), (4, 0.3))
        ]
    },
    "best_by_judge": {"ppo": 2},
    "best_by_proxy": {"ppo": 4},
    "lost_since_best": {"ppo": [0.1, 0.02, 0.18]},
    "best_of_n": [{"n": 2, "kl_bound": 0.19, "distance": 0.44, "proxy": [1, 0, 2], "judge": None}],
    "by_length": [{"bucket": "1-5 tokens", "n": {"sft": 30, "ppo": 20}, "gain": {"ppo": None}}],
    "within_length": {"ppo": {"gain": [0.5, 0.4, 0.6], "within": [0.2, 0.1, 0.3]}},
}
MODELS = {"models": {"sft": {"name": "SFT"}, "ppo": {"name": "PPO"}}}


def test_the_section_names_the_best_by_the_judge():
    text = "\n\n".join(overoptimisation.section(MODELS | {"overoptimisation": FOUND}))
    assert "| 2 | 128 | 0.50 | 0.71 | 1.000 [0.000, 1.000] | 0.400 [0.000, 1.000] | - | 11.0 |" in text
    assert "**Best PPO by the judge: after 2 iterations** (by the reward: after 4)" in text
    assert "falls by 0.100 [0.020, 0.180], more than noise" in text
    assert "| 2 | 0.19 | 0.44 | 1.000 [0.000, 2.000] | - |" in text
    assert "| 1-5 tokens | 30 | 20 | - |" in text
    assert "PPO: reward 0.500 [0.400, 0.600] above SFT's; among answers of like length 0.200 [0.100, 0.300]" in text
    noise = FOUND | {"lost_since_best": {"ppo": [0.1, -0.02, 0.18]}}
    assert "within noise" in "".join(overoptimisation.section(MODELS | {"overoptimisation": noise}))
    last = FOUND | {"best_by_judge": {"ppo": 4}}
    assert "no over-optimisation is seen" in "".join(overoptimisation.section(MODELS | {"overoptimisation": last}))
    unjudged = FOUND | {"best_by_judge": {}}
    assert "after 4 iterations. No judge" in "".join(overoptimisation.section(MODELS | {"overoptimisation": unjudged}))
    assert overoptimisation.section(MODELS) == []
