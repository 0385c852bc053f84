"""The memory that an estimate counts, beside the tensors that autograd keeps and a process that is measured."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from instructrl.config import Recipe
from instructrl.estimate_memory import LIBRARIES, Passes, peak, phases
from instructrl.shapes import Shape, shape_of
from instructrl.stages.sft import residual_dropout
from instructrl.trainers import rollout
from instructrl.trainers.actor_critic import disable_dropout
from instructrl.trainers.gelu import fuse_gelu
from instructrl.trainers.packing import Pack

TEXT = {"text": [{"path": "text.txt"}]}
ROWS, LENGTH, WIDTH = 3, 48, 64
SIZE = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4, "max_position_embeddings": 64}
MODELS = {
    "gpt2": ("gpt2", "n_layer", {"n_embd": WIDTH, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.0}),
    "gpt2 with attention dropout": ("gpt2", "n_layer", {"n_embd": WIDTH, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", "num_hidden_layers", SIZE),
    "llama": ("llama", "num_hidden_layers", SIZE),
    "qwen2, grouped": ("qwen2", "num_hidden_layers", SIZE | {"num_key_value_heads": 2}),
}


def recipe(**sections):
    return Recipe.model_validate({"data": TEXT} | sections)


def kept(model, call):
    """Bytes of the tensors that a forward pass keeps for the backward pass, each storage once, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept alive, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = call()
    del output
    return sum(size for place, (size, _) in found.items() if place not in weights)


@pytest.mark.parametrize("dropout", [0.0, 0.2, None], ids=["padded", "padded, dropout", "packed"])
@pytest.mark.parametrize("name", MODELS)
def test_a_layer_keeps_what_is_counted(name, dropout):
    """What two more layers add, of PPO's packed rows (None) and of the padded rows of sft and reward_model."""
    kind, layers, size = MODELS[name]
    packed, measured = dropout is None, []
    ids = torch.randint(2, 40, (ROWS, LENGTH))
    for count in (1, 3):
        config = AutoConfig.for_model(kind, vocab_size=40, **size, **{layers: count})
        model = AutoModelForCausalLM.from_config(config).train()
        if packed:
            disable_dropout(model)
            fuse_gelu(model)
            pack = Pack.of(ids.tolist(), [range(LENGTH - 1)] * ROWS, 0, "cpu")
            measured.append(kept(model, lambda m=model, p=pack: rollout.outputs(m.base_model, p)))
            continue
        mask = torch.ones_like(ids)
        mask[0, -3:] = 0
        with residual_dropout(model, dropout):
            call = lambda m=model, k=mask: m.base_model(input_ids=ids, attention_mask=k, use_cache=False)  # noqa: E731
            measured.append(kept(model, call))
    passes = Passes(recipe(), "cpu", packed, dropout or 0.0)
    expected = passes.layer(shape_of(config.to_dict()), LENGTH)
    assert (measured[1] - measured[0]) / 2 / (ROWS * LENGTH) == pytest.approx(expected, rel=0.01)


def test_the_four_models_of_ppo_ptx_by_hand():
    """At the step: weights of four models, moments of two, an average, and the policy's gradient three times."""
    shape = Shape("gpt2", 1000, 64, 4, 4, 4, 16, 256, 64, tied=True)
    short = {"total_episodes": 8, "batch_size": 8, "num_mini_batches": 2, "response_length": 16}
    every = phases("ppo_ptx", recipe(ppo_ptx=short, data=TEXT | {"max_prompt_tokens": 32}), shape, "cuda")
    found = {phase.name: phase for phase in every}
    policy, scalar = 4 * shape.policy, 4 * shape.scalar
    models = 2 * policy + 2 * scalar + policy + 2 * (policy + scalar)
    assert found["step"].total == LIBRARIES["cuda"] + models + 3 * policy + scalar
    # 8 rows of 32 + 16 tokens and room for 32 more, each of 4 layers' keys and values; and the prompts' own, packed
    assert found["rollout"].parts["KV cache"] == (8 * (48 + 32) + 8 * 32) * 4 * 2 * 64 * 4
    assert found["update of the policy"].parts["logits"] == 4 * 16 * 1000 * 4 * 3


@pytest.mark.parametrize(("quantization", "matrix"), [(None, 2), ("nf4", (4 + 0.127) / 8)])
def test_adapters_on_one_base_by_hand(quantization, matrix):
    """At the step: the base once, four adapters and two heads, moments and gradients of two of each, an average."""
    shape = Shape("gpt2", 1000, 64, 4, 4, 4, 16, 256, 64, tied=True)
    short = {"total_episodes": 8, "batch_size": 8, "num_mini_batches": 2, "response_length": 16}
    model = {"lora": {"r": 8, "quantization": quantization}, "dtype": "bfloat16"}
    every = phases("ppo", recipe(ppo=short, model=model, data=TEXT | {"max_prompt_tokens": 32}), shape, "cuda")
    found = {phase.name: phase for phase in every}
    matrices = 4 * (64 * 192 + 64 * 64 + 2 * 64 * 256)
    adapter = 4 * 8 * ((64 + 192) + (64 + 64) + 2 * (64 + 256))
    base = 2 * (shape.policy - matrices) + matrix * matrices
    learnt = adapter + (adapter + 64)
    held = base + 4 * (4 * adapter + 2 * 64) + 4 * adapter + 2 * 4 * learnt
    assert found["step"].total == pytest.approx(LIBRARIES["cuda"] + held + 4 * learnt, abs=1)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "ppo", "ppo_ptx"])
def test_adapters_and_checkpointing_take_less(stage):
    shape = shape_of({"model_type": "gpt2"})
    full = peak(phases(stage, recipe(), shape, "cuda")).total
    assert peak(phases(stage, recipe(model={"lora": {}}), shape, "cuda")).total < full
    every = phases(stage, recipe(), shape, "cuda")
    fewer = phases(stage, recipe(runtime={"gradient_checkpointing": True}), shape, "cuda")
    for one, other in zip(every, fewer, strict=True):
        assert other.parts.get("activations", 0) <= one.parts.get("activations", 0)


@pytest.mark.slow
def test_a_stage_takes_what_was_estimated(monkeypatch):
    """One workload of `make bench-estimate`."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import bench_estimate

    assert abs(bench_estimate.line("ppo-llama-30m")["error"]) < bench_estimate.ALLOWED
