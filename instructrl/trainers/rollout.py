"""Sampling responses, and scoring them: log-probabilities, values and rewards of token sequences.

A sequence is a prompt's ids followed by a response's. Only the sampler pads on the left; everything else pads on the
right, where causal attention never looks, so that positions count from 0 and no attention mask is needed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from instructrl.trainers.losses import token_logprobs

DROP_BELOW = 0.75  # finished rows leave the batch when fewer than this share of it goes on: leaving copies the cache


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
    logits = model.get_output_embeddings()(hidden)
    scale, cap = logit_transform(model)
    if scale != 1.0:
        logits = logits * scale
    if cap:
        logits = torch.tanh(logits / cap) * cap
    if pad_token_id is None:
        return logits
    pad = torch.zeros(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    pad[pad_token_id] = float("-inf")
    return logits + pad


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """(scale, soft cap) of the few models whose logits are more than head(hidden): Cohere, Granite, Gemma."""
    config = model.config
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    return scale, getattr(config, "final_logit_softcapping", None)


def response_logprobs(
    model: PreTrainedModel, input_ids: Tensor, predicts: Tensor, temperature: float, pad_token_id: int | None
) -> Tensor:
    """log p of the tokens that follow the positions in `predicts`, flat in row-major order.

    input_ids, predicts [B, T] (right-padded) -> [M]. Prompt and padding positions never reach the head: on a large
    vocabulary it is the most expensive layer.
    """
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[predicts]  # [M, H]
    logits = next_token_logits(model, hidden, pad_token_id)  # [M, V]
    targets = input_ids.roll(-1, dims=1)[predicts]  # [M]
    return token_logprobs(logits, targets, temperature or 1.0)


def token_scores(model: PreTrainedModel, input_ids: Tensor, where: Tensor) -> Tensor:
    """A reward model's or critic's scalar at the positions in `where`. input_ids, where [B, T] -> [M]."""
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[where]
    scores = model.score(hidden)[:, 0]
    return scores if scores.dtype == torch.float64 else scores.float()


# ---- sequences of different lengths ----------------------------------------------------------------------------------


def length_batches(lengths: Sequence[int], max_tokens: int, max_rows: int | None = None) -> list[list[int]]:
    """Row numbers in batches of like length, longest first, each of at most `max_tokens` after padding, or one row."""
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row], reverse=True):
        size = len(batches[-1]) + 1 if batches else 0
        if batches and size <= (max_rows or size) and size * max(lengths[batches[-1][0]], 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def pad_right(sequences: Sequence[Sequence[int]], pad_token_id: int, device: torch.device | str) -> Tensor:
    """[B, T] int64."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(device)


def predicting_positions(sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], device) -> Tensor:
    """[B, T] bool: the positions whose next token belongs to the response."""
    columns = torch.arange(max(map(len, sequences)))[None]
    start = torch.tensor(prompt_lengths)[:, None] - 1
    end = torch.tensor([len(sequence) for sequence in sequences])[:, None] - 1
    return ((columns >= start) & (columns < end)).to(device)


def _padded(
    sequences: Sequence[Sequence[int]], prompt_lengths: Sequence[int], pad_token_id: int, max_tokens: int, device
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """(row numbers, input_ids [b, T], predicts [b, T]) for each length-sorted batch."""
    for rows in length_batches([len(sequence) for sequence in sequences], max_tokens):
        batch, starts = [sequences[row] for row in rows], [prompt_lengths[row] for row in rows]
        yield rows, pad_right(batch, pad_token_id, device), predicting_positions(batch, starts, device)


def _per_response(flat: Iterable[tuple[list[int], Tensor]], lengths: Sequence[int]) -> list[Tensor]:
    """Cut each batch's flat result [M] into its rows' tensors, in the order of the rows' numbers."""
    result: list[Tensor] = [torch.empty(0)] * len(lengths)
    for rows, values in flat:
        for row, part in zip(rows, values.cpu().split([lengths[row] for row in rows]), strict=True):
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
    """Log-probabilities of each sequence's response tokens: [response length] float32 on the CPU, one a sequence."""
    lengths = [len(sequence) - start for sequence, start in zip(sequences, prompt_lengths, strict=True)]
    batches = _padded(sequences, prompt_lengths, pad_token_id, max_tokens, model.device)
    flat = ((rows, response_logprobs(model, ids, where, temperature, pad_token_id)) for rows, ids, where in batches)
    return _per_response(flat, lengths)


@torch.no_grad()
def score_values(
    critic: PreTrainedModel,
    sequences: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    *,
    pad_token_id: int,
    max_tokens: int,
) -> list[Tensor]:
    """The critic's scalar before each response token: [response length] float32 on the CPU, one a sequence."""
    lengths = [len(sequence) - start for sequence, start in zip(sequences, prompt_lengths, strict=True)]
    batches = _padded(sequences, prompt_lengths, pad_token_id, max_tokens, critic.device)
    return _per_response(((rows, token_scores(critic, ids, where)) for rows, ids, where in batches), lengths)


@torch.no_grad()
def score_rewards(
    reward_model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, pad_token_id: int, max_tokens: int
) -> Tensor:
    """The reward model's scalar at each sequence's last token: [B] float64 on the CPU. No bias is subtracted."""
    rewards = torch.zeros(len(sequences), dtype=torch.float64)
    for rows in length_batches([len(sequence) for sequence in sequences], max_tokens):
        batch = [sequences[row] for row in rows]
        last = torch.tensor([len(sequence) - 1 for sequence in batch])
        where = (torch.arange(max(map(len, batch)))[None] == last[:, None]).to(reward_model.device)
        input_ids = pad_right(batch, pad_token_id, reward_model.device)
        rewards[rows] = token_scores(reward_model, input_ids, where).double().cpu()
    return rewards


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
    stop_token_ids: Sequence[int] = (),
) -> list[Completion]:
    """One response to each prompt, by ancestral sampling from the full softmax of logits / temperature; 0 is greedy.

    Nothing truncates the distribution (no top-k, top-p, minimum length or repetition penalty): PPO's ratio and KL mean
    nothing if tokens are drawn from another distribution than the one that is scored. Only the padding token is out.

    The randomness is `uniforms` [len(prompts), max_new_tokens] in [0, 1), by default drawn on the CPU from `generator`:
    one number a token, fixed before decoding. So a response depends neither on the global generator nor (rounding
    apart) on `batch_size` and the prompts in its batch. Greedy log-probabilities are those at temperature 1.

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
            rows, _generate_batch(model, batch, max_new_tokens, temperature, stops, pad_token_id, numbers), strict=True
        ):
            completions[row] = completion
    model.train(was_training)
    return completions


def _generate_batch(model, prompts, max_new_tokens, temperature, stops, pad_token_id, uniforms) -> list[Completion]:
    """Decode one batch with a KV cache. Rows that have finished leave the batch, cache and all."""
    device, size, width = model.device, len(prompts), max(map(len, prompts))
    input_ids = torch.tensor([[pad_token_id] * (width - len(p)) + list(p) for p in prompts], device=device)  # [B, P]
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    # Absolute positions (GPT-2) must count from each row's first real token, not from the padding.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    tokens = torch.full((size, max_new_tokens), pad_token_id, device=device)
    logprobs = torch.zeros((size, max_new_tokens), device=device)
    lengths = torch.full((size,), max_new_tokens, device=device)
    rows = torch.arange(size, device=device)  # which prompt each row of the batch answers
    going = torch.ones(size, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        output = model.base_model(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        logits = next_token_logits(model, output.last_hidden_state[:, -1], pad_token_id)  # [b, V]
        token, logprob = draw(logits, temperature, None if uniforms is None else uniforms[rows, step])
        tokens[rows, step], logprobs[rows, step] = token, logprob  # rows past their end write beyond it: cut below
        ended = going & torch.isin(token, stops)
        lengths[rows[ended]] = step + 1
        going = going & ~ended
        remaining = int(going.sum())
        if remaining == 0 or step == max_new_tokens - 1:
            break
        positions = positions[:, -1:] + 1
        if remaining < DROP_BELOW * len(rows):
            keep = going.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            rows, token, mask, positions, going = rows[keep], token[keep], mask[keep], positions[keep], going[keep]
        input_ids, mask = token[:, None], torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    if not torch.isfinite(logprobs).all():
        raise FloatingPointError("the policy's logits are not numbers: training has diverged; lower the learning rate")
    ids, cut, logprobs = tokens.tolist(), lengths.tolist(), logprobs.cpu()
    return [Completion(ids[row][: cut[row]], logprobs[row, : cut[row]].clone()) for row in range(size)]


def draw(logits: Tensor, temperature: float, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """One token a row and its log-probability: logits [b, V], uniforms [b] in [0, 1) -> [b], [b].

    The inverse of the cumulative distribution at `uniforms`: one random number a row, where torch.multinomial draws one
    for every entry of the vocabulary. A token of probability 0 cannot be drawn.
    """
    logits = logits.float()
    if temperature == 0:
        token = logits.argmax(-1)
        return token, token_logprobs(logits, token)
    logprobs = torch.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
    cumulative = logprobs.exp().cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[-1] - 1)
    return token[:, 0], logprobs.gather(1, token)[:, 0]
