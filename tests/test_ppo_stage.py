"""The stages ppo and ppo_ptx, from artifacts on disk to artifacts on disk."""

import json
import os
import random
import signal

import adapted_models
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from instructrl.config import PPO, Data, Eval, LoRA, Model, PPOPtx, Recipe, Runtime, World
from instructrl.errors import UserError
from instructrl.stages import models, ppo, snapshots
from instructrl.stages.contract import Contract
from instructrl.stages.pretrain import make_tokenizer
from instructrl.stages.tables import PROMPTS, TEXT, write_table
from instructrl.trainers.ppo import PPOTrainer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "the", "dog", "ran", "to", "me"]
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SECTION = {
    "init": "sft",
    "total_episodes": 48,
    "batch_size": 16,
    "num_mini_batches": 2,
    "response_length": 8,
    "learning_rate": 1e-3,
}


def recipe(**changes):
    return Recipe(
        data=Data(world=World()),
        eval=Eval(judge="gold"),
        model=Model(path=None),
        ppo=PPO(**SECTION | changes),
        ppo_ptx=PPOPtx(**SECTION | {"ptx_coef": 1.0, "ptx_ratio": 0.5, "ptx_max_length": 10} | changes),
        runtime=Runtime(threads=1, device="cpu"),
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("artifacts"))


def make_inputs(folder):
    """Artifacts of data, sft and reward_model with random models."""
    generator = random.Random(0)
    text = [" ".join(generator.choices(WORDS, k=12)) for _ in range(40)]
    contract = Contract(make_tokenizer(text, 300), "{prompt}\n")
    special = {f"{name}_token_id": getattr(contract.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, max_position_embeddings=64, tie_word_embeddings=True, **SIZE, **special)
    models.save(LlamaForCausalLM(config), contract, folder / "sft" / "model")
    reward_model = models.init_reward_model(folder / "sft" / "model", recipe())
    reward_model.config.reward_bias = 0.25
    models.save(reward_model, contract, folder / "reward_model" / "model")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    prompts = [line[: generator.randint(5, 30)] for line in text] + [" ".join(text)]
    write_table(folder / "data" / "prompts.train.parquet", [{"prompt": line} for line in prompts], PROMPTS)
    write_table(folder / "data" / "prompts.valid.parquet", [{"prompt": line} for line in text[:7]], PROMPTS)
    write_table(folder / "data" / "text.train.parquet", [{"text": line} for line in text], TEXT)
    return {name: folder / name for name in ("data", "sft", "reward_model")}


@pytest.mark.parametrize("name", ["ppo", "ppo_ptx"])
def test_the_stage_writes_a_policy_a_critic_and_its_numbers(inputs, tmp_path, name):
    metrics = ppo.run(name, recipe(), inputs, tmp_path)
    assert metrics["iterations"] == 3
    assert metrics["optimizer_steps"] == 6
    assert metrics["prompts"] == 40
    assert metrics["dropped"] == 1
    assert metrics["length"] <= 8
    assert ("ptx_loss" in metrics) == (name == "ppo_ptx")
    assert set(metrics["seconds"]) == {"rollout", "scoring", "update"} | ({"ptx"} if name == "ppo_ptx" else set())
    json.dumps(metrics, allow_nan=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    *training, evaluation = lines
    assert [line["episode"] for line in training] == [16, 32, 48]
    assert metrics["held_out"]["score"] == evaluation["eval_objective/scores"]
    assert metrics["ema"]["kl"] == evaluation["eval_ema_objective/kl"]
    assert abs(metrics["ema"]["kl"]) < abs(metrics["held_out"]["kl"])  # three iterations of 125: still near the start
    tables = sorted((tmp_path / "completions").iterdir())
    assert [table.name for table in tables] == ["000000.jsonl", "000002.jsonl"]
    assert len(tables[0].read_text().splitlines()) == 8
    assert lines[0]["objective/scores"] == metrics["initial_score"]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    critic = AutoModelForSequenceClassification.from_pretrained(tmp_path / "critic")
    before = AutoModelForCausalLM.from_pretrained(inputs["sft"] / "model")
    average = AutoModelForCausalLM.from_pretrained(tmp_path / "ema").lm_head.weight
    assert 0 < (average - before.lm_head.weight).norm() < 0.1 * (policy.lm_head.weight - before.lm_head.weight).norm()
    assert not torch.equal(policy.lm_head.weight, before.lm_head.weight)
    assert critic.config.num_labels == 1
    assert Contract.load(tmp_path / "model").template == "{prompt}\n"
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 6


def test_bf16_computes_in_bfloat16_and_keeps_the_weights(inputs, tmp_path):
    """The score of the same answers differs by rounding from the one in float32; the weights are saved as they are."""
    half = recipe().model_copy(update={"runtime": recipe().runtime.model_copy(update={"bf16": True})})
    found = [
        ppo.run("ppo", settings, inputs, folder(tmp_path, name)) for name, settings in (("a", recipe()), ("b", half))
    ]
    assert found[0]["initial_score"] != found[1]["initial_score"]
    assert found[1]["initial_score"] == pytest.approx(found[0]["initial_score"], abs=0.05)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model").dtype == torch.float32


def folder(parent, name):
    (parent / name).mkdir()
    return parent / name


def test_the_policy_starts_from_ppo_init_and_is_held_to_it(inputs, tmp_path):
    """At the first iteration its KL from the reference is 0; SFT is not even there."""
    contract = Contract.load(inputs["sft"] / "model")
    other = models.load_policy(inputs["sft"] / "model", recipe())
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    models.save(other, contract, tmp_path / "other" / "model")
    settings = recipe(init="ppo_init", learning_rate=1e-8)
    there = {name: inputs[name] for name in ("data", "reward_model")} | {"ppo_init": tmp_path / "other"}
    ppo.run("ppo", settings, there, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(policy.lm_head.weight, other.lm_head.weight, atol=1e-5, rtol=0)


def test_a_stage_that_was_told_to_stop_goes_on_where_it_was(inputs, tmp_path, monkeypatch):
    """SIGTERM in the middle of an iteration: it stops at the end of it, and the result is that of one run."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    ppo.run("ppo_ptx", recipe(snapshots=2), inputs, whole)
    step = PPOTrainer.training_step

    def terminated(self, *args, **kwargs):
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "training_step", terminated)
        with pytest.raises(SystemExit) as stopped:
            ppo.run("ppo_ptx", recipe(snapshots=2), inputs, parts)
    assert stopped.value.code == 75
    assert [path.name for path in (parts / "checkpoints").iterdir()] == ["checkpoint-4"]
    metrics = ppo.run("ppo_ptx", recipe(snapshots=2), inputs, parts)
    assert metrics["iterations"] == 3  # the log of the first part counts
    written = [f"{folder}/model.safetensors" for folder in ("model", "critic", "snapshots/000001", "snapshots/000002")]
    for file in written:
        assert (whole / file).read_bytes() == (parts / file).read_bytes()


@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_a_snapshot_is_the_policy_that_a_shorter_run_ends_with(inputs, tmp_path, lora):
    def run(name, **changes):
        wanted = recipe(**changes)
        wanted = wanted.model_copy(update={"model": wanted.model.model_copy(update={"lora": lora})})
        begun = inputs | (adapters(wanted) if lora else {})
        ppo.run("ppo", wanted, begun, folder(tmp_path, name))
        return tmp_path / name

    def adapters(wanted):
        base = models.load_policy(inputs["sft"] / "model", wanted)
        names = ("sft", "reward_model")
        adapted_models.write(base, Contract.load(inputs["sft"] / "model"), wanted, tmp_path / "made", names)
        return {made: tmp_path / "made" / made for made in ("pretrain", *names)}

    short, long = run("short", total_episodes=32), run("long", snapshots=1)
    [(iteration, path)] = snapshots.kept(long).items()
    assert iteration == 2
    assert sorted(file.name for file in path.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    kept, ended = (AutoModelForCausalLM.from_pretrained(where).state_dict() for where in (path, short / "model"))
    assert all(torch.equal(kept[weight], ended[weight]) for weight in ended)
    assert snapshots.kept(short) == {}
    assert not (short / "snapshots").exists()


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [
        (3, 16, [4, 8, 12]),
        (4, 16, [3, 6, 10, 13]),
        (0, 16, []),
        (9, 3, [1, 2]),
        (1, 1, []),
        (5, 500, [83, 167, 250, 333, 417]),
    ],
)
def test_snapshots_are_spread_evenly(count, total, expected):
    assert snapshots.spread(count, total) == expected


@pytest.mark.parametrize("name", ["ppo", "ppo_ptx"])
def test_no_prompt_short_enough_is_one_sentence(inputs, tmp_path, name):
    with pytest.raises(
        UserError, match=rf"{name} has no prompt left: all 41 have more than 2 tokens.*response_length=62"
    ):
        ppo.run(name, recipe(response_length=62), inputs, tmp_path)


def test_no_pretraining_text_is_one_sentence(inputs, tmp_path):
    write_table(tmp_path / "text.train.parquet", [], TEXT)
    section = recipe().ppo_ptx
    with pytest.raises(UserError, match=r"ppo_ptx has no pretraining text: set data\.text, or ppo_ptx.ptx_coef=0"):
        ppo.read_documents("ppo_ptx", section, tmp_path, Contract.load(inputs["sft"] / "model"))


def test_documents_are_cut(inputs):
    contract = Contract.load(inputs["sft"] / "model")
    documents = ppo.read_documents("ppo_ptx", recipe().ppo_ptx, inputs["data"], contract)
    assert max(len(row["input_ids"]) for row in documents) == 10
