"""Packed sequences against each one alone: outputs and gradients; and what stays as it was for everybody else."""

import pytest
import tiny_models as tiny
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.activations import NewGELUActivation

from instructrl.trainers import packing
from instructrl.trainers.gelu import TanhGELU
from instructrl.trainers.packing import Pack, can_pack, like_length, outputs

SEQUENCES = [*tiny.sequences(9, 1, 30), [5] * 30, [7] * 30, [3]]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"vocab_size": tiny.VOCABULARY, "max_position_embeddings": tiny.CONTEXT, "initializer_range": 0.3}
GQA = {"num_key_value_heads": 2}
MODELS = {
    "gpt2": lambda: tiny.policy("gpt2", dtype=torch.float64),
    "llama": lambda: tiny.policy("llama", dtype=torch.float64),
    "gpt_neox": lambda: made(GPTNeoXConfig(**SIZE)),
    "mistral": lambda: made(MistralConfig(**SIZE, **GQA, sliding_window=None)),
    "sliding": lambda: made(MistralConfig(**SIZE, **GQA, sliding_window=4)),
    "qwen2": lambda: made(Qwen2Config(**SIZE, **GQA)),
    "qwen3": lambda: made(Qwen3Config(**SIZE, **GQA, head_dim=4)),
    "eager": lambda: AutoModelForCausalLM.from_config(tiny.config("gpt2"), attn_implementation="eager").double(),
}


def made(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).double().eval()


def wanted(sequences):
    return [range(len(ids) // 3, len(ids)) for ids in sequences]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("order", ["as they come", "sorted"])
def test_outputs_and_gradients_are_those_of_each_sequence_alone(name, order):
    model = MODELS[name]().eval()
    sequences = sorted(SEQUENCES, key=len) if order == "sorted" else SEQUENCES
    alone = [model.base_model(torch.tensor([ids])).last_hidden_state[0, len(ids) // 3 :] for ids in sequences]
    (torch.cat(alone) ** 2).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    got = outputs(model.base_model, Pack.of(sequences, wanted(sequences), tiny.PAD, "cpu"))
    (got**2).sum().backward()
    tolerance = 1e-9 if name in ("gpt2", "gpt_neox", "eager") else 1e-5  # Llama's kin compute norms in float32
    assert torch.allclose(got, torch.cat(alone), atol=tolerance)
    for mine, theirs in zip([p.grad for p in model.parameters() if p.grad is not None], expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=100 * tolerance)


def test_the_known_architectures_pack_and_a_sliding_window_does_not():
    packs = {name: can_pack(make().base_model) for name, make in MODELS.items()}
    assert packs == {name: name not in ("sliding", "eager") for name in MODELS}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_model_that_was_packed_still_reads_masks(architecture):
    """Generation by transformers itself, with padding on the left."""
    model = tiny.policy(architecture)
    prompts = tiny.sequences(5, 1, 12)
    width = max(map(len, prompts))
    ids = torch.tensor([[tiny.PAD] * (width - len(p)) + p for p in prompts])
    inputs = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(**inputs)
    assert can_pack(model.base_model)
    assert model.config._attn_implementation == packing.NAME
    assert torch.equal(model.generate(**inputs), before)


def test_a_saved_model_does_not_know_of_it(tmp_path):
    model = tiny.policy("llama")
    can_pack(model.base_model)
    model.save_pretrained(tmp_path)
    assert packing.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("lengths", [[1], [3, 3, 3], [9, 8, 7, 6, 5, 4, 3, 2, 1], [1, 9, 1, 9]])
def test_rows_padded_together_are_of_like_length(lengths):
    runs = like_length(lengths)
    assert [row for first, last in runs for row in range(first, last)] == list(range(len(lengths)))
    for first, last in runs:
        assert min(lengths[first:last]) >= 0.75 * max(lengths[first:last])


def test_the_gelu_is_gpt2s():
    """Value and gradient, far into both tails."""
    x = torch.linspace(-30, 30, 4001, dtype=torch.float64, requires_grad=True)
    theirs = NewGELUActivation()(x)
    (expected,) = torch.autograd.grad(theirs.sum(), x)
    ours = TanhGELU()(x)
    (slope,) = torch.autograd.grad(ours.sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-12)
    assert torch.allclose(slope, expected, atol=1e-12)
    assert torch.autograd.gradcheck(TanhGELU(), torch.randn(20, dtype=torch.float64, requires_grad=True))
    assert torch.allclose(TanhGELU()(x.float()), F.gelu(x.float(), approximate="tanh"), atol=2e-6)


def test_only_gpt2s_gelu_is_replaced():
    from instructrl.trainers.gelu import fuse_gelu

    model = tiny.policy("gpt2")
    ids = torch.tensor([tiny.sequences(1, 20, 20)[0]])
    before = model(ids).logits
    fuse_gelu(model)
    assert all(isinstance(block.mlp.act, TanhGELU) for block in model.transformer.h)
    assert torch.allclose(model(ids).logits, before, atol=1e-5)
    other = nn.Sequential(nn.GELU())
    fuse_gelu(other)
    assert type(other[0]) is nn.GELU
