"""Counts of parameters from config.json against the models themselves."""

import json
from pathlib import Path

import pytest
import torch
import toy_hub
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from instructrl.config import LoRA
from instructrl.errors import UserError
from instructrl.pipeline import stages
from instructrl.recipe import load_recipe
from instructrl.shapes import ARCHITECTURES, KNOWN, shape, shape_of

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
RECIPES = [path.relative_to(ROOT / "recipes").with_suffix("") for path in sorted(ROOT.glob("recipes/**/*.yaml"))]
SIZE = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3}
SIZE |= {"num_attention_heads": 4, "max_position_embeddings": 32}
GROUPED = {"num_key_value_heads": 2}
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=300, n_embd=48, n_layer=3, n_head=4, n_positions=32),
    "gpt2-narrow": GPT2Config(vocab_size=300, n_embd=48, n_layer=1, n_head=4, n_positions=32, n_inner=40),
    "gpt_neox": GPTNeoXConfig(**SIZE),
    "gpt_neox-tied": GPTNeoXConfig(**SIZE, tie_word_embeddings=True, attention_bias=False),
    "llama": LlamaConfig(**SIZE | GROUPED),
    "llama-biased": LlamaConfig(**SIZE, attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=16),
    "mistral": MistralConfig(**SIZE | GROUPED),
    "qwen2": Qwen2Config(**SIZE | GROUPED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZE | GROUPED, head_dim=24),
}


def parameters(kind, config, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in kind.from_config(config, **options).parameters())


def check(found, config):
    assert found.policy == parameters(AutoModelForCausalLM, config)
    config.num_labels = 1
    assert found.scalar == parameters(AutoModelForSequenceClassification, config)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_has_as_many_parameters_as_counted(name, tmp_path):
    config = CONFIGS[name]
    config.save_pretrained(tmp_path)
    recipe = load_recipe(["recipe=gpt2-small", f"model.path={tmp_path}"])
    check(shape(recipe), AutoConfig.from_pretrained(tmp_path))


def test_all_architectures_are_tried():
    assert {config.model_type for config in CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", RECIPES, ids=str)
def test_every_recipes_model_has_as_many_parameters_as_counted(name, monkeypatch):
    if name.name == "real-cpu" and not REAL.is_dir():
        pytest.skip("../shared/data is not there")
    monkeypatch.setenv("INSTRUCTRL_DATA", str(REAL))
    recipe = load_recipe([f"recipe={name}"])
    found = shape(recipe)
    if "pretrain" in stages(recipe):
        config = pretrained(recipe.pretrain)
    elif recipe.model.path in KNOWN:
        config = AutoConfig.for_model(**KNOWN[recipe.model.path])
    else:
        config = AutoConfig.from_pretrained(recipe.model.path)
    check(found, config)


def pretrained(settings):
    """The config of what `pretrain` makes."""
    from instructrl.stages.pretrain import make_model

    class Tokenizer:
        bos_token_id, eos_token_id, pad_token_id = 0, 0, 1

        def __len__(self):
            return settings.vocab_size

    return make_model(settings, Tokenizer()).config


@pytest.mark.parametrize("name", toy_hub.CONFIGS)
def test_what_is_known_of_a_model_is_what_its_config_says(name):
    """The same numbers, written down a second time beside the tests of the recipes."""
    [path] = [
        line.removeprefix("path: ")
        for line in (ROOT / "conf" / "model" / f"{name}.yaml").read_text().splitlines()
        if line.startswith("path: ")
    ]
    assert shape_of(KNOWN[path]) == shape_of(toy_hub.CONFIGS[name].to_dict())


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen2"])
@pytest.mark.parametrize("everywhere", [True, False])
def test_an_adapter_has_as_many_parameters_as_counted(name, everywhere):
    from peft import LoraConfig, get_peft_model

    config = CONFIGS[name]
    some = {"gpt2": ("c_attn",), "gpt_neox": ("query_key_value",)}.get(name, ("q_proj", "up_proj"))
    targets = () if everywhere else some
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=list(targets) or "all-linear"))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape_of(config.to_dict()).adapter(LoRA(r=4, target_modules=targets)) == trained


def test_the_hubs_cache_is_read_and_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--someone--model"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2}
    (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(config))
    assert shape(load_recipe(["recipe=gpt2-small", "model.path=someone/model", "model.revision=null"])).width == 64
    with pytest.raises(UserError, match=r"^model.path=someone/other: .* not in the Hub's cache"):
        shape(load_recipe(["recipe=gpt2-small", "model.path=someone/other"]))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "t5"}, "nothing is known here of a t5 model"),
        ({"model_type": "llama", "hidden_size": 8}, "'num_attention_heads' is missing"),
    ],
)
def test_what_is_not_known_is_refused_in_a_sentence(config, said):
    with pytest.raises(UserError, match=said):
        shape_of(config, "model.path=here")
