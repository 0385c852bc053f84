"""Best-of-n: the answer that a reward model likes best of several. What PPO is to beat, without any training."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from instructrl.trainers.rollout import Completion, generate, score_rewards

Score = Callable[[Sequence[Sequence[int]], Sequence[Completion]], Sequence[float]]
"""(prompts' ids, their completions) -> a number for each; higher is better."""


@dataclass(frozen=True, slots=True)
class BestOfN:
    """What `best_of_n` found."""

    completions: list[Completion]
    """The best one of each prompt; its log-probabilities are the policy's, not those of the best of n."""
    scores: Tensor
    """[prompts] float64 on the CPU: the scores of the best."""
    kl_bound: float
    """`kl_bound(n)`."""


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n nats a response: an upper bound of KL(best of n || policy).

    Stiennon et al. 2020 (arXiv 2009.01325) give it as the KL itself. That holds where no two responses are alike and
    none has a large probability; otherwise the KL is smaller (Beirami et al. 2024, arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def best_of_n(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    n: int,
    score: PreTrainedModel | Score,
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
    max_tokens: int = 4096,
) -> BestOfN:
    """Sample n responses to each prompt and keep the one with the highest score; of equal ones the first.

    The first response to each prompt is the one that `generate` returns with the same generator. Responses are sampled
    in rounds of one a prompt, several rounds together where the prompts are fewer than `batch_size`; a round's
    responses are scored and forgotten before the next, so that memory does not grow with n.

    Args:
        policy, prompts, max_new_tokens, temperature, eos_token_id, pad_token_id, generator: as in `generate`.
        score: a reward model that reads prompt and response in the policy's own ids, or any function.
        batch_size: sequences decoded together; changes speed and memory, not results.
        max_tokens: padded tokens of a forward pass of the reward model.

    Raises:
        ValueError: n is less than 1, decoding is greedy, or the scores are too few, too many or not numbers.
    """
    if n < 1:
        raise ValueError(f"n={n}: the best of n needs one response or more")
    if n > 1 and temperature == 0:
        raise ValueError("temperature=0: all n responses to a prompt would be the same")
    if isinstance(score, PreTrainedModel):
        score = rewards_of(score, pad_token_id, max_tokens)
    best: list[Completion | None] = [None] * len(prompts)
    highest = torch.full((len(prompts),), -math.inf, dtype=torch.float64)
    together = max(1, batch_size // max(len(prompts), 1))  # rounds
    for done in range(0, n, together):
        rounds = min(together, n - done)
        # One draw a round, so that a response does not depend on how many rounds are decoded together.
        uniforms = [torch.rand(len(prompts), max_new_tokens, generator=generator) for _ in range(rounds)]
        asked = list(prompts) * rounds
        completions = generate(
            policy,
            asked,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            uniforms=torch.cat(uniforms),
            batch_size=batch_size,
        )
        found = torch.as_tensor(score(asked, completions), dtype=torch.float64)
        if found.shape != (len(asked),) or not torch.isfinite(found).all():
            raise ValueError(f"the scores of {len(asked)} responses must be as many numbers, not {found.tolist()[:3]}")
        for number, completion in enumerate(completions):
            prompt = number % len(prompts)
            if best[prompt] is None or found[number] > highest[prompt]:
                best[prompt], highest[prompt] = completion, found[number]
    return BestOfN(best, highest, kl_bound(n))


def rewards_of(reward_model: PreTrainedModel, pad_token_id: int, max_tokens: int) -> Score:
    """The reward model as a scoring function."""

    def score(prompts: Sequence[Sequence[int]], completions: Sequence[Completion]) -> Tensor:
        sequences = [[*prompt, *completion.ids] for prompt, completion in zip(prompts, completions, strict=True)]
        return score_rewards(reward_model, sequences, pad_token_id=pad_token_id, max_tokens=max_tokens)

    return score
