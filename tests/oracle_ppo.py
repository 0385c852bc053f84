"""PPO and PPO-ptx a second time, plainly: float64, one sequence at a time, no padding, no batch, no cache.

Written from the equations (paper, section 3.5 eq. 2; GAE and the clipped losses from their papers), not from the
trainer. Shares with it only the sampled responses and which of them make up which minibatch.
"""

import math
from dataclasses import dataclass

import torch


@dataclass
class Settings:
    """The symbols of the equations."""

    pad: int
    eos: int
    temperature: float = 1.0
    beta: float = 0.02
    clip: float = 0.2
    value_clip: float = 0.2
    value_weight: float = 0.1
    discount: float = 1.0
    lam: float = 0.95
    bias: float = 0.0
    eos_penalty: float = 1.0
    ptx: float = 0.0
    ptx_per_sequence: bool = False
    whiten_rewards: bool = False
    policy_rate: float = 1e-3
    critic_rate: float = 1e-3
    max_norm: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-5


def logprobs(model, ids, start, temperature, pad):
    """log p of ids[start:], one after the other, over the vocabulary without the padding token."""
    logits = model(torch.tensor([ids])).logits[0].double() / temperature
    result = []
    for position in range(start, len(ids)):
        allowed = torch.cat([logits[position - 1, :pad], logits[position - 1, pad + 1 :]])
        result.append(logits[position - 1, ids[position]] - torch.logsumexp(allowed, 0))
    return result


def score(model, ids):
    """The reward model's or critic's scalar at the end of the sequence, by the model's own pooling."""
    return model(torch.tensor([ids])).logits[0, 0].double()


def values(critic, ids, start, bias):
    """The value before each of ids[start:]."""
    return [score(critic, ids[:position]) - bias for position in range(start, len(ids))]


def whiten(rows, keep_mean=False):
    flat = [x for row in rows for x in row]
    mean = sum(flat) / len(flat)
    variance = sum((x - mean) ** 2 for x in flat) / len(flat)
    return [[(x - mean) / math.sqrt(variance + 1e-8) + (mean if keep_mean else 0.0) for x in row] for row in rows]


@torch.no_grad()
def experience(policy, critic, reference, reward_model, episodes, settings):
    """(old log-probs, values, advantages, returns) of each episode (ids, start), floats."""
    s, old, value, rewards = settings, [], [], []
    for ids, start in episodes:
        old.append([x.item() for x in logprobs(policy, ids, start, s.temperature, s.pad)])
        ref = [x.item() for x in logprobs(reference, ids, start, s.temperature, s.pad)]
        value.append([x.item() for x in values(critic, ids, start, s.bias)])
        reward = [-s.beta * (a - b) for a, b in zip(old[-1], ref, strict=True)]
        reward[-1] += score(reward_model, ids).item() - s.bias - (0.0 if ids[-1] == s.eos else s.eos_penalty)
        rewards.append(reward)
    if s.whiten_rewards:
        rewards = whiten(rewards, keep_mean=True)
    advantages = []
    for reward, v in zip(rewards, value, strict=True):
        v = [*v, 0.0]
        deltas = [r + s.discount * v[t + 1] - v[t] for t, r in enumerate(reward)]
        weights = [(s.discount * s.lam) ** k for k in range(len(deltas))]
        advantages.append([sum(w * d for w, d in zip(weights, deltas[t:])) for t in range(len(deltas))])  # noqa: B905
    returns = [[a + b for a, b in zip(row, v, strict=True)] for row, v in zip(advantages, value, strict=True)]
    return old, value, whiten(advantages), returns


def ppo_loss(policy, critic, episodes, batch, rows, settings):
    """The clipped losses of a minibatch: sums over its tokens, divided by their number."""
    s, total, count = settings, 0.0, 0
    old, old_values, advantages, returns = batch
    for row in rows:
        ids, start = episodes[row]
        new = logprobs(policy, ids, start, s.temperature, s.pad)
        value = values(critic, ids, start, s.bias)
        for t in range(len(new)):
            ratio = torch.exp(new[t] - old[row][t])
            a = advantages[row][t]
            total += -torch.minimum(a * ratio, a * ratio.clamp(1 - s.clip, 1 + s.clip))
            near = old_values[row][t] + (value[t] - old_values[row][t]).clamp(-s.value_clip, s.value_clip)
            target = returns[row][t]
            total += s.value_weight * 0.5 * torch.maximum((value[t] - target) ** 2, (near - target) ** 2)
            count += 1
    return total / count


def pretraining_loss(policy, examples, settings):
    """-log p of the examples, a mean over tokens, or of sums over examples."""
    terms = [x for ids in examples for x in logprobs(policy, ids, 1, 1.0, settings.pad)]
    return -sum(terms) / (len(examples) if settings.ptx_per_sequence else len(terms))


def clip_(parameters, max_norm):
    norm = math.sqrt(sum((p.grad**2).sum().item() for p in parameters))
    for p in parameters:
        p.grad *= min(1.0, max_norm / (norm + 1e-6))
    return norm


class Adam:
    """Kingma & Ba 2015, algorithm 1."""

    def __init__(self, parameters, settings):
        self.parameters, self.s, self.t = parameters, settings, 0
        self.m = [torch.zeros_like(p) for p in parameters]
        self.v = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, rate):
        self.t += 1
        for p, m, v in zip(self.parameters, self.m, self.v, strict=True):
            m.copy_(self.s.beta1 * m + (1 - self.s.beta1) * p.grad)
            v.copy_(self.s.beta2 * v + (1 - self.s.beta2) * p.grad**2)
            mean, second = m / (1 - self.s.beta1**self.t), v / (1 - self.s.beta2**self.t)
            p -= rate * mean / (second.sqrt() + self.s.epsilon)


def update(policy, critic, optimizers, episodes, batch, rows, examples, settings, warmup=1.0):
    """One optimizer step of both. Returns the norms of their gradients before clipping."""
    norms = []
    loss = ppo_loss(policy, critic, episodes, batch, rows, settings)
    if settings.ptx:
        loss = loss + settings.ptx * pretraining_loss(policy, examples, settings)
    for model in (policy, critic):
        model.zero_grad()
    loss.backward()
    for model, adam, rate in zip(
        (policy, critic), optimizers, (settings.policy_rate, settings.critic_rate), strict=True
    ):
        norms.append(clip_(list(model.parameters()), settings.max_norm))
        adam.step(rate * warmup)
    return norms
