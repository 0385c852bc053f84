"""Adapters in the stages: only they train, checkpoints hold nothing else, and the saved model is plain and merged."""

import json
import math
import random

import adapted_models
import pytest
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_sft import KillAt, Killed
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import lora, models, ppo, ppo_init, reward_model, sft
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.contract import Contract
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, TEXT, write_table
from instructrl.trainers.actor_critic import network

TEMPLATE = "{prompt} w3 "
WORDS = [f"w{number}" for number in range(3, tiny.VOCABULARY)]
PPO = {"init": "sft", "total_episodes": 48, "batch_size": 16, "num_mini_batches": 2, "response_length": 6}
PPO |= {"learning_rate": 1e-2, "critic_learning_rate": 1e-2, "warmup_iterations": 1}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 5, 4, 3, 20, 0]])


def recipe(path="unused", **changes):
    """A recipe of adapters; `changes` by section, `lora` among them."""
    adapter = {"r": 4, "alpha": 8, "dropout": 0.1} | changes.pop("lora", {})
    values = {
        "model": {"path": str(path), "template": TEMPLATE, "lora": adapter},
        "data": {"world": {}},
        "eval": {"judge": "gold"},
        "sft": {"learning_rate": 1e-2, "batch_size": 6, "epochs": 2},
        "ppo_init": {"learning_rate": 1e-2, "batch_size": 6, "epochs": 1},
        "reward_model": {"learning_rate": 1e-2, "batch_size": 4},
        "ppo": PPO,
        "ppo_ptx": PPO | {"ptx_coef": 1.0, "ptx_ratio": 0.5, "ptx_max_length": 10},
        "runtime": {"micro_batch_size": 3, "logging_steps": 1, "device": "cpu"},
    }
    for name, section in changes.items():
        values[name] = {**values[name], **section}
    return Recipe(**values)


def saving(settings):
    """The same, with a checkpoint after every step."""
    runtime = settings.runtime.model_copy(update={"save_minutes": 1e-9})
    return settings.model_copy(update={"runtime": runtime})


def text(seed, count):
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def write_tables(folder):
    """Of data, as the stages read them."""
    tables = {
        "demonstrations": ([{"prompt": text(n, 3), "response": text(-n, 4)} for n in range(1, 19)], DEMONSTRATIONS),
        "rankings": (
            [{"prompt": text(n, 3), "responses": ["w4 w5", "w6", "w7 w7"], "ranks": [1, 2, 2]} for n in range(16)],
            RANKINGS,
        ),
        "prompts": ([{"prompt": text(n, 4)} for n in range(20)], PROMPTS),
        "text": ([{"text": text(n, 12)} for n in range(20)], TEXT),
    }
    folder.mkdir()
    for name, (rows, schema) in tables.items():
        for split in ("train", "valid"):
            write_table(folder / f"{name}.{split}.parquet", rows, schema)


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def inputs(request, tmp_path_factory):
    """Artifacts of data, a random base model, and random adapters of an SFT model and a reward model."""
    folder, contract = tmp_path_factory.mktemp(request.param), Contract(tiny.tokenizer(), TEMPLATE)
    adapted_models.write(tiny.policy(request.param), contract, recipe(), folder)
    write_tables(folder / "data")
    return {name: folder / name for name in ("data", "pretrain", "sft", "reward_model")}


STAGES = {"sft": sft, "ppo_init": ppo_init, "reward_model": reward_model, "ppo": ppo, "ppo_ptx": ppo}


def run(name, settings, inputs, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return STAGES[name].run(name, settings, inputs, folder)


def weights(folder):
    return load_file(folder / "model.safetensors")


def outputs(folder, name):
    kind = AutoModelForSequenceClassification if name in ("reward_model", "critic") else AutoModelForCausalLM
    return kind.from_pretrained(folder)(IDS).logits


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_stage_trains_an_adapter_and_saves_the_merged_model(inputs, tmp_path, monkeypatch, name, checkpointing):
    """What the stock classes load from the artifact computes what the adapted model did, and has its form."""
    module, kept = STAGES[name], {}

    def trained(trainer, *args):
        loss = train(trainer, *args)
        model = trainer.model
        parts = {"model": model.policy, "critic": model.critic} if name.startswith("ppo") and module is ppo else {}
        for part, adapted in (parts or {"model": model}).items():
            assert isinstance(adapted, PeftModel)
            network(adapted).eval()
            kept[part] = network(adapted)(input_ids=IDS).logits.detach()
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(sft if module is ppo_init else module, "train", trained)
        run(name, recipe(runtime={"gradient_checkpointing": checkpointing}), inputs, tmp_path)
    for part, logits in kept.items():
        saved = outputs(tmp_path / part, "critic" if part == "critic" else name)
        torch.testing.assert_close(saved, logits, atol=1e-4, rtol=1e-4)
    before, after = weights(inputs["sft"] / "model"), weights(tmp_path / "model")
    assert after.keys() - {"score.weight"} == before.keys()
    assert not any("lora" in key or "base_layer" in key or "modules_to_save" in key for key in after)
    changed = {key for key in before.keys() & after.keys() if not torch.equal(before[key], after[key])}
    embedding = {key for key in before if "wte" in key or "wpe" in key or "embed" in key}
    assert changed
    assert not changed & embedding
    assert not any("norm" in key or "ln_" in key or "bias" in key for key in changed)


@pytest.mark.parametrize("name", ["sft", "reward_model"])
def test_a_killed_run_ends_as_one_that_was_not(inputs, tmp_path, monkeypatch, name):
    """Its checkpoint holds the adapter, and of a reward model the head, but nothing of the model."""
    settings = recipe(reward_model={"epochs": 2})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run(name, settings, inputs, straight)

    def killed(trainer, *args):
        trainer.add_callback(KillAt(4))
        return train(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(STAGES[name], "train", killed)
        with pytest.raises(Killed):
            run(name, saving(settings), inputs, resumed)
    checkpoint = sorted((resumed / FOLDER).iterdir())[-1]
    assert not (checkpoint / "model.safetensors").exists()
    saved = load_file(checkpoint / "adapter_model.safetensors")
    assert all("lora_" in key or "score" in key for key in saved)
    assert any("score" in key for key in saved) == (name == "reward_model")
    run(name, settings, inputs, resumed)
    whole, parts = weights(straight / "model"), weights(resumed / "model")
    for key, weight in whole.items():
        assert torch.equal(weight, parts[key]), key


def test_a_killed_ppo_ends_as_one_that_was_not(inputs, tmp_path, monkeypatch):
    settings = recipe(ppo={"ema_decay": 0.9})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run("ppo", settings, inputs, straight)

    def killed(trainer, *args):
        trainer.add_callback(KillAt(5))
        return train(trainer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ppo, "train", killed)
        with pytest.raises(Killed):
            run("ppo", saving(settings), inputs, resumed)
    checkpoint = resumed / FOLDER / "checkpoint-4"
    files = {path.name for path in checkpoint.rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors", "ema.safetensors"}
    run("ppo", settings, inputs, resumed)
    for part in ("model", "critic", "ema"):
        whole, parts = weights(straight / part), weights(resumed / part)
        assert all(torch.equal(weight, parts[key]) for key, weight in whole.items()), part


def test_ppo_starts_at_its_reference_and_averages_its_adapter(inputs, tmp_path):
    run("ppo", recipe(), inputs, tmp_path)
    first, second, *_ = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-3
    start, last, average = (
        weights(folder) for folder in (inputs["sft"] / "model", tmp_path / "model", tmp_path / "ema")
    )
    moved = [key for key in start if not torch.equal(start[key], last[key])]
    assert all(0 < (average[key] - start[key]).norm() < 0.5 * (last[key] - start[key]).norm() for key in moved)


def test_a_reward_models_head_is_trained_in_full(inputs, tmp_path):
    """Beside a run whose rates are 0 to the fourth digit, which so leaves the head as it was drawn."""
    run("reward_model", recipe(), inputs, tmp_path / "trained")
    run("reward_model", recipe(reward_model={"learning_rate": 1e-9}), inputs, tmp_path / "still")
    trained, still = (weights(tmp_path / name / "model")["score.weight"] for name in ("trained", "still"))
    assert (trained - still).abs().min() > 1e-3
    assert 0.1 < still.std() < 0.5  # 1 / sqrt(17) as drawn


def test_in_bfloat16_adapter_and_head_stay_float32(inputs):
    settings = recipe(model={"dtype": "bfloat16", "lora": {"r": 4}})
    base = models.init_reward_model(inputs["sft"] / "model", settings)
    adapted = lora.adapted(base, settings)
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert adapted(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.isfinite().all()
    with torch.no_grad():
        for p in trained.values():
            p.add_(0.01)
    merged = lora.merged_weights(adapted)
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    assert merged["score.weight"].equal(base.score.modules_to_save["default"].weight.to(torch.bfloat16))


def test_merging_twice_gives_the_same_weights(inputs):
    settings = recipe(model={"dtype": "bfloat16", "lora": {"r": 4}})
    adapted = lora.adapted(models.load_policy(inputs["sft"] / "model", settings), settings)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.add_(1e-2 if "lora_" in name else 0)
    first, second = lora.merged_weights(adapted), lora.merged_weights(adapted)
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())


def test_the_update_is_scaled_by_alpha_over_r(inputs):
    """One matrix by hand: W + alpha / r B A, transposed in GPT-2."""
    settings = recipe(lora={"r": 2, "alpha": 6})
    model = models.load_policy(inputs["sft"] / "model", settings)
    adapted = lora.adapted(model, settings)
    name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, lora.LoraLayer))
    assert math.prod(layer.lora_B["default"].weight.shape) == 2 * layer.out_features
    torch.manual_seed(3)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    update = 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    update = update.T if "attn.c_" in name or "mlp.c_" in name else update
    before = layer.base_layer.weight.clone()
    torch.testing.assert_close(lora.merged_weights(adapted)[f"{name}.weight"], before + update)
    assert torch.equal(layer.base_layer.weight, before)


def test_only_the_named_matrices_are_adapted_and_others_are_refused(inputs):
    model = models.load_policy(inputs["sft"] / "model", recipe())
    known = {"gpt2": "c_fc", "llama": "v_proj"}[model.config.model_type]
    adapted = lora.adapted(model, recipe(lora={"target_modules": [known]}))
    assert {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in adapted.named_parameters() if p.requires_grad
    } == {known}
    for wrong in ("query", "lm_head", "score"):
        model = models.load_policy(inputs["sft"] / "model", recipe())
        with pytest.raises(UserError, match=rf"model\.lora\.target_modules: '{wrong}' .* there are .*{known}"):
            lora.adapted(model, recipe(lora={"target_modules": [known, wrong]}))


def test_without_the_key_nothing_is_adapted(inputs):
    model = tiny.policy("llama")
    plain = recipe(model={"lora": None})
    assert lora.adapted(model, plain) is model
    assert lora.merged_weights(model) is None


def test_muon_is_refused():
    with pytest.raises(ValueError, match=r"sft\.muon_learning_rate is for all weights of small models; set it to null"):
        recipe(sft={"muon_learning_rate": 0.01})


@pytest.mark.parametrize(("changes", "key"), [({}, "model.lora"), ({"model": {"lora": None}}, "runtime.bf16")])
def test_trls_ppo_trainer_is_refused_with_a_sentence(changes, key):
    settings = recipe(ppo=PPO | {"backend": "trl"}, runtime={"bf16": True}, **changes)
    with pytest.raises(
        UserError, match=rf"{key} is for our own PPOTrainer, not for TRL's: set ppo\.backend=instructrl"
    ):
        ppo.check(settings)
