"""The equations against closed forms and brute force, in float64. T5 to T8 and T16."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from instructrl.trainers import losses

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_token_logprobs_are_the_log_softmax_at_the_temperature():
    logits, targets = normal(5, 7), torch.tensor([0, 6, 3, 3, 1])
    rows = zip(logits, targets, strict=True)
    expected = [math.log(math.exp(row[y] / 0.7) / sum(math.exp(z / 0.7) for z in row)) for row, y in rows]
    assert losses.token_logprobs(logits, targets, 0.7).tolist() == pytest.approx(expected, abs=1e-12)


def test_a_logit_of_minus_infinity_takes_its_token_out():
    logits = torch.tensor([[1.0, -math.inf, 2.0]])
    assert losses.token_logprobs(logits, torch.tensor([2])).exp().item() == pytest.approx(1 / (1 + math.exp(-1)))


def test_rewards_sum_to_the_score_less_the_kl_and_are_zero_on_padding():
    score, logprobs, ref = normal(3), normal(3, 4, seed=1), normal(3, 4, seed=2)
    rewards = losses.shaped_rewards(score, losses.kl_k1(logprobs, ref), MASK, 0.3)
    assert (rewards[~MASK] == 0).all()
    for row, length in enumerate((4, 2, 1)):
        kl = (logprobs - ref)[row, :length]
        assert rewards[row].sum().item() == pytest.approx((score[row] - 0.3 * kl.sum()).item(), abs=1e-12)
        assert torch.equal(
            rewards[row, : length - 1], -0.3 * kl[:-1]
        )  # the score is on the last token and nowhere else
        assert rewards[row, length - 1].item() == pytest.approx((score[row] - 0.3 * kl[-1]).item(), abs=1e-12)


def brute_force_gae(rewards, values, mask, gamma, lam):
    """A_t = sum over l of (gamma * lam)^l * delta_{t+l}, straight from the definition."""
    advantages = torch.zeros_like(rewards)
    for row in range(len(rewards)):
        length = int(mask[row].sum())
        value = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + gamma * value[t + 1] - value[t] for t in range(length)]
        for t in range(length):
            advantages[row, t] = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0), (0.5, 0.0)])
def test_gae_is_its_definition(gamma, lam):
    rewards, values = normal(3, 4), normal(3, 4, seed=1)
    advantages, returns = losses.gae(rewards, values, MASK, gamma, lam)
    assert torch.allclose(advantages, brute_force_gae(rewards, values, MASK, gamma, lam), atol=1e-12)
    assert torch.allclose(returns, (advantages + values) * MASK, atol=1e-12)
    assert (advantages[~MASK] == 0).all()


def test_gae_ignores_what_stands_on_padding():
    rewards, values = normal(3, 4), normal(3, 4, seed=1)
    before = losses.gae(rewards, values, MASK, 1.0, 0.95)
    after = losses.gae(rewards.masked_fill(~MASK, 7.0), values.masked_fill(~MASK, -9.0), MASK, 1.0, 0.95)
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


def test_gae_with_lambda_one_makes_the_returns_the_future_rewards():
    rewards, values = normal(3, 4) * MASK, normal(3, 4, seed=1)
    _, returns = losses.gae(rewards, values, MASK, 1.0, 1.0)
    future = rewards.flip(1).cumsum(1).flip(1)
    assert torch.allclose(returns, future * MASK, atol=1e-12)


def test_whitening_makes_mean_zero_and_variance_one_over_real_tokens():
    values = normal(3, 4).masked_fill(~MASK, 1e6)  # padding must not count
    real = losses.masked_whiten(values, MASK)[MASK]
    assert real.mean().item() == pytest.approx(0, abs=1e-12)
    assert real.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    kept = losses.masked_whiten(values, MASK, shift_mean=False)
    assert kept[MASK].mean().item() == pytest.approx(values[MASK].mean().item(), abs=1e-12)
    assert (kept[~MASK] == 0).all()


@pytest.mark.parametrize(
    ("advantage", "ratio", "moves"),
    [(1, 1.3, False), (1, 1.1, True), (1, 0.5, True), (-1, 1.3, True), (-1, 0.9, True), (-1, 0.7, False)],
)
def test_the_policy_clip_stops_only_what_has_gone_far_enough_the_right_way(advantage, ratio, moves):
    old = normal(1)
    logprobs = (old + math.log(ratio)).requires_grad_()
    loss = losses.policy_loss(logprobs, old, torch.tensor([float(advantage)], dtype=torch.float64), 0.2)
    loss.backward()
    assert logprobs.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0, abs=1e-12)
    bound = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(max(-advantage * ratio, -advantage * bound), abs=1e-12)


@pytest.mark.parametrize(
    ("value", "old", "target", "expected", "moves"),
    [
        (0.1, 0.0, 1.0, 0.5 * 0.9**2, True),  # within the clip
        (0.5, 0.0, 1.0, 0.5 * 0.8**2, False),  # beyond it, towards the target: no further
        (-0.5, 0.0, 1.0, 0.5 * 1.5**2, True),  # beyond it, away from the target: come back
    ],
)
def test_the_value_clip(value, old, target, expected, moves):
    values = torch.tensor([value], requires_grad=True)
    loss = losses.value_loss(values, torch.tensor([old]), torch.tensor([target]), 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert values.grad.item() == pytest.approx(value - target if moves else 0.0, rel=1e-6)


def test_kl_estimators_against_the_exact_divergence():
    """k1 and k3 are unbiased: weighted by the policy's probabilities they sum to KL, exactly. k3 is never negative."""
    policy, reference = normal(6, seed=3).log_softmax(0), normal(6, seed=4).log_softmax(0)
    exact = (policy.exp() * (policy - reference)).sum().item()
    assert (policy.exp() * losses.kl_k1(policy, reference)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (policy.exp() * losses.kl_k3(policy, reference)).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (losses.kl_k3(policy, reference) >= 0).all()
    assert (losses.kl_k1(policy, reference) < 0).any()


def test_the_pretraining_loss_of_a_minibatch_is_the_sum_of_its_parts():
    logprobs = normal(9)
    assert losses.ptx_loss(logprobs, 9).item() == pytest.approx(-logprobs.mean().item(), abs=1e-12)
    parts = losses.ptx_loss(logprobs[:4], 9) + losses.ptx_loss(logprobs[4:], 9)
    assert parts.item() == pytest.approx(-logprobs.mean().item(), abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 99))
def test_gae_is_its_definition_for_any_lengths(lengths, gamma, lam, seed):
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
    rewards, values = normal(*mask.shape, seed=seed), normal(*mask.shape, seed=seed + 1)
    advantages, _ = losses.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages, brute_force_gae(rewards, values, mask, gamma, lam), atol=1e-9)
