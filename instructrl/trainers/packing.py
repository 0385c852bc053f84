"""Sequences of different lengths laid end to end, so that no layer but attention computes padding.

Rows of prompts and responses differ so much in length that a padded batch is a third to a half padding. Here the trunk
sees one row of tokens; only attention, a small part of the work, is given padded rows. The result is the same: causal
attention never looks at what stands to the right, so neither form needs a mask.

Transformers' attention interface is what makes this possible:
https://huggingface.co/docs/transformers/attention_interface
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "instructrl_packed"
# Their attention depends on positions alone (tests/test_packing.py tries each). What is not here is padded.
ARCHITECTURES = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"})


LIKE_LENGTH = 0.75  # rows that attention pads together are no shorter than this share of the longest


@dataclass(frozen=True)
class Rows:
    """Consecutive sequences that attention pads together: `count` of them, to `longest` tokens."""

    slots: Tensor
    """[t]: each of their tokens' place among the count x longest of the padded form."""
    count: int
    longest: int

    def padded(self, states: Tensor, fill: int = 0) -> Tensor:
        """[t, ...] -> [count, longest, ...], padded on the right."""
        if len(states) < self.count * self.longest:
            rows = states.new_full((self.count * self.longest, *states.shape[1:]), fill)
            states = rows.index_copy(0, self.slots, states)
        return states.unflatten(0, (self.count, self.longest))

    def unpadded(self, states: Tensor) -> Tensor:
        """[count, longest, ...] -> [t, ...]."""
        states = states.flatten(0, 1)
        return states if len(states) == len(self.slots) else states[self.slots]


@dataclass(frozen=True)
class Pack:
    """B sequences of T tokens in all. `wanted` [M] are the positions, in 0 ... T - 1, whose output is asked for."""

    ids: Tensor
    """[T]"""
    positions: Tensor
    """[T]: each token's place in its own sequence, from 0."""
    wanted: Tensor
    """[M]"""
    groups: list[Rows]
    pad_token_id: int

    @classmethod
    def of(
        cls, sequences: Sequence[Sequence[int]], wanted: Sequence[range], pad_token_id: int, device: torch.device | str
    ) -> "Pack":
        """wanted: positions in each sequence. Sequences are best sorted by length."""
        lengths = [len(sequence) for sequence in sequences]
        starts = list(accumulate(lengths, initial=0))
        positions = torch.cat([torch.arange(length) for length in lengths])
        chosen = [torch.arange(p.start, p.stop) + start for start, p in zip(starts[:-1], wanted, strict=True)]
        groups = []
        for first, last in like_length(lengths):
            tokens, longest = slice(starts[first], starts[last]), max(lengths[first:last])
            row = torch.arange(last - first).repeat_interleave(torch.tensor(lengths[first:last]))
            groups.append(Rows((row * longest + positions[tokens]).to(device), last - first, longest))
        return cls(
            ids=torch.tensor([token for sequence in sequences for token in sequence]).to(device),
            positions=positions.to(device),
            wanted=torch.cat(chosen).to(device),
            groups=groups,
            pad_token_id=pad_token_id,
        )

    def split(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """[T, ...] -> [t, ...] of each group."""
        return tokens.split([len(rows.slots) for rows in self.groups])

    @property
    def targets(self) -> Tensor:
        """[M]: the token after each wanted one."""
        return self.ids[self.wanted + 1]


def like_length(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs (first, last + 1) of rows, none shorter than `LIKE_LENGTH` of the longest in its run."""
    runs, first = [], 0
    for row in range(1, len(lengths) + 1):
        run = lengths[first : row + 1]
        if row == len(lengths) or min(run) < LIKE_LENGTH * max(run):
            runs.append((first, row))
            first = row
    return runs


def outputs(trunk: PreTrainedModel, pack: Pack) -> Tensor:
    """The trunk's last hidden states at the wanted positions: [M, H]."""
    if can_pack(trunk):
        return packed_forward(trunk, pack).last_hidden_state[0][pack.wanted]
    states = [
        rows.unpadded(trunk(input_ids=rows.padded(ids, pack.pad_token_id), use_cache=False).last_hidden_state)
        for rows, ids in zip(pack.groups, pack.split(pack.ids), strict=True)
    ]
    return torch.cat(states)[pack.wanted]


def packed_forward(trunk: PreTrainedModel, pack: Pack, **options):
    """The trunk on one row of tokens."""
    # A mask of four dimensions keeps the model from making one.
    no_mask = torch.empty(1, 1, 1, 1, device=pack.ids.device)
    ids, positions = pack.ids[None], pack.positions[None]
    options = {"use_cache": False} | options
    return trunk(input_ids=ids, position_ids=positions, attention_mask=no_mask, pack=pack, **options)


def can_pack(trunk: PreTrainedModel) -> bool:
    """Whether the model's attention can be given padded rows. It then stays what it was for every other use."""
    config = trunk.config
    if config.model_type not in ARCHITECTURES or getattr(config, "sliding_window", None):
        return False
    if config._attn_implementation == "sdpa":
        config._attn_implementation = NAME
    return config._attn_implementation == NAME


def attention(module, query, key, value, attention_mask, pack: Pack | None = None, **options):
    """Of packed tokens, with padded rows in between: query, key, value [1, heads, T, D] -> [1, T, heads, D]."""
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    options |= {"is_causal": True}
    parts = [pack.split(states[0].transpose(0, 1)) for states in (query, key, value)]  # [t, heads, D] of each group
    attended = []
    for rows, *states in zip(pack.groups, *parts, strict=True):
        padded = [rows.padded(part).transpose(1, 2) for part in states]  # [count, heads, longest, D]
        attended.append(rows.unpadded(sdpa_attention_forward(module, *padded, None, **options)[0]))
    return torch.cat(attended)[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for tokens that are not packed it is sdpa, mask and all
