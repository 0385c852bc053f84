"""Sampling responses, and scoring them: log-probabilities, values and rewards of token sequences.

A sequence is a prompt's ids followed by a response's. Sequences are packed (`packing.py`), so that positions count from
0 and no attention mask is needed; only the sampler's KV cache is padded, on the left.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from instructrl.trainers.cache import RoomyLayer
from instructrl.trainers.losses import token_logprobs
from instructrl.trainers.packing import Pack, can_pack, outputs, packed_forward

DROP_BELOW = 0.75  # finished rows leave the batch when fewer than this share of it goes on: leaving copies the cache


class RolloutError(RuntimeError):
    """Sampling cannot go on; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled response."""

    ids: list[int]
    """Its tokens, the one that ended it included (EOS or a stop token); without one it was cut at the length limit."""
    logprobs: Tensor
    """[len(ids)] float32 on the CPU: log-probability of each token under the distribution that it was drawn from."""


# ---- one distribution for sampling and scoring -----------------------------------------------------------------------


def next_token_logits(model: PreTrainedModel, hidden: Tensor, pad_token_id: int | None) -> Tensor:
    """The language-model head: hidden states [..., H] -> logits [..., V].

    The padding token gets -inf. It is often a fresh row of the embedding that no training has seen, and a sampled one
    would be taken for padding. Sampling, policy, reference and pretraining loss all come through here, so that what is
    sampled is exactly what is scored.
    """
    head, (scale, cap) = model.get_output_embeddings(), logit_transform(model)
    plain = type(head) is nn.Linear and scale == 1.0 and not cap
    if plain and head.bias is None and pad_token_id is not None:
        # As the product's bias it costs nothing; added afterwards it would copy [..., V].
        return F.linear(hidden, head.weight, padding_bias(head.weight[:, 0], pad_token_id))
    logits = head(hidden)
    if scale != 1.0:
        logits = logits * scale
    if cap:
        logits = torch.tanh(logits / cap) * cap
    return logits if pad_token_id is None else logits + padding_bias(logits.flatten(0, -2)[0], pad_token_id)


def padding_bias(like: Tensor, pad_token_id: int) -> Tensor:
    """0, and -inf for the padding token: [V], as `like` is in shape, precision and device."""
    bias = torch.zeros_like(like)
    bias[pad_token_id] = float("-inf")
    return bias


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, soft cap) of the few models whose logits are more than head(hidden): Cohere, Granite, Gemma."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return scale, getattr(config, "final_logit_softcapping", None)


def response_logprobs(model: PreTrainedModel, pack: Pack, temperature: float) -> Tensor:
    """log p of the tokens that follow the pack's wanted positions. -> [M]

    Prompt positions never reach the head: on a large vocabulary it is the most expensive layer.
    """
    hidden = outputs(model.base_model, pack)  # [M, H]
    logits = next_token_logits(model, hidden, pack.pad_token_id)  # [M, V]
    return token_logprobs(logits, pack.targets, temperature or 1.0)


def token_scores(model: PreTrainedModel, pack: Pack) -> Tensor:
    """A reward model's or critic's scalar at the pack's wanted positions. -> [M]"""
    scores = model.score(outputs(model.base_model, pack))[:, 0]
    return scores if scores.dtype == torch.float64 else scores.float()


# ---- sequences of different lengths ----------------------------------------------------------------------------------


def length_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches of like length, longest first, each of at most `max_tokens` if it were padded, or one row.

    A bound on padded tokens holds for models that cannot be packed, and bounds what attention pads for those that can.
    """
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        size = len(batches[-1]) + 1 if batches else 0
        if batches and size <= (max_rows or size) and size * max(lengths[batches[-1][0]], 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def predicting(sequence: Sequence[int], prompt_length: int) -> range:
    """The positions whose next token belongs to the response."""
    return range(prompt_length - 1, len(sequence) - 1)


def _per_row(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    wanted: Sequence[range],
    pad_token_id: int,
    max_tokens: int,
    of: Callable[[Pack], Tensor],
) -> list[Tensor]:
    """`of` each sequence's wanted positions, in length-sorted batches; on the CPU, one tensor a sequence."""
    result: list[Tensor] = [torch.empty(0)] * len(sequences)
    for rows in length_batches([len(sequence) for sequence in sequences], max_tokens):
        chosen = [wanted[row] for row in rows]
        pack = Pack.of([sequences[row] for row in rows], chosen, pad_token_id, model.device)
        for row, part in zip(rows, of(pack).cpu().split([len(places) for places in chosen]), strict=True):
            result[row] = part
    return result


@torch.no_grad()
def score_logprobs(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    temperature: float,
    pad_token_id: int,
    max_tokens: int,
) -> list[Tensor]:
    """Log-probabilities of each sequence's response tokens: [response length] on the CPU, one a sequence."""
    wanted = [predicting(sequence, start) for sequence, start in zip(sequences, prompt_lengths, strict=True)]
    return _per_row(
        model, sequences, wanted, pad_token_id, max_tokens, lambda pack: response_logprobs(model, pack, temperature)
    )


@torch.no_grad()
def score_values(
    critic: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    pad_token_id: int,
    max_tokens: int,
) -> list[Tensor]:
    """The critic's scalar before each response token: [response length] on the CPU, one a sequence."""
    wanted = [predicting(sequence, start) for sequence, start in zip(sequences, prompt_lengths, strict=True)]
    return _per_row(critic, sequences, wanted, pad_token_id, max_tokens, lambda pack: token_scores(critic, pack))


@torch.no_grad()
def score_rewards(
    reward_model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_token_id: int, max_tokens: int
) -> Tensor:
    """The reward model's scalar at each sequence's last token: [B] float64 on the CPU. No bias is subtracted."""
    last = [range(len(sequence) - 1, len(sequence)) for sequence in sequences]
    scores = _per_row(
        reward_model, sequences, last, pad_token_id, max_tokens, lambda pack: token_scores(reward_model, pack)
    )
    return torch.cat(scores).double() if scores else torch.zeros(0, dtype=torch.float64)


# ---- sampling --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    eos_token_id: int,
    pad_token_id: int,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    batch_size: int = 128,
    max_tokens: int = 4096,
    stop_token_ids: Sequence[int] = (),
) -> list[Completion]:
    """One response to each prompt, by ancestral sampling from the full softmax of logits / temperature; 0 is greedy.

    Nothing truncates the distribution (no top-k, top-p, minimum length or repetition penalty): PPO's ratio and KL mean
    nothing if tokens are drawn from another distribution than the one that is scored. Only the padding token is out.

    The randomness is `uniforms` [len(prompts), max_new_tokens] in [0, 1), by default drawn on the CPU from `generator`:
    one number a token, fixed before decoding. So a response depends neither on the global generator nor (rounding
    apart) on the prompts in its batch, on `batch_size`, and on `max_tokens`, of a forward pass over prompts. Greedy
    log-probabilities are those at temperature 1.

    Raises ValueError for an empty prompt, FloatingPointError if the model's logits are not numbers.
    """
    if not all(len(prompt) for prompt in prompts):
        raise ValueError("a prompt has no tokens, so there is nothing to continue: give it at least a BOS token")
    if uniforms is None and temperature > 0:
        uniforms = torch.rand(len(prompts), max_new_tokens, generator=generator)
    stops = torch.tensor([eos_token_id, *stop_token_ids], device=model.device)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    completions: list[Completion | None] = [None] * len(prompts)
    was_training = model.training
    model.eval()
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        numbers = None if temperature == 0 else uniforms[rows].to(model.device)
        batch = [prompts[row] for row in rows]
        for row, completion in zip(
            rows,
            _generate_batch(model, batch, max_new_tokens, temperature, stops, pad_token_id, numbers, max_tokens),
            strict=True,
        ):
            completions[row] = completion
    model.train(was_training)
    return completions


@torch.inference_mode()
def _generate_batch(
    model, prompts, max_new_tokens, temperature, stops, pad_token_id, uniforms, max_tokens
) -> list[Completion]:
    """Decode one batch with a KV cache. Rows that have finished leave the batch, cache and all."""
    device, size = model.device, len(prompts)
    tokens = torch.full((size, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros((size, max_new_tokens), device=device)
    lengths = torch.full((size,), max_new_tokens, device=device)
    rows = torch.arange(size, device=device)  # which prompt each row of the batch answers
    going = torch.ones(size, dtype=torch.bool, device=device)
    cache = DynamicCache(config=model.config)
    hidden, mask = prefill(model.base_model, prompts, pad_token_id, cache, max_tokens)  # [B, H], [B, P]
    positions = mask.sum(1, keepdim=True) - 1  # absolute positions count from a row's first token, not from the padding
    for step in range(max_new_tokens):
        logits = next_token_logits(model, hidden, pad_token_id)  # [b, V]
        token, logprob = draw(logits, temperature, None if uniforms is None else uniforms[rows, step])
        tokens[rows, step], logprobs[rows, step] = token, logprob  # rows past their end write beyond it: cut below
        ended = going & torch.isin(token, stops)
        lengths[rows[ended]] = step + 1
        going = going & ~ended
        remaining = int(going.sum())
        if remaining == 0 or step == max_new_tokens - 1:
            break
        if remaining < DROP_BELOW * len(rows):
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, positions, going = rows[keep], token[keep], mask[keep], positions[keep], going[keep]
        positions, mask = positions + 1, torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        hidden = model.base_model(
            input_ids=token[:, None],
            attention_mask=mask[:, None, None] if can_pack(model.base_model) else mask,
            position_ids=positions,
            **cached(model.base_model, cache),
        ).last_hidden_state[:, -1]
    if not torch.isfinite(logprobs).all():
        raise FloatingPointError("the policy's logits are not numbers: training has diverged; lower the learning rate")
    ids, cut, logprobs = tokens.tolist(), lengths.tolist(), logprobs.cpu()
    return [Completion(ids[row][: cut[row]], logprobs[row, : cut[row]].clone()) for row in range(size)]


def prefill(
    trunk: PreTrainedModel, prompts: Sequence[Sequence[int]], pad_token_id: int, cache: DynamicCache, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Fill the cache with the prompts, padded on the left to P tokens, in forward passes of at most `max_tokens`.

    -> the hidden state at each prompt's end [B, H], and what is no padding [B, P] bool.
    """
    width = max(map(len, prompts))
    mask = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=trunk.device)
    if can_pack(trunk):
        hidden = [torch.empty(0)] * len(prompts)
        for rows in length_batches([len(prompt) for prompt in prompts], max_tokens):
            chosen, part = [prompts[row] for row in rows], DynamicCache(config=trunk.config)
            ends = [range(len(prompt) - 1, len(prompt)) for prompt in chosen]
            pack = Pack.of(chosen, ends, pad_token_id, trunk.device)
            last = packed_forward(trunk, pack, **cached(trunk, part)).last_hidden_state[0][pack.wanted]
            for row, state in zip(rows, last, strict=True):
                hidden[row] = state
            if not isinstance(cache.layers[0] if cache.layers else None, RoomyLayer):
                cache.layers = [RoomyLayer(layer.keys, layer.values, *mask.shape) for layer in part.layers]
            for layer, packed in zip(cache.layers, part.layers, strict=True):  # [1, heads, t, D] -> [b, heads, P, D]
                layer.keys[rows], layer.values[rows] = (
                    to_the_right(states, mask[rows]) for states in (packed.keys, packed.values)
                )
        return torch.stack(hidden), mask
    input_ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=trunk.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = trunk(input_ids=input_ids, attention_mask=mask, position_ids=positions, **cached(trunk, cache))
    return output.last_hidden_state[:, -1], mask


def cached(trunk: PreTrainedModel, cache: DynamicCache) -> dict[str, Any]:
    """How the trunk is given the cache, whose name changes between versions and architectures of transformers."""
    known = inspect.signature(trunk.forward).parameters
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}


def to_the_right(states: Tensor, mask: Tensor) -> Tensor:
    """Packed tokens into rows padded on the left: [1, heads, T, D], [B, P] -> [B, heads, P, D]."""
    padded = states.new_zeros(*mask.shape, states.shape[1], states.shape[3])
    padded[mask] = states[0].transpose(0, 1)
    return padded.transpose(1, 2)


def draw(logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability: logits [b, V], uniforms [b] in [0, 1) -> [b], [b].

    The inverse of the cumulative distribution at `uniforms`: one random number a row, where torch.multinomial draws one
    for every entry of the vocabulary. A token of probability 0 cannot be drawn.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, token_logprobs(logits, token)
    probabilities = torch.softmax(logits / temperature if temperature != 1 else logits, dim=-1)
    cumulative = probabilities.cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    # A GPU's running sums need not rise evenly: rounding may point at a token of probability 0.
    token = torch.where(probabilities.gather(1, token) > 0, token, probabilities.argmax(-1, keepdim=True))
    return token[:, 0], probabilities.gather(1, token)[:, 0].log()
