"""Sampling and scoring against one forward pass a sequence, without padding and without a cache. T3 and T4's ground."""

import pytest
import tiny_models as tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from instructrl.trainers import rollout
from instructrl.trainers.actor_critic import disable_dropout

PROMPTS = tiny.sequences(13, 1, 20)
SAMPLING = {"eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}


def generate(model, prompts=PROMPTS, seed=0, max_new_tokens=16, temperature=1.0, **options):
    generator = torch.Generator().manual_seed(seed)
    options = (
        {"generator": generator, "max_new_tokens": max_new_tokens, "temperature": temperature} | SAMPLING | options
    )
    return rollout.generate(model, prompts, **options)


@torch.no_grad()
def logprobs_alone(model, prompt, response, temperature):
    """The sequence by itself: one unpadded forward pass through the whole model."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    logits[:, tiny.PAD] = -torch.inf
    return logits.log_softmax(-1)[range(len(response)), response]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_sampler_scorer_and_each_sequence_alone_agree(architecture, temperature):
    """Left-padded with a cache, right-padded, unpadded: the same, if GPT-2's positions are right."""
    model = tiny.policy(architecture)
    completions = generate(model, temperature=temperature, batch_size=8)
    lengths = {len(completion.ids) for completion in completions}
    assert len(lengths) > 3  # some ended early, so rows have left the batch
    together = [prompt + completion.ids for prompt, completion in zip(PROMPTS, completions, strict=True)]
    scored = rollout.score_logprobs(
        model, together, list(map(len, PROMPTS)), temperature=temperature, pad_token_id=tiny.PAD, max_tokens=70
    )
    for prompt, completion, score in zip(PROMPTS, completions, scored, strict=True):
        alone = logprobs_alone(model, prompt, completion.ids, temperature)
        assert torch.allclose(completion.logprobs, alone, atol=1e-5)
        assert torch.allclose(score, alone, atol=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_values_and_rewards_do_not_depend_on_padding(architecture):
    model, starts = tiny.reward_model(architecture), [max(1, len(prompt) // 2) for prompt in PROMPTS]
    rewards = rollout.score_rewards(model, PROMPTS, pad_token_id=tiny.PAD, max_tokens=60)
    values = rollout.score_values(model, PROMPTS, starts, pad_token_id=tiny.PAD, max_tokens=60)
    with torch.no_grad():
        for ids, start, reward, value in zip(PROMPTS, starts, rewards, values, strict=True):
            assert reward.item() == pytest.approx(model(torch.tensor([ids])).logits.item(), abs=1e-5)
            before = [model(torch.tensor([ids[:end]])).logits.item() for end in range(start, len(ids))]
            assert value.tolist() == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_greedy_takes_the_likeliest_token_at_every_step(architecture):
    model = tiny.policy(architecture)
    for prompt, completion in zip(PROMPTS, generate(model, temperature=0), strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + 16 and (len(ids) == len(prompt) or ids[-1] != tiny.EOS):
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            logits[tiny.PAD] = -torch.inf
            ids.append(int(logits.argmax()))
        assert completion.ids == ids[len(prompt) :]


def test_sampling_is_reproducible_whatever_the_global_generator_and_the_batches():
    model = tiny.policy("llama")
    torch.manual_seed(1)
    first = [completion.ids for completion in generate(model)]
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert [completion.ids for completion in generate(model, batch_size=3)] == first
    assert [completion.ids for completion in generate(model, seed=1)] != first
    torch.manual_seed(1)
    generate(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_each_prompt_has_its_own_random_numbers():
    model, uniforms = tiny.policy("llama"), torch.rand(len(PROMPTS), 16, generator=torch.Generator().manual_seed(3))
    every = generate(model, uniforms=uniforms)
    some = generate(model, PROMPTS[4:7], uniforms=uniforms[4:7])
    assert [completion.ids for completion in some] == [completion.ids for completion in every[4:7]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    logits = torch.randn(1, 9, generator=torch.Generator().manual_seed(0))
    logits[0, 4] = -torch.inf
    count = 200_000
    uniforms = (torch.arange(count) + 0.5) / count  # an even grid: frequencies are probabilities up to 1 / count
    tokens, logprobs = rollout.draw(logits.expand(count, -1), temperature, uniforms)
    expected = (logits[0] / temperature).softmax(0)
    assert torch.allclose(tokens.bincount(minlength=9) / count, expected, atol=2 / count + 1e-6)
    assert torch.allclose(logprobs.exp(), expected[tokens], atol=1e-6)


def test_the_largest_uniform_draws_the_last_token_that_has_a_probability():
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    token, _ = rollout.draw(logits, 1.0, torch.tensor([1 - 2**-24]))
    assert token.item() == 1


def test_the_padding_token_is_never_sampled():
    model = tiny.policy("llama")
    with torch.no_grad():
        embeddings = model.get_output_embeddings().weight
        embeddings[tiny.PAD] = embeddings.mean(0) * 50  # whatever an untrained row may hold
    assert all(tiny.PAD not in completion.ids for completion in generate(model))


def test_responses_end_with_eos_a_stop_token_or_at_the_limit():
    model = tiny.policy("gpt2")
    stops = [5, 9]
    for completion in generate(model, max_new_tokens=8, stop_token_ids=stops):
        assert 1 <= len(completion.ids) <= 8
        assert not {tiny.EOS, *stops} & set(completion.ids[:-1])
        assert completion.ids[-1] in (tiny.EOS, *stops) or len(completion.ids) == 8
        assert completion.logprobs.shape == (len(completion.ids),)


def test_finished_rows_leave_the_batch():
    model, rows = tiny.policy("llama"), []
    model.base_model.register_forward_pre_hook(
        lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    completions = generate(model, max_new_tokens=24, stop_token_ids=list(range(3, 9)))
    assert rows[0] == 1  # the prompts, packed
    rows[0] = len(PROMPTS)
    needed = [sum(len(c.ids) > step for c in completions) for step in range(len(rows))]
    assert rows[-1] < len(PROMPTS) / 2
    assert all(
        have >= need and have * rollout.DROP_BELOW <= max(need, 1) for have, need in zip(rows, needed, strict=True)
    )


def test_a_model_that_has_diverged_is_named_as_such():
    model = tiny.policy("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        generate(model)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="a prompt has no tokens"):
        generate(tiny.policy("llama"), [[3], []])


SMALL = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": tiny.PAD, "initializer_range": 0.5}


@pytest.mark.parametrize(
    "make",
    [
        lambda: tiny.policy("gpt2"),
        lambda: tiny.policy("llama"),
        lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
        lambda: GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=3.0)),
    ],
    ids=["gpt2", "llama", "gemma2", "cohere", "granite"],
)
@torch.no_grad()
def test_the_head_gives_the_logits_of_the_whole_model(make):
    model, ids = make().eval(), torch.tensor([[3, 7, 5, 11]])
    logits = rollout.next_token_logits(model, model.base_model(ids).last_hidden_state, tiny.PAD)
    expected = model(ids).logits
    assert (logits[..., tiny.PAD] == -torch.inf).all()
    others = [token for token in range(24) if token != tiny.PAD]
    assert torch.allclose(logits[..., others], expected[..., others], atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_length_batches_hold_every_row_once_within_the_bound(lengths, max_tokens):
    batches = rollout.length_batches(lengths, max_tokens)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
    longest = [max(lengths[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_dropout_is_off_and_the_configuration_untouched():
    gpt2 = tiny.policy("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    llama = tiny.policy("llama", attention_dropout=0.5)
    ids = torch.tensor([[3, 4, 5, 6, 7, 8]])
    for model in (gpt2, llama):
        expected = model(ids).logits
        disable_dropout(model)
        assert torch.equal(model.train()(ids).logits, expected)
    assert gpt2.config.resid_pdrop == llama.config.attention_dropout == 0.5
