"""Pretraining: the batches, the mimetic start, the loss, and a run that learns and resumes."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, TrainerCallback

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import pretrain
from instructrl.stages.checkpoints import LOG, train
from instructrl.stages.contract import Contract
from instructrl.stages.tables import TEXT, write_table

WORDS = ["red", "blue", "green", "cat", "dog", "hen", "runs", "sits", "eats"]
TEXTS = [
    f"The {WORDS[n % 3]} {WORDS[3 + n // 3 % 3]} {WORDS[6 + n // 9 % 3]}." + " So it is." * (n % 4) for n in range(120)
]


def recipe(save_minutes=10.0, **settings):
    small = {
        "vocab_size": 320,
        "hidden_size": 32,
        "layers": 2,
        "heads": 2,
        "context_length": 48,
        "steps": 30,
        "tokens_per_step": 256,
        "warmup_steps": 4,
    }
    return Recipe(
        model={"path": None},
        data={"world": {}},
        eval={"judge": "gold"},
        pretrain=small | settings,
        runtime={"device": "cpu", "logging_steps": 1, "save_minutes": save_minutes},
    )


@pytest.fixture
def inputs(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for split, texts in (("train", TEXTS), ("valid", TEXTS[::7])):
        write_table(data / f"text.{split}.parquet", [{"text": text} for text in texts], TEXT)
    return {"data": data}


def tiny_llama(**settings):
    torch.manual_seed(0)
    return pretrain.make_model(recipe(**settings).pretrain, pretrain.make_tokenizer(TEXTS, 320))


def attention_of_layer_0(model, ids):
    model.set_attn_implementation("eager")
    return model(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, length, length]


@pytest.mark.parametrize(("width", "heads"), [(96, 4), (80, 2)])
def test_at_the_start_the_first_head_attends_to_the_previous_token(width, heads):
    model = tiny_llama(hidden_size=width, heads=heads, context_length=64).eval()
    ids = torch.randint(2, 260, (1, 40), generator=torch.Generator().manual_seed(1))
    weights = attention_of_layer_0(model, ids)
    previous = weights[0].diagonal(-1)[1:]  # from token 2 on: token 1 sees only two tokens
    assert previous.min() > 0.6
    assert previous.mean() > 0.7
    assert weights[1].diagonal(-1)[1:].mean() < 0.3
    assert attention_of_layer_0(tiny_llama(mimetic=False).eval(), ids)[0].diagonal(-1)[1:].mean() < 0.3


def test_at_the_start_values_are_copied_and_similar_tokens_attended_to():
    model = tiny_llama(hidden_size=32)
    eye = torch.eye(32)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        torch.testing.assert_close(attention.o_proj.weight @ attention.v_proj.weight, 0.3 * eye, atol=1e-5, rtol=0)
        if number:
            torch.testing.assert_close(attention.q_proj.weight.T @ attention.k_proj.weight, 2 * eye, atol=1e-5, rtol=0)


def test_the_model_is_a_small_stock_llama():
    model = tiny_llama(vocab_size=320, hidden_size=96, heads=4, layers=3, context_length=192)
    assert isinstance(model, LlamaForCausalLM)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight
    without_embedding = model.num_parameters() - model.lm_head.weight.numel()
    assert without_embedding == pytest.approx(3 * 12 * 96**2, rel=0.01)  # as a plain transformer of that width


def test_heads_that_do_not_divide_are_named():
    with pytest.raises(UserError, match=r"pretrain\.hidden_size=30 must be an even multiple of pretrain\.heads=4"):
        tiny_llama(hidden_size=30, heads=4)


def test_batches_hold_each_document_once_an_epoch_within_the_bound():
    documents = [[7] * (2 + (31 * n) % 40) for n in range(500)]
    batches = pretrain.Batches(documents, tokens=256, steps=1000, seed=0, pad=1)
    epoch = len(batches._epoch(256, random.Random(0)))
    rows = batches.rows[: epoch + 1]
    counts = torch.bincount(torch.tensor([n for row in rows for n in row]), minlength=500)
    assert counts.min() >= 1
    for step in range(60):
        ids = batches[step]["input_ids"]
        assert ids.shape[0] * (ids.shape[1] - 1) <= 256
    real = sum(len(documents[n]) - 1 for row in rows for n in row)
    padded = sum(len(row) * (max(len(documents[n]) for n in row) - 1) for row in rows)
    assert real / padded > 0.9  # half of it would be padding in random batches
    again = pretrain.Batches(documents, 256, 1000, 0, 1)
    assert again.rows == batches.rows != pretrain.Batches(documents, 256, 1000, 1, 1).rows


def test_long_documents_are_cut():
    assert pretrain.pieces([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4]]
    assert pretrain.pieces([1, 2, 3], 5) == [[1, 2, 3]]


def test_the_loss_is_of_real_tokens_only():
    """Against each document alone, token by token."""
    model = tiny_llama().eval()
    documents = [[0, 5, 9, 0], [0, 8, 3, 7, 2, 11, 0], [0, 4, 0]]
    total, tokens = 0.0, 0
    for ids in documents:
        logprobs = model(input_ids=torch.tensor([ids])).logits.log_softmax(-1)[0]
        total -= sum(logprobs[i, token].item() for i, token in enumerate(ids[1:]))
        tokens += len(ids) - 1
    loss = pretrain.language_model_loss(model, pretrain.padded(documents, model.config.pad_token_id))
    assert loss.item() == pytest.approx(total / tokens, abs=1e-5)
    assert pretrain.mean_loss(model, documents, rows=2) == pytest.approx(total / tokens, abs=1e-5)
    assert pretrain.mean_loss(model, []) is None


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 17:
            raise Killed


def test_a_run_learns_and_a_killed_one_ends_the_same(inputs, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("straight", "resumed")]
    for folder in folders:
        folder.mkdir()
    metrics = pretrain.run("pretrain", recipe(), inputs, folders[0])

    def killed(trainer, *args):
        trainer.add_callback(KillAt())
        return train(trainer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(pretrain, "train", killed)
        with pytest.raises(Killed):
            pretrain.run("pretrain", recipe(save_minutes=1e-9), inputs, folders[1])
    assert pretrain.run("pretrain", recipe(), inputs, folders[1])["valid_loss"] == metrics["valid_loss"]

    losses = [json.loads(line)["loss"] for line in (folders[0] / LOG).read_text().splitlines()]
    assert len(losses) == 30
    assert losses[0] > 5
    assert metrics["valid_loss"] < 0.4 * losses[0]
    logs = [(folder / LOG).read_text() for folder in folders]
    assert logs[0] == logs[1]
    model = AutoModelForCausalLM.from_pretrained(folders[0] / "model")
    assert model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(folders[0] / "model")
    contract = Contract(tokenizer)
    assert tokenizer("The cat")["input_ids"] == contract.document("The cat")[:-1]
    assert tokenizer.eos_token == tokenizer.bos_token == "<|endoftext|>"
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id


def test_no_text_is_one_sentence(tmp_path):
    for split in ("train", "valid"):
        write_table(tmp_path / f"text.{split}.parquet", [], TEXT)
    with pytest.raises(UserError, match="pretrain has no text"):
        pretrain.run("pretrain", recipe(), {"data": tmp_path}, tmp_path)
