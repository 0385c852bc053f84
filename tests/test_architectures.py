"""SFT, the reward model and PPO on GPT-2, Llama, Qwen2 and Qwen3, with their tokenizers and chat templates."""

import json

import pytest
import tiny_tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import models, ppo, reward_model, sft
from instructrl.stages.contract import Contract
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, write_table

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 192}
GPT2_SIZES = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 192}
KINDS = {
    "gpt2": (GPT2LMHeadModel, GPT2Config, GPT2_SIZES, tiny_tokenizers.gpt2, "{prompt}\n\n"),
    "llama3": (LlamaForCausalLM, LlamaConfig, SIZES, tiny_tokenizers.llama3, "chat"),
    "llama2": (LlamaForCausalLM, LlamaConfig, SIZES, lambda: tiny_tokenizers.llama2(chat=False), "Q: {prompt}\nA:"),
    "qwen2 base": (Qwen2ForCausalLM, Qwen2Config, SIZES, lambda: tiny_tokenizers.qwen(chat=False), "chat"),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, SIZES | {"head_dim": 8}, tiny_tokenizers.qwen, "chat"),
}


def write_data(folder):
    folder.mkdir()
    prompts = [f"What is {n} plus 3? </s>" for n in range(12)]
    ranked = [{"prompt": text, "responses": ["It is 5.", "no <|im_end|>"], "ranks": [1, 2]} for text in prompts]
    for split in ("train", "valid"):
        rows = [{"prompt": text, "response": "It is 5."} for text in prompts]
        write_table(folder / f"demonstrations.{split}.parquet", rows, DEMONSTRATIONS)
        write_table(folder / f"rankings.{split}.parquet", ranked, RANKINGS)
        write_table(folder / f"prompts.{split}.parquet", [{"prompt": text} for text in prompts], PROMPTS)
    return folder


@pytest.fixture(params=KINDS)
def base(request, tmp_path):
    """(recipe, artifacts): a random model with its tokenizer as they come from elsewhere."""
    kind, config, sizes, make_tokenizer, template = KINDS[request.param]
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos")}
    models.save_base(kind(config(vocab_size=len(tokenizer), **sizes, **special)), tokenizer, tmp_path / "base")
    ppo_keys = {"total_episodes": 8, "batch_size": 8, "num_mini_batches": 1, "response_length": 6, "init": "sft"}
    recipe = Recipe(
        model={"path": str(tmp_path / "base"), "template": template},
        sft={"epochs": 1, "batch_size": 4, "learning_rate": 1e-3},
        reward_model={"batch_size": 4},
        ppo=ppo_keys,
        ppo_ptx=ppo_keys | {"ptx_coef": 0},
        runtime={"device": "cpu"},
    )
    return recipe, {"data": write_data(tmp_path / "data")}


def test_the_three_steps_share_one_contract(base, tmp_path):
    recipe, inputs = base
    for name, stage in (("sft", sft), ("reward_model", reward_model), ("ppo", ppo)):
        (tmp_path / name).mkdir()
        metrics = stage.run(name, recipe, inputs, tmp_path / name)
        inputs[name] = tmp_path / name
    folders = ["sft/model", "reward_model/model", "ppo/model", "ppo/ema", "ppo/critic"]
    cards = [json.loads((tmp_path / folder / "contract.json").read_text()) for folder in folders]
    assert all(card == cards[0] for card in cards)
    assert metrics["held_out"]["length"] <= 6
    for folder in folders:
        kind = AutoModelForSequenceClassification if folder in (folders[1], folders[4]) else AutoModelForCausalLM
        model, tokenizer = kind.from_pretrained(tmp_path / folder), AutoTokenizer.from_pretrained(tmp_path / folder)
        assert model.get_input_embeddings().num_embeddings == len(tokenizer)
        assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
        assert model.config.eos_token_id == tokenizer.eos_token_id
        assert tokenizer.eos_token == cards[0]["eos"]


def test_the_saved_generation_config_has_the_contracts_end_and_padding(base, tmp_path):
    recipe, inputs = base
    sft.run("sft", recipe, inputs, tmp_path)
    model, contract = AutoModelForCausalLM.from_pretrained(tmp_path / "model"), Contract.load(tmp_path / "model")
    ends = model.generation_config.eos_token_id
    assert contract.tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])
    assert model.generation_config.pad_token_id == contract.tokenizer.pad_token_id


def test_a_reward_model_of_another_contract_is_refused(base, tmp_path):
    recipe, inputs = base
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"template": "Other: {prompt}\n"})})
    for name, settings in (("sft", recipe), ("other", other)):
        (tmp_path / name).mkdir()
        sft.run("sft", settings, inputs, tmp_path / name)
    (tmp_path / "reward_model").mkdir()
    reward_model.run("reward_model", other, inputs | {"sft": tmp_path / "other"}, tmp_path / "reward_model")
    mixed = inputs | {"sft": tmp_path / "sft", "reward_model": tmp_path / "reward_model"}
    with pytest.raises(UserError, match=r"^reward_model was made under another text contract than sft: token \d+ of"):
        ppo.run("ppo", recipe, mixed, tmp_path / "ppo")
    again = recipe.model_copy(
        update={"model": other.model.model_copy(update={"path": str(tmp_path / "sft" / "model")})}
    )
    with pytest.raises(UserError, match=r"^model\.path=.* was made under another text contract than this recipe: "):
        sft.run("sft", again, inputs, tmp_path / "again")
