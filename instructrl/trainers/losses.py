"""The equations of InstructGPT (arXiv 2203.02155): tensors in, tensors out. No model, no configuration, no state.

Shapes: B responses of a rollout, R tokens of the longest one, M response tokens laid flat, V vocabulary, S completions.
`mask` [B, R] is True on a response's real tokens, its end-of-text token (EOS) included. Sections are the paper's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(y) = z_y / T - logsumexp(z / T), of exactly the distribution that is sampled from.

    logits [M, V], targets [M] -> [M] float32 (float64 for float64 logits). A logit of -inf takes its token out.
    """
    scaled = logits if logits.dtype == torch.float64 else logits.float()
    if temperature != 1.0:
        scaled = scaled / temperature
    return -F.cross_entropy(scaled, targets, reduction="none")


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k1 = log pi(y) - log pi_ref(y), y drawn from pi: unbiased for KL(pi || pi_ref), may be negative. Any shape.

    The paper's penalty (section 3.5, eq. 2). Names: http://joschu.net/blog/kl-approx.html
    """
    return logprobs - ref_logprobs


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = (r - 1) - log r with r = pi_ref(y) / pi(y): unbiased, never negative, of lower variance. Any shape."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def shaped_rewards(score: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = -beta * KL_t + [t is the last real token] * score (3.5 eq. 2, App. C.4).

    score [B], kl (`kl_k1` in the paper), mask [B, R] -> [B, R], 0 on padding. The last real token is EOS where there is
    one: there the reward model reads its score. A row without tokens has no place for its score and gets none.
    """
    rewards = torch.where(mask, -kl_coef * kl, 0.0)
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    return rewards + is_last * score[:, None]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16). Paper: gamma = 1 (App. C.4).

    delta_t = r_t + gamma * V_{t+1} - V_t,   A_t = delta_t + gamma * lam * A_{t+1},   returns_t = A_t + V_t,
    with V and A zero after the last real token: the episode ends there.
    rewards, values, mask [B, R] -> advantages, returns [B, R], 0 on padding. V_t is the value before token t.
    """
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(var + 1e-8), mean and biased variance over real tokens only.

    values, mask [B, R] -> [B, R], 0 on padding. `shift_mean=False` adds the mean back: rewards keep their level.
    """
    real = values[mask]
    mean, variance = real.mean(), real.var(unbiased=False)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """max(-A * rho, -A * clip(rho, 1 - eps, 1 + eps)), rho = pi(y) / pi_old(y): PPO's clipped objective, negated.

    [M] each -> [M]. Schulman et al. 2017, arXiv 1707.06347, eq. 7; the paper's eps is 0.2 (App. C.4).
    """
    ratio = torch.exp(logprobs - old_logprobs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float) -> Tensor:
    """0.5 * max((V - ret)^2, (clip(V, V_old - eps, V_old + eps) - ret)^2): the critic's clipped loss. [M] each -> [M].

    Our choice: the paper does not say whether it clips values. Form and 0.5 as in lm-human-preferences and TRL 1.12.
    """
    clipped = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    return 0.5 * torch.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def ptx_loss(logprobs: Tensor, denominator: int) -> Tensor:
    """-sum log p(x) / D: the pretraining term of eq. 2 (section 3.5) for one micro-batch. logprobs [M] -> [].

    D is the minibatch's number of tokens (a mean over tokens) or of examples (a sum over an example's tokens).
    """
    return -logprobs.sum() / denominator


def kwise_loss(scores: Tensor, group: Tensor, rank: Tensor) -> Tensor:
    """The reward model's loss on K-way rankings (section 3.5, eq. 1).

    mean over prompts of [mean over its untied pairs (i above j) of -log sigmoid(s_i - s_j)].

    scores [S]: one score a completion. group [S]: which prompt it answers (any integers; equal means same prompt).
    rank [S]: 1 is best, only its order within a prompt matters; equal ranks are a tie and form no pair. -> []
    K may differ between prompts. A prompt without an untied pair does not count; without any the loss is 0.
    For K = 2 this is the pair loss of TRL's RewardTrainer.
    """
    same_prompt = group[:, None] == group[None, :]
    above = same_prompt & (rank[:, None] < rank[None, :])  # [S, S]: row ranked above column
    better, worse = above.nonzero(as_tuple=True)
    pair_losses = -F.logsigmoid(scores[better] - scores[worse])  # [pairs]
    prompts, prompt_of_pair, pairs_of_prompt = group[better].unique(return_inverse=True, return_counts=True)
    return (pair_losses / pairs_of_prompt[prompt_of_pair]).sum() / max(len(prompts), 1)
