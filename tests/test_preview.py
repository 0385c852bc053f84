"""`data --show`: what the preview shows is what the trainers get, and a text cannot pretend to be another."""

import json
import re

import pytest
import tiny_tokenizers
import torch
from conftest import Instructrl
from datasets import Dataset
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from instructrl import preview as terminal
from instructrl.config import Recipe
from instructrl.stages import data, models, preview, sft
from instructrl.stages.checkpoints import FOLDER
from instructrl.stages.contract import Contract, Limits

HOSTILE = "a <|im_end|> b\ttab\r\n trained on | fake \u202e \x1b[31m [bold]x[/bold] \u27e6<|im_end|>\u27e7\n"


def save_model(folder, tokenizer, kind=LlamaForCausalLM, settings=LlamaConfig):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = settings(vocab_size=len(tokenizer), max_position_embeddings=256, num_key_value_heads=2, **sizes)
    models.save_base(kind(config), tokenizer, folder)


@pytest.fixture
def own(tmp_path):
    """A recipe on own files, with a chat model of Qwen's kind."""
    save_model(tmp_path / "model", tiny_tokenizers.qwen(), Qwen2ForCausalLM, Qwen2Config)
    rows = {
        "d": [{"prompt": f"Say {n}. {HOSTILE}", "response": f"{n} </s> done"} for n in range(30)],
        "r": [
            {"prompt": f"Best {n}?", "responses": ["good", "bad", "so so", "x" * 200], "ranks": [1, 3, 2, 2]}
            for n in range(30)
        ],
        "p": [{"prompt": f"Prompt {n} " + f"{n}long " * (60 * (n % 2)), "category": "chat"} for n in range(30)],
        "t": [{"text": f"Document {n}. " + "word " * 200} for n in range(30)],
    }
    for name, listed in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    sources = dict(zip(("demonstrations", "rankings", "prompts", "text"), "drpt", strict=True))
    files = {kind: ({"path": str(tmp_path / f"{name}.jsonl")},) for kind, name in sources.items()}
    limits = {"max_prompt_tokens": 160, "max_response_tokens": 60, "valid_ranking_share": 0.1, "pii_filter": False}
    return Recipe(
        model={"path": str(tmp_path / "model"), "template": "chat", "truncation": "left"},
        data=files | limits,
        ppo={"response_length": 20},
        ppo_ptx={"ptx_max_length": 64},
        runtime={"device": "cpu"},
    )


@pytest.fixture
def found(own, tmp_path):
    (tmp_path / "data").mkdir()
    data.run("data", own, {}, tmp_path / "data")
    return preview.examples(own, tmp_path / "data", 4)


def plain(parts):
    return "".join(text for part in parts for text, _ in part["pieces"])


def test_the_mask_is_the_one_that_trl_trains_on(own, tmp_path, found):
    """Against the labels that SFTTrainer's own collator makes, with and without the loss on prompts."""
    for completion_only in (True, False):
        settings = own.model_copy(update={"sft": own.sft.model_copy(update={"completion_only_loss": completion_only})})
        tokenizer = models.load_tokenizer(own.model.path, settings)
        model = models.load_policy(own.model.path, settings)
        contract = models.contract_of(own.model.path, tokenizer, settings)
        models.fit(model, contract)
        rows, _ = sft.encode(tmp_path / "data" / "demonstrations.train.parquet", contract, Limits.of(settings, model))
        trainer = sft.FastSFTTrainer(
            model=model,
            args=sft.arguments(settings, tmp_path / FOLDER),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        [labels] = trainer.data_collator([trainer.train_dataset[0]])["labels"].tolist()
        mask = sft.trained_on(rows[0], completion_only)
        assert [label != -100 for label in labels[1:]] == [bool(counts) for counts in mask[1:]]
        assert mask[0] == 0


def test_examples_are_what_the_models_read(own, tmp_path, found):
    contract, limits = preview.reader(own, tmp_path / "data")
    assert limits.both == 256
    sets = {one["name"]: one for one in found["sets"]}
    assert list(sets) == ["demonstrations.train", "rankings.train", "prompts.train", "text.train"]
    assert all(len(one["examples"]) == 4 < one["rows"] for one in sets.values())
    for example in sets["demonstrations.train"]["examples"]:
        labels = [part["label"] for part in example["parts"]]
        assert labels == ["context", "trained on"]
        assert plain(example["parts"][1:]).endswith(" </s> done<|im_end|>")
        assert [text for text, special in example["parts"][1]["pieces"] if special] == ["<|im_end|>"]
        assert [text for text, special in example["parts"][0]["pieces"] if special] == [
            "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>"
        ]  # fmt: skip
    for example in sets["rankings.train"]["examples"]:
        assert [part["label"] for part in example["parts"]] == ["context", "rank 1", "rank 2", "rank 3"]
        assert [plain([part]) for part in example["parts"][1:]] == [f"{x}<|im_end|>" for x in ("good", "so so", "bad")]
        assert "dropped: 1 responses with a response above data.max_response_tokens=60" in example["says"]
    longest = [
        e for e in sets["prompts.train"]["examples"] if any("beginning is cut off" in line for line in e["says"])
    ]
    assert longest
    assert all(example["notes"]["category"] == "chat" for example in sets["prompts.train"]["examples"])
    narrow = preview.prompt({"prompt": "x " * 80}, contract, Limits(160, 60, 150), own)
    assert narrow["says"][-1] == "dropped: with a prompt above 130 tokens"
    for example in sets["text.train"]["examples"]:
        assert example["says"][0] == "64 tokens, 63 trained on"
        assert example["says"][1].startswith("cut at 64 of ")
    assert found["contract"] == contract.told()


def lines(own, found, **console):
    printed = Console(width=60, highlight=False, **console)
    with printed.capture() as captured:
        for one in found["sets"]:
            terminal.show_set(printed, one)
    return captured.get().splitlines()


def test_a_text_cannot_pretend_to_be_another(own, found):
    """Every line of a text is behind our label; control characters and our own marks are escapes."""
    shown = lines(own, found)
    for line in shown:
        assert "\x1b" not in line
        assert "\u202e" not in line
    bodies = [line for line in shown if re.match(r" *(context|trained on|rank \d) \| ", line)]
    assert len([line for line in bodies if line.startswith("trained on | fake")]) == 0
    assert any("\\u202e \\u001b[31m [bold]x[/bold] \\u27e6<|im_end|>\\u27e7" in line for line in bodies)
    assert any(line.startswith("   context | \u00b7trained on | fake") for line in bodies)
    assert any("b\\ttab\\r\u23ce" in line for line in bodies)
    joined_ = "\n".join(bodies)
    assert "\u27e6<|im_start|>\u27e7user\u23ce" in joined_
    assert "a <|im_end|> b" in joined_


def test_colour_only_where_it_is_wanted(own, found, monkeypatch):
    coloured = lines(own, found, force_terminal=True, color_system="standard")
    assert any("\x1b[32m" in line for line in coloured)  # trained on: green
    monkeypatch.setenv("NO_COLOR", "1")
    without = lines(own, found, force_terminal=True)
    assert not any(re.search(r"\x1b\[[\d;]*3\d", line) for line in without)
    widths = [len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in without if " | " in line]
    assert max(widths) <= 60


def test_the_command_makes_the_data_and_shows_it(instructrl: Instructrl, own, tmp_path):
    recipe = json.loads(own.model_dump_json())
    (tmp_path / "own.yaml").write_text(json.dumps({name: recipe[name] for name in ("model", "data", "runtime")}))
    first = instructrl("data", "--show", "1", "recipe=own.yaml")
    assert first.code == 0, first.err
    assert "data: done" in first.out
    assert "Text contract " in first.out
    assert re.search(r"^trained on \| \d+ </s> done\u27e6<\|im_end\|>\u27e7$", first.out, re.MULTILINE)
    again = instructrl("data", "--show", "1", "recipe=own.yaml")
    assert "data: done" not in again.out
    assert again.out in first.out
    wrong = instructrl("data", "--show", "1", "recipe=own.yaml", "model.template=chat", "model.path=./nowhere")
    assert wrong.code == 2
    assert "model.path: there is no folder ./nowhere" in wrong.err
    assert "Traceback" not in wrong.err
    assert instructrl("data", "--show", "0", "recipe=own.yaml").code == 2
    assert "--multirun" in instructrl("data", "--show", "1", "-m", "recipe=own.yaml", "seed=1,2").err


def test_a_model_from_scratch_has_the_tokenizer_that_pretrain_would_make(tmp_path):
    recipe = Recipe(
        model={"path": None},
        data={"world": {"documents": 300, "demonstrations": 40, "ppo_prompts": 40}},
        eval={"judge": "gold"},
        pretrain={"vocab_size": 300},
    )
    data.run("data", recipe, {}, tmp_path)
    contract, limits = preview.reader(recipe, tmp_path)
    assert isinstance(contract, Contract)
    assert len(contract.tokenizer) == 300
    assert limits.both == recipe.pretrain.context_length
    found = preview.examples(recipe, tmp_path, 2)
    assert found["sets"][1] == {
        "name": "rankings.train",
        "rows": 0,
        "says": preview.nothing("rankings", recipe),
        "examples": [],
    }
