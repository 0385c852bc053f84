"""Win rates at equal length: against brute force, on judges whose taste is known, and the section of the report."""

import numpy as np
import pytest

from instructrl.stages.length_control import feature, fit, length_controlled, sigmoid
from instructrl.stages.matrix import sections
from instructrl.stages.winrate import share


def judged(rng, theta, phi, prompts, longer=10):
    """Outcomes of a judge who follows the model, and both lengths. SFT answers with 100 tokens."""
    differences = rng.normal(longer, 12, size=prompts).round()
    chance = 1 / (1 + np.exp(-theta - phi * np.tanh(differences / 12)))
    return (rng.random(prompts) < chance).astype(float), 100 + differences, np.full(prompts, 100.0)


def test_the_fit_is_the_maximum_of_the_likelihood():
    """Against every pair on a grid, with ties and weights."""
    rng = np.random.default_rng(0)
    x, won, weights = np.tanh(rng.normal(size=40)), rng.choice([0, 0.5, 1], size=40), rng.random(40)
    [(theta, phi)] = fit(x, won, weights[None])

    def likelihood(a, b):
        chance = 1 / (1 + np.exp(-a - b * x))
        return (weights * (won * np.log(chance) + (1 - won) * np.log(1 - chance))).sum()

    steps = np.linspace(-3, 3, 121)
    best = max((likelihood(a, b), a, b) for a in steps for b in steps)
    assert (theta, phi) == pytest.approx(best[1:], abs=0.05)
    assert likelihood(theta, phi) >= best[0]


def test_answers_of_equal_length_have_their_raw_win_rate():
    won = np.repeat([1.0, 0.5, 0.0], [30, 10, 20])
    found, raw = length_controlled(won, np.full(60, 9), np.full(60, 9)), share(won)
    assert tuple(found) == pytest.approx(tuple(raw), abs=0.02)
    assert found.mean == pytest.approx(raw.mean, abs=1e-3)


def test_a_judge_of_length_alone_is_seen_through():
    won, ours, theirs = judged(np.random.default_rng(1), theta=0, phi=2, prompts=800)
    found = length_controlled(won, ours, theirs)
    assert share(won).low > 0.6
    assert found.low < 0.5 < found.high < 0.6


def test_the_two_sides_sum_to_one():
    won, ours, theirs = judged(np.random.default_rng(2), 0.5, 1, 100)
    there, back = length_controlled(won, ours, theirs), length_controlled(1 - won, theirs, ours)
    assert there.mean + back.mean == pytest.approx(1)
    assert there.low + back.high == pytest.approx(1, abs=0.02)


def test_coverage():
    """Of 300 studies of 100 prompts; three standard errors of that share are 3.8 %."""
    rng, theta, phi = np.random.default_rng(3), -1.0, 1.5
    found = [length_controlled(*judged(rng, theta, phi, 100), samples=300) for _ in range(300)]
    truth = sigmoid(np.array(theta))
    assert np.mean([low <= truth <= high for _, low, high in found]) == pytest.approx(0.95, abs=0.038)


def test_where_one_side_or_the_longer_answer_wins_all():
    lengths = np.random.default_rng(4).normal(100, 10, size=40)
    theirs = np.full(40, 100.0)
    always = length_controlled(np.ones(40), lengths, theirs)
    assert always.mean > 0.99
    assert 0.8 < always.low < 1
    longer = length_controlled(lengths > 100, lengths, theirs)
    assert longer.low < 0.2 < 0.5 < longer.high  # nobody knows


def test_the_feature_has_no_scale():
    differences = np.array([1.0, -2.0, 5.0, 400.0])
    assert feature(differences).tolist() == pytest.approx(feature(differences * 7).tolist())
    assert feature(np.array([3.0, 3.0])).tolist() == [1, 1]  # all longer by the same: no spread to divide by


def test_the_report_has_what_was_measured():
    models = {
        name: {"name": name.upper(), "win_rate": [0.6, 0.5, 0.7], "length": [length, 0, 0]}
        for name, length in (("sft", 10.0), ("ppo", 14.5))
    }
    assert sections({"models": models}) == []
    models["ppo"]["win_rate_length_controlled"] = [0.48, 0.4, 0.56]
    title, said, printed = sections({"models": models})
    assert title == "## Win rates at equal length"
    assert "Dubois" in said
    assert "| PPO | .600 \\[.500, .700\\] | .480 \\[.400, .560\\] | +4.5 |" in printed
