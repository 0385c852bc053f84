"""The numbers that `PPOTrainer` logs: tensors in, names and tensors out. Names are TRL 1.12's where it has them."""

import torch
from torch import Tensor

from instructrl.trainers.experience import Episodes
from instructrl.trainers.losses import kl_k1, kl_k3


def episode_stats(episodes: Episodes) -> dict[str, Tensor]:
    """What an iteration's episodes tell: sums over a response's tokens, means over responses."""
    mask = episodes.mask
    kl = kl_k1(episodes.old_logprobs, episodes.ref_logprobs).mul(mask).sum(1)
    k3 = kl_k3(episodes.old_logprobs, episodes.ref_logprobs).mul(mask).sum(1)
    cost = episodes.kl_coef * episodes.kl.mul(mask).sum(1)  # what the penalty takes, as rewards count it
    returns, errors = episodes.returns[mask], (episodes.returns - episodes.values)[mask]
    return {
        "objective/scores": episodes.scores.mean(),
        "objective/scores_std": episodes.scores.std(unbiased=False),
        "objective/kl": kl.mean(),  # 0 at first; negative on average: sampled from another distribution than scored
        "objective/kl_k3": k3.mean(),
        "objective/kl_coef": torch.tensor(episodes.kl_coef),
        "objective/non_score_reward": -cost.mean(),
        "objective/rlhf_reward": (episodes.final_scores - cost).mean(),
        "objective/entropy": -episodes.old_logprobs.mul(mask).sum(1).mean(),
        "val/explained_var": 1 - errors.var(unbiased=False) / (returns.var(unbiased=False) + 1e-8),
        "val/num_eos_tokens": episodes.ended.sum(),
        "completions/mean_length": mask.sum(1).float().mean(),
    }


EVALUATED = (
    "objective/scores",
    "objective/scores_std",
    "objective/kl",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "objective/entropy",
    "val/num_eos_tokens",
    "completions/mean_length",
)


def evaluation_stats(episodes: Episodes) -> dict[str, Tensor]:
    """What of `episode_stats` says something of a policy on held-out prompts."""
    stats = episode_stats(episodes)
    return {name: stats[name] for name in EVALUATED}


UPDATE_STATS = (
    "loss/policy_avg",
    "loss/value_avg",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
)


@torch.no_grad()
def update_stats(
    logprobs: Tensor, old: Tensor, advantages: Tensor, policy: Tensor, values: Tensor, returns: Tensor, value: Tensor
) -> Tensor:
    """Sums over a micro-batch's tokens, in the order of UPDATE_STATS. [M] each -> [6].

    policy and value are the clipped losses; a token counts as clipped where that raised its loss.
    """
    ratio = torch.exp(logprobs - old)
    approx_kl = 0.5 * (logprobs - old) ** 2
    clipped = (policy > -advantages * ratio).float()
    value_clipped = (value > 0.5 * (values - returns) ** 2).float()
    return torch.stack([column.sum() for column in (policy, value, approx_kl, clipped, value_clipped, ratio)])


def gradient_stats(pretraining: list[Tensor], total: list[Tensor]) -> dict[str, Tensor]:
    """Norms of the policy's two gradients before clipping, the pretraining one scaled by `ptx_coef`.

    Their ratio, not that of the losses, tells what `ptx_coef` does: the policy loss is about 0 whatever its gradient.
    """
    ppo = torch._foreach_sub(total, pretraining)
    ptx_norm, ppo_norm = (torch.stack(torch._foreach_norm(part)).norm() for part in (pretraining, ppo))
    dot = torch.stack([(a * b).sum() for a, b in zip(pretraining, ppo, strict=True)]).sum()
    return {
        "ppo/grad_norm": ppo_norm,
        "ptx/grad_norm": ptx_norm,
        "ptx/grad_ratio": ptx_norm / (ppo_norm + 1e-12),
        "ptx/grad_cosine": dot / (ptx_norm * ppo_norm + 1e-12),
    }
