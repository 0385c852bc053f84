"""Adapters on a base model in 4 bits (`model.lora.quantization: nf4`)."""

import importlib.util

import adapted_models
import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from test_lora import STAGES, TEMPLATE, recipe, run, saving, write_tables
from test_sft import KillAt, Killed
from test_shared_base import NAMES, logits, merged, roles
from transformers import AutoModelForCausalLM

from instructrl.errors import UserError
from instructrl.stages import base_model, lora, models
from instructrl.stages.checkpoints import train
from instructrl.stages.contract import Contract
from instructrl.trainers.actor_critic import network

NF4 = {"quantization": "nf4"}
installed = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_a_missing_library_is_missed_before_anything_runs(instructrl, here):
    asked = ["recipe=base.yaml", "model.lora={quantization: nf4}"]
    done = instructrl("run-all", *asked)
    assert (done.code, done.out) == (2, "")
    assert "model.lora.quantization=nf4 needs bitsandbytes: pip install 'instructrl[qlora]'" in done.err
    assert not (here / "artifacts" / "data").exists()
    assert instructrl("plan", *asked).code == 0


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def packed(request, tmp_path_factory):
    """As `inputs` in test_lora, the adapters on a base in 4 bits, which is wide enough for blocks of 64."""
    kind, folder = request.param, tmp_path_factory.mktemp("packed")
    size = {"n_embd": 64} if kind == "gpt2" else {"hidden_size": 64, "intermediate_size": 128}
    base = tiny.policy(kind, **size, tie_word_embeddings=kind == "gpt2", initializer_range=0.1)
    adapted_models.write(base, Contract(tiny.tokenizer(), TEMPLATE), recipe(lora=NF4), folder)
    write_tables(folder / "data")
    return {name: folder / name for name in ("data", "pretrain", "sft", "reward_model")}


@installed
def test_the_roles_share_the_packed_base_and_compute_what_the_merged_models_do(packed):
    made = roles(packed, recipe(lora=NF4))
    matrices = [p for p in made.policy.parameters() if p.dtype == torch.uint8]
    assert len(matrices) == 2 * {"gpt2": 4, "llama": 7}[made.policy.config.model_type]
    shared = {p.data_ptr() for p in matrices}
    for name in NAMES:
        role = getattr(made, name)
        assert {p.data_ptr() for p in role.parameters() if p.dtype == torch.uint8} == shared
        plain = "reward_model" if name in ("critic", "reward_model") else "sft"
        torch.testing.assert_close(logits(role), logits(merged(packed, plain)), atol=1e-5, rtol=1e-5)


@installed
def test_an_unchanged_base_merges_to_its_rounded_weights(packed, tmp_path):
    """Each number is one of 16 times its block's constant: here, of a new adapter, to be seen in what is saved."""
    settings = recipe(lora=NF4)
    contract = Contract.load(packed["sft"] / "model")
    base = base_model.load(packed, settings, contract)
    assert base_model.digest(base) == base_model.digest(network(lora.adapted(base_model.twin(base), settings)))
    lora.save(lora.adapted(base, settings), contract, tmp_path, {})
    exact, rounded = (
        load_file(packed["pretrain"] / "model/model.safetensors"),
        load_file(tmp_path / "model.safetensors"),
    )
    assert exact.keys() == rounded.keys()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(plain.config, "quantization_config")
    for name, weight in exact.items():
        if "embed" in name or "wte" in name or "wpe" in name or "norm" in name or "ln_" in name or "bias" in name:
            assert torch.equal(rounded[name], weight), name
        elif "lm_head" not in name:
            assert not torch.equal(rounded[name], weight), name
            assert (rounded[name] - weight).norm() < 0.12 * weight.norm(), name  # nf4's error on normal numbers: .09
            stored = weight.T if "attn.c_" in name or "mlp.c_" in name else weight  # as the base is packed
            blocks = (rounded[name].T if stored is not weight else rounded[name]).reshape(-1, 64)
            assert max(len(block.unique()) for block in blocks) <= 16


@installed
@pytest.mark.parametrize("name", ["sft", "reward_model", "ppo_ptx"])
def test_adapters_stay_float32_and_a_killed_run_ends_as_one_that_was_not(packed, tmp_path, monkeypatch, name):
    """TRL would round a quantized model's adapter to bfloat16."""
    settings = recipe(lora=NF4, **{name: {"epochs": 2} if name in ("sft", "reward_model") else {"ema_decay": 0.9}})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(name, settings, packed, straight)

    def killed(trainer, *args):
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        trainer.add_callback(KillAt(4 if name in ("sft", "reward_model") else 5))
        return train(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[name], "train", killed)
        with pytest.raises(Killed):
            run(name, saving(settings), packed, resumed)
    run(name, settings, packed, resumed)
    files = sorted(
        path.relative_to(straight) for path in straight.rglob("*.safetensors") if "checkpoints" not in str(path)
    )
    assert files
    for file in files:
        assert (straight / file).read_bytes() == (resumed / file).read_bytes(), file
    assert not any(p.dtype == torch.uint8 for p in models.load_policy(packed["sft"] / "model", settings).parameters())


@installed
def test_a_width_that_bitsandbytes_reads_wrongly_on_a_cpu_is_refused(packed, tmp_path):
    wide = tiny.policy("llama", hidden_size=64, intermediate_size=96)
    models.save(wide, Contract.load(packed["sft"] / "model"), tmp_path)
    with pytest.raises(UserError, match=r"mlp\.down_proj reads 96 numbers, and on a CPU that must be a multiple of 64"):
        models.load_base(tmp_path, recipe(lora=NF4))
