"""The numbers that `PPOTrainer` logs: tensors in, names and tensors out. Names are TRL 1.12's where it has them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
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


def sampler_stats(episodes: Episodes) -> dict[str, Tensor]:
    """How far vLLM's log-probabilities of what it sampled are from ours, in nats a token."""
    difference = (episodes.sampler_logprobs - episodes.old_logprobs)[episodes.mask].abs()
    names = ("sampling/sampling_logp_difference/mean", "sampling/sampling_logp_difference/max")
    return dict(zip(names, (difference.mean(), difference.max()), strict=True))


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


POLICY_STATS = ("loss/policy_avg", "policy/approxkl_avg", "policy/clipfrac_avg", "val/ratio")
VALUE_STATS = ("loss/value_avg", "val/clipfrac_avg")
UPDATE_STATS = (*POLICY_STATS, *VALUE_STATS)


@torch.no_grad()
def policy_stats(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clipped_losses: Tensor) -> Tensor:
    """Sums over a micro-batch's tokens at the places of POLICY_STATS. [M] each -> [len(UPDATE_STATS)], 0 elsewhere.

    A token counts as clipped where that raised its loss.
    """
    ratio, approx_kl = torch.exp(logprobs - old_logprobs), 0.5 * (logprobs - old_logprobs) ** 2
    clipped = (clipped_losses > -advantages * ratio).float()
    sums = [column.sum() for column in (clipped_losses, approx_kl, clipped, ratio)]
    return F.pad(torch.stack(sums), (0, len(VALUE_STATS)))


@torch.no_grad()
def value_stats(values: Tensor, returns: Tensor, clipped_losses: Tensor) -> Tensor:
    """The same at the places of VALUE_STATS."""
    clipped = (clipped_losses > 0.5 * (values - returns) ** 2).float()
    return F.pad(torch.stack([clipped_losses.sum(), clipped.sum()]), (len(POLICY_STATS), 0))


def gradient_stats(
    pretraining: list[Tensor], total: list[Tensor], over_processes: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Norms of the policy's two gradients before clipping, the pretraining one scaled by `ptx_coef`.

    Their ratio, not that of the losses, tells what `ptx_coef` does: the policy loss is about 0 whatever its gradient.

    over_processes: a sum, for gradients of which each process has a part.
    """
    ppo = torch._foreach_sub(total, pretraining)
    ptx_norm, ppo_norm = (torch.stack(torch._foreach_norm(part)).norm() for part in (pretraining, ppo))
    dot = torch.stack([(a * b).sum() for a, b in zip(pretraining, ppo, strict=True)]).sum()
    if over_processes:
        squares = over_processes(torch.stack([ptx_norm.square(), ppo_norm.square(), dot]))
        (ptx_norm, ppo_norm), dot = squares[:2].sqrt(), squares[2]
    return {
        "ppo/grad_norm": ppo_norm,
        "ptx/grad_norm": ptx_norm,
        "ptx/grad_ratio": ptx_norm / (ppo_norm + 1e-12),
        "ptx/grad_cosine": dot / (ptx_norm * ppo_norm + 1e-12),
    }
