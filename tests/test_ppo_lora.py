"""PPO on a policy with a LoRA adapter: the reference is the policy without it."""

import pytest
import tiny_models as tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from test_ppo import Interrupt, distance, log, trained, trainer, weights
from transformers import AutoModelForCausalLM

from instructrl.stages.base_model import twin

TARGETS = {"gpt2": ["c_attn", "c_fc"], "llama": ["q_proj", "v_proj", "down_proj"]}


def lora(architecture, **options):
    fan = {"fan_in_fan_out": True} if architecture == "gpt2" else {}
    return LoraConfig(r=4, target_modules=TARGETS[architecture], lora_dropout=0.3, **fan, **options)


def with_adapter(architecture):
    return {"peft_config": lora(architecture)}


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_reference_is_the_policy_without_its_adapter(tmp_path, architecture):
    made = trained(tmp_path, architecture, models=with_adapter(architecture), learning_rate=1e-2, ptx_coef=0.1)
    assert made.ref_model is None
    first, second = log(made)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(second["objective/kl"]) > 1e-3
    copied = trained(
        tmp_path,
        architecture,
        models=with_adapter(architecture) | {"ref_model": tiny.policy(architecture)},
        learning_rate=1e-2,
        ptx_coef=0.1,
    )
    assert distance(weights(made.model), weights(copied.model)) < 1e-6
    assert log(copied)[1]["objective/kl"] == pytest.approx(second["objective/kl"], abs=1e-5)


def test_only_the_adapter_changes_and_is_averaged(tmp_path):
    made = trained(tmp_path, models=with_adapter("llama"), learning_rate=1e-2)
    start = weights(tiny.policy("llama"))
    frozen = {name: p for name, p in made.model.policy.named_parameters() if "lora" not in name}
    for name, p in frozen.items():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(p, start[plain])
    assert made.ema.averages.keys() == {name for name, _ in made.model.policy.named_parameters() if "lora" in name}


def test_critic_and_policy_may_both_be_adapters(tmp_path):
    critic = get_peft_model(tiny.reward_model("llama"), lora("llama", modules_to_save=["score"]))
    made = trained(tmp_path, models=with_adapter("llama") | {"value_model": critic}, learning_rate=1e-2)
    assert all(torch.isfinite(p).all() for p in made.model.parameters())
    moved = [name for name, p in made.model.critic.named_parameters() if p.requires_grad]
    assert any("score" in name for name in moved)
    assert any("lora" in name for name in moved)


def test_a_larger_reward_model_and_an_adapter_on_it_as_critic(tmp_path):
    """As in the paper, where a reward model of 6B trains policies of all sizes. The critic needs its weights no second
    time; and whoever trains a weight that another role has is refused."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    reward_model = tiny.reward_model("llama", **size).requires_grad_(False)
    critic = get_peft_model(twin(reward_model), lora("llama", modules_to_save=["score"]))
    before = weights(reward_model)
    models = with_adapter("llama") | {"value_model": critic, "reward_model": reward_model}
    made = trained(tmp_path, models=models, learning_rate=1e-2)
    assert distance(before, weights(reward_model)) == 0
    base = {p.data_ptr() for p in reward_model.parameters()}
    assert sum(p.data_ptr() in base for p in made.model.critic.parameters()) == len(base)
    assert all(name.startswith("critic.") for name, p in made.model.named_parameters() if p.data_ptr() in base)
    reward_model.requires_grad_(True)
    with pytest.raises(ValueError, match="value_model shares its weights with another model"):
        trainer(tmp_path / "wrong", models=models | {"model": tiny.policy("llama")})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, architecture):
    options = {"total_episodes": 32, "ema_decay": 0.9, "kl_target": 0.1, "kl_horizon": 50, "learning_rate": 1e-2}
    whole = trained(tmp_path / "whole", architecture, models=with_adapter(architecture), **options)
    parts = tmp_path / "parts"
    trained(parts, architecture, callbacks=[Interrupt(3)], models=with_adapter(architecture), **options)
    torch.manual_seed(99)
    resumed = trainer(parts, architecture, models=with_adapter(architecture), **options)
    resumed.train(resume_from_checkpoint=str(parts / "checkpoint-4"))
    assert distance(weights(whole.model), weights(resumed.model)) == 0
    assert distance(whole.ema.averages, resumed.ema.averages) == 0
    assert whole.kl.coef == resumed.kl.coef


def test_the_adapter_is_saved_and_merges_to_the_same_policy(tmp_path):
    made = trained(tmp_path, models=with_adapter("llama"), learning_rate=1e-2)
    made.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model" / "adapter_model.safetensors").exists()
    base = tiny.policy("llama")
    loaded = PeftModel.from_pretrained(base, tmp_path / "model").merge_and_unload()
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, made.model.policy(ids).logits, atol=1e-5)
    made.model.policy.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, loaded(ids).logits, atol=1e-5)
