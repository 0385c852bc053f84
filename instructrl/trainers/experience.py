"""What PPO learns from: episodes, the order in which prompts come, and the loader that yields minibatches."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from instructrl.trainers.packing import Pack
from instructrl.trainers.ppo_config import PPOConfig


@dataclass
class Episodes:
    """One iteration's experience: B responses, padded on the right to R tokens. Every process holds all of it."""

    sequences: list[list[int]]
    """B x (prompt and response)."""
    prompt_lengths: list[int]
    mask: Tensor
    """[B, R] bool: real response tokens, EOS included."""
    old_logprobs: Tensor
    """[B, R]: under the policy that sampled them."""
    ref_logprobs: Tensor
    """[B, R]: under the reference."""
    values: Tensor
    """[B, R]: the critic's, before each token."""
    scores: Tensor
    """[B]: reward model and reward functions, the bias subtracted, whether or not the response ended."""
    ended: Tensor
    """[B] bool: the response ended by itself, with EOS."""
    sampler_logprobs: Tensor | None = None
    """[B, R]: what vLLM, having sampled them, took them to be."""
    kl_coef: float = 0.0
    """beta when these episodes were rewarded."""
    kl: Tensor | None = None
    """[B, R]: the estimate that beta multiplies."""
    final_scores: Tensor | None = None
    """[B]: the scores that are rewarded, which depend on whether the response ended."""
    advantages: Tensor | None = None
    returns: Tensor | None = None
    """[B, R] each."""

    @property
    def prompts(self) -> list[list[int]]:
        return [ids[:start] for ids, start in zip(self.sequences, self.prompt_lengths, strict=True)]

    @property
    def responses(self) -> list[list[int]]:
        return [ids[start:] for ids, start in zip(self.sequences, self.prompt_lengths, strict=True)]

    @classmethod
    def gather(cls, own: dict[str, list], processes: int) -> "Episodes":
        """All processes' episodes in the order of their prompts, of which process p answered p, p + processes, ...

        What follows (whitening, minibatches, token counts) is then computed by every process on the whole batch, so
        that two processes do what one would.
        """
        shares = gather_object([own]) if processes > 1 else [own]
        columns = {name: interleave([share[name] for share in shares]) for name in own}
        lengths = torch.tensor([len(row) for row in columns["old_logprobs"]])
        for name in ("old_logprobs", "ref_logprobs", "values", "sampler_logprobs"):
            if name in columns:
                columns[name] = pad_sequence(columns[name], batch_first=True)
        columns["scores"] = torch.tensor(columns["scores"], dtype=columns["values"].dtype)
        columns["ended"] = torch.tensor(columns["ended"])
        return cls(mask=torch.arange(int(lengths.max()))[None] < lengths[:, None], **columns)


@dataclass(frozen=True)
class MicroBatch:
    """M response tokens of some episodes, laid flat, and the sequences that they are in."""

    pack: Pack
    old_logprobs: Tensor
    advantages: Tensor
    values: Tensor
    returns: Tensor
    """[M] each."""


def interleave(parts: Sequence[list]) -> list:
    """[[a, c], [b]] -> [a, b, c]."""
    return [part[index] for index in range(len(parts[0])) for part in parts if index < len(part)]


class Experience:
    """The trainer's "dataloader": it has a batch of episodes sampled, then yields its minibatches, every epoch anew.

    It is a function of the step at which it starts, so a resumed run sees what it would have seen.
    """

    def __init__(self, sample: Callable[[int], Episodes], args: PPOConfig, first_step: Callable[[], int]):
        self.sample, self.args, self.first_step = sample, args, first_step

    def __len__(self) -> int:
        return self.args.max_steps

    def __iter__(self) -> Iterator[dict[str, Any]]:
        args = self.args
        for iteration in range(self.first_step() // args.steps_per_iteration, args.num_iterations):
            episodes = self.sample(iteration)
            for epoch in range(args.num_ppo_epochs):
                for rows in minibatches(args, iteration, epoch):
                    yield {"episodes": episodes, "rows": rows}


def minibatches(args: PPOConfig, iteration: int, epoch: int) -> list[list[int]]:
    """The episodes of each minibatch of a pass over an iteration's batch, as numbers within it."""
    order = torch.randperm(args.batch_size, generator=seeded(args.seed, "minibatches", iteration, epoch))
    return [rows.tolist() for rows in order.chunk(args.num_mini_batches)]


class Passes:
    """Endless passes over `size` rows, each in its own order: a function of seed and position, with nothing to save."""

    def __init__(self, size: int, *seed: Any):
        self.size, self.seed = size, seed
        self.number, self.order = -1, []

    def rows(self, start: int, count: int) -> list[int]:
        """The rows at positions start, start + 1, ..., start + count - 1."""
        return [self.row(position) for position in range(start, start + count)]

    def row(self, position: int) -> int:
        number, offset = divmod(position, self.size)
        if number != self.number:
            self.number = number
            self.order = torch.randperm(self.size, generator=seeded(*self.seed, number)).tolist()
        return self.order[offset]


def seeded(*parts: Any) -> torch.Generator:
    """A CPU generator whose seed mixes all the parts, so that the streams of neighbouring seeds are not alike."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
