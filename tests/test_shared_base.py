"""One base model for the four roles of PPO: nothing of it twice, nothing of it trained, and each computes as alone."""

import json

import adapted_models
import pytest
import test_ranks
import tiny_models as tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_lora import IDS, inputs, recipe, run  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from instructrl.errors import UserError
from instructrl.pipeline import stages
from instructrl.stages import base_model, lora, models, ppo
from instructrl.stages.checkpoints import train
from instructrl.stages.contract import Contract
from instructrl.stages.roles import Roles
from instructrl.trainers.actor_critic import network

NAMES = ("policy", "critic", "reward_model", "reference")


def roles(inputs, settings):  # noqa: F811
    return Roles.of(settings.ppo, settings, inputs, Contract.load(inputs["sft"] / "model"))


def logits(model):
    """Without the dropout of an adapter that is trained."""
    with torch.no_grad():
        return model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def merged(inputs, name):  # noqa: F811
    kind = AutoModelForSequenceClassification if name == "reward_model" else AutoModelForCausalLM
    return kind.from_pretrained(inputs[name] / "model")


def test_all_weights_of_the_base_are_there_once(inputs):  # noqa: F811
    found, kept, settings = {}, [], recipe()
    made = roles(inputs, settings)
    for name in NAMES:
        for weight, parameter in getattr(made, name).named_parameters():
            found[parameter.data_ptr()] = parameter.numel()
            if parameter.requires_grad:
                kept.append((name, weight))
    base = merged(inputs, "sft")
    adapter = sum(weight.numel() for weight in load_file(inputs["sft"] / "model/adapter" / lora.FILE).values())
    heads = 2 * 2 * base.config.hidden_size  # critic's and reward model's, and what PEFT keeps of each before training
    assert sum(found.values()) == base.num_parameters() + 4 * adapter + heads
    assert {name for name, _ in kept} == {"policy", "critic"}
    assert all(".lora_" in weight or "score" in weight for _, weight in kept)


def test_each_role_computes_what_its_merged_model_does(inputs, record_property):  # noqa: F811
    """The critic's and reward model's before anything is trained; to float32's rounding."""
    made = roles(inputs, recipe())
    for name, plain in (
        ("policy", "sft"),
        ("reference", "sft"),
        ("critic", "reward_model"),
        ("reward_model", "reward_model"),
    ):
        expected = logits(merged(inputs, plain))
        difference = float((logits(getattr(made, name)) - expected).abs().max())
        record_property(name, difference)
        assert difference < 2e-6 * float(expected.abs().max()), name
    apart = (logits(made.policy) - logits(AutoModelForCausalLM.from_pretrained(inputs["pretrain"] / "model"))).abs()
    assert apart.max() > 0.1  # the adapters do something


def test_training_moves_policy_and_critic_and_nothing_else(inputs, tmp_path, monkeypatch):  # noqa: F811
    """Bit by bit: the base, the reference's and the reward model's outputs, and the policy's base in its artifact."""
    kept = {}

    def trained(trainer, *args):
        models_ = {"reference": trainer.ref_model, "reward": trainer.reward_model}
        models_ |= {"policy": trainer.model.policy, "critic": trainer.model.critic}
        base = {n: p.clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
        before = {name: logits(model) for name, model in models_.items()}
        loss = train(trainer, *args)
        kept["same"] = {name: torch.equal(before[name], logits(model)) for name, model in models_.items()}
        after = dict(trainer.model.named_parameters())
        kept["base"] = all(torch.equal(weight, after[name]) for name, weight in base.items())
        return loss

    monkeypatch.setattr(ppo, "train", trained)
    run("ppo", recipe(), inputs, tmp_path)
    assert kept == {"same": {"reference": True, "reward": True, "policy": False, "critic": False}, "base": True}


@pytest.mark.parametrize("part", ["sft", "reward_model"])
def test_an_adapter_is_pefts_and_of_the_base_that_it_names(inputs, part):  # noqa: F811
    """The stock classes put it on the base model, and compute what the merged artifact does."""
    folder = inputs[part] / "model"
    named = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == "pretrain/pretrain/model"
    base = inputs["pretrain"] / "model"
    if part == "sft":
        plain = AutoModelForCausalLM.from_pretrained(base)
    else:
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    loaded = PeftModel.from_pretrained(plain, folder / "adapter").eval()
    expected = logits(merged(inputs, part))
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_a_reward_model_begins_as_the_sft_model_with_a_head(inputs, tmp_path):  # noqa: F811
    run("reward_model", recipe(reward_model={"learning_rate": 1e-12}), inputs, tmp_path)
    sft, scores = (load_file(folder / "model/adapter" / lora.FILE) for folder in (inputs["sft"], tmp_path))
    assert scores.keys() == sft.keys() | {"base_model.model.score.weight"}
    for name, weight in sft.items():
        torch.testing.assert_close(scores[name], weight, atol=1e-9, rtol=0)


def test_a_twin_has_modules_of_its_own_on_the_same_tensors():
    base = tiny.policy("llama")
    twin = base_model.twin(base)
    assert {p.data_ptr() for p in twin.parameters()} == {p.data_ptr() for p in base.parameters()}
    assert not {id(module) for module in twin.modules()} & {id(module) for module in base.modules()}
    assert twin.config is not base.config
    assert twin.lm_head.weight is twin.model.embed_tokens.weight
    scorer = base_model.scorer(base)
    stock = AutoModelForSequenceClassification.from_config(scorer.config).eval()
    stock.load_state_dict(scorer.state_dict())
    assert torch.equal(logits(scorer), logits(stock))


def test_another_base_model_is_refused(inputs, tmp_path):  # noqa: F811
    """A Hub id without a commit may name another model tomorrow."""
    kind = merged(inputs, "sft").config.model_type
    contract = Contract.load(inputs["sft"] / "model")
    models.save(tiny.policy(kind, seed=9), contract, tmp_path / "pretrain" / "model")
    with pytest.raises(UserError, match=r"sft/model was trained on another base model than model\.path is now"):
        roles({**inputs, "pretrain": tmp_path / "pretrain"}, recipe())


def test_a_grown_embedding_is_the_same_in_every_stage(tmp_path):
    """The base has no row for the padding token: each stage gives it the same one, and the adapter still fits."""
    tokenizer = tiny.tokenizer()
    base = tiny.policy("gpt2")
    base.resize_token_embeddings(len(tokenizer) - 1)
    contract = Contract(tokenizer, "{prompt} w3 ")
    adapted_models.write(base, contract, recipe(), tmp_path)
    made = roles({name: tmp_path / name for name in ("pretrain", "sft", "reward_model")}, recipe())
    assert network(made.policy).get_input_embeddings().num_embeddings == len(tokenizer)
    torch.testing.assert_close(
        logits(made.reference), logits(merged({"sft": tmp_path / "sft"}, "sft")), atol=1e-5, rtol=1e-5
    )


def test_only_recipes_with_adapters_have_new_versions():
    """Their artifacts hold more, and are made otherwise; the others' stay good."""
    plain, adapted = recipe(model={"lora": None, "path": None}), recipe(model={"path": None})
    for name in ("sft", "reward_model", "ppo_init", "ppo", "ppo_ptx"):
        for settings, version in ((plain, 2), (adapted, 3)):
            made = stages(settings.model_copy(update={"ppo": settings.ppo_ptx.model_copy(update={"init": "ppo_init"})}))
            assert made[name].version == version
            assert ("pretrain" in made[name].needs) == (settings is adapted or name in ("sft", "ppo_init"))


def as_rank(rank, port, orders, folder):
    test_ranks.be_a_rank(rank, port)
    test_ranks.run_all(orders, folder)


@pytest.mark.slow
def test_two_ranks_end_where_one_process_does(inputs, tmp_path):  # noqa: F811
    """Each rank has the base once, and frozen weights are in nobody's gradients. Measured: at most 1.7e-7."""
    if merged(inputs, "sft").config.model_type == "gpt2":
        pytest.skip("GPT-2's own dropout is another on each rank")
    settings = recipe(lora={"dropout": 0.0}, sft={"residual_dropout": 0}, runtime={"threads": 1})
    orders = dict.fromkeys(("sft", "reward_model", "ppo_ptx"), (settings, inputs))
    two, alone = tmp_path / "two", tmp_path / "alone"
    torch.multiprocessing.spawn(as_rank, (test_ranks.free_port(), orders, two), nprocs=2)
    test_ranks.run_all(orders, alone)
    for name in orders:
        assert test_ranks.difference(two / name, alone / name) < 1e-5, name
