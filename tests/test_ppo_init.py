"""`ppo_init`: SFT's trainer and tokenizer, with pretraining documents as the given share of the rows."""

import math
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from instructrl.config import Pretrain, Recipe
from instructrl.errors import UserError
from instructrl.recipe import load_recipe
from instructrl.stages import models, ppo_init, sft
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.pretrain import make_model, make_tokenizer
from instructrl.stages.tables import DEMONSTRATIONS, TEXT, write_table

TEXTS = [f"The {colour} cup is in the {place}." for colour in ("red", "blue", "old") for place in ("house", "town")]
ROWS = [(f"Say {n}.", f"{n}, as you wish.") for n in range(18)]


def recipe(**sections):
    base = {
        "model": {"path": None, "template": "Q: {prompt}\nA:"},
        "data": {"world": {}},
        "eval": {"judge": "gold"},
        "sft": {"learning_rate": 1e-2, "batch_size": 6, "epochs": 1},
        "ppo_init": {"learning_rate": 1e-2, "batch_size": 6, "residual_dropout": 0},
        "runtime": {"micro_batch_size": 6, "logging_steps": 1, "device": "cpu"},
    }
    return Recipe(**{name: base.get(name, {}) | sections.get(name, {}) for name in base | sections})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = make_tokenizer(TEXTS * 5, 300)
    torch.manual_seed(0)
    settings = Pretrain(vocab_size=300, hidden_size=16, layers=2, heads=2, context_length=96)
    models.save_base(make_model(settings, tokenizer), tokenizer, folder / "pretrain" / "model")
    write_data(folder / "data", TEXTS)
    return {"data": folder / "data", "pretrain": folder / "pretrain"}


def write_data(folder, texts):
    folder.mkdir()
    for split in ("train", "valid"):
        rows = [{"prompt": prompt, "response": response} for prompt, response in ROWS]
        write_table(folder / f"demonstrations.{split}.parquet", rows, DEMONSTRATIONS)
        write_table(folder / f"text.{split}.parquet", [{"kind": "text", "text": text} for text in texts], TEXT)


def drawn(inputs, demonstrations, seed=0, **settings):
    """(rows, contract)."""
    contract = Contract(AutoTokenizer.from_pretrained(inputs["pretrain"] / "model"))
    made = recipe(ppo_init=settings).model_copy(update={"seed": seed})
    return ppo_init.draw_documents(made, inputs["data"], contract, Limits(96, 96, 96), demonstrations), contract


@pytest.mark.parametrize(
    ("share", "demonstrations", "documents"), [(0.1, 18, 2), (0.5, 18, 18), (0, 18, 0), (0.1, 3, 0)]
)
def test_documents_are_that_share_of_all_rows(inputs, share, demonstrations, documents):
    rows, _ = drawn(inputs, demonstrations, pretraining_share=share)
    assert len(rows) == documents


def test_every_document_comes_before_any_comes_twice(inputs):
    rows, contract = drawn(inputs, 15, pretraining_share=0.5)
    counts = Counter(tuple(row["input_ids"]) for row in rows)
    assert set(counts) == {tuple(contract.document(text)) for text in TEXTS}
    assert set(counts.values()) == {2, 3}
    assert drawn(inputs, 15, pretraining_share=0.5)[0] == rows
    assert drawn(inputs, 15, pretraining_share=0.5, seed=1)[0] != rows


def test_all_tokens_of_a_document_count_but_the_first(inputs):
    rows, _ = drawn(inputs, 9, ptx_max_length=5)
    assert [row["completion_mask"] for row in rows] == [[0, 1, 1, 1, 1]]
    assert len(rows[0]["input_ids"]) == 5


def test_documents_are_learnt_beside_the_demonstrations(inputs, tmp_path):
    found = {}
    for share in (0, 0.5):
        folder = tmp_path / str(share)
        folder.mkdir()
        settings = recipe(ppo_init={"pretraining_share": share, "epochs": 6})
        found[share] = ppo_init.run("ppo_init", settings, inputs, folder)
    assert found[0]["steps"] == 18
    assert (found[0]["documents"], found[0.5]["documents"]) == (0, 18)
    assert found[0.5]["steps"] == 36
    assert found[0.5]["text_loss"] < 0.5 * found[0]["text_loss"]
    assert found[0.5]["valid_loss"] < math.log(300) / 2


def test_without_documents_it_is_sft_with_other_settings(inputs, tmp_path):
    """The same code on the same rows: with SFT's settings the weights are SFT's."""
    same = {"learning_rate": 3e-3, "batch_size": 6, "epochs": 1, "residual_dropout": 0.1}
    settings = recipe(sft=same, ppo_init=same | {"pretraining_share": 0})
    for stage, name in ((sft, "sft"), (ppo_init, "ppo_init")):
        (tmp_path / name).mkdir()
        stage.run(name, settings, inputs, tmp_path / name)
    files = [tmp_path / name / "model" / "model.safetensors" for name in ("sft", "ppo_init")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_tokenizer_and_vocabulary_are_those_of_sft(inputs, tmp_path):
    """With a base model that has no padding token, as GPT-2: both stages add the same row."""
    tokenizer = make_tokenizer(TEXTS * 5, 300)
    tokenizer.add_special_tokens({"pad_token": tokenizer.eos_token})
    base = tmp_path / "gpt2"
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(tokenizer) - 1, n_positions=96)
    GPT2LMHeadModel(config).save_pretrained(base)
    tokenizer.save_pretrained(base)
    settings = recipe(model={"path": str(base)})
    for stage, name in ((sft, "sft"), (ppo_init, "ppo_init")):
        (tmp_path / name).mkdir()
        stage.run(name, settings, {"data": inputs["data"]}, tmp_path / name)
    one, other = (tmp_path / name / "model" for name in ("sft", "ppo_init"))
    for file in ("tokenizer.json", "tokenizer_config.json", "contract.json", "config.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    sizes = [AutoModelForCausalLM.from_pretrained(path).get_input_embeddings().weight.shape for path in (one, other)]
    assert sizes[0] == sizes[1]
    assert sizes[0][0] > config.vocab_size


def test_the_settings_are_its_own(tmp_path):
    settings = recipe(ppo_init={"learning_rate": 3e-4, "batch_size": 12, "completion_only_loss": False})
    arguments = sft.arguments(settings, tmp_path, "ppo_init")
    assert (arguments.learning_rate, arguments.completion_only_loss, arguments.num_train_epochs) == (3e-4, False, 2)
    assert arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps == 12


def test_the_defaults_are_the_papers(here):
    """App. C.3, for 1.3B."""
    made = load_recipe(["recipe=gpt2-small"])
    section = made.ppo_init
    assert (section.learning_rate, section.epochs, section.batch_size) == (5e-6, 2, 32)
    assert (section.pretraining_share, section.final_learning_rate_share) == (0.1, 0.1)
    assert (made.ppo.init, made.ppo_ptx.init) == ("ppo_init", "ppo_init")


def test_mistakes_are_one_sentence(inputs, tmp_path):
    with pytest.raises(
        UserError, match=r"ppo_init\.trainer\.weight_decy: .* Did you mean ppo_init\.trainer\.weight_decay"
    ):
        ppo_init.check(recipe(ppo_init={"trainer": {"weight_decy": 0.1}}))
    write_data(tmp_path / "data", [])
    with pytest.raises(UserError, match=r"ppo_init has no pretraining text: set data\.text, or ppo_init\.pretraining"):
        ppo_init.run("ppo_init", recipe(), inputs | {"data": tmp_path / "data"}, tmp_path)
    own = {"data": {"world": None}, "eval": {"judge": "reward_model"}, "model": {"path": "x"}}
    with pytest.raises(ValueError, match=r"set data\.text, or ppo_ptx\.ptx_coef=0 and ppo_init\.pretraining_share=0"):
        recipe(**own)
    with pytest.raises(ValueError, match=r"there is no pretraining text: set data\.text, or ppo_ptx\.ptx_coef=0 \["):
        recipe(**own, ppo={"init": "sft"}, ppo_ptx={"init": "sft"})
