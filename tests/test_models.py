"""Loading models: what is wrong with a path is one sentence; padding is not the end; weights are safetensors."""

import json
import socket

import pytest
import tiny_tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import models
from instructrl.stages.contract import PAD


def recipe(**sections):
    without_text = {"ppo_init": {"pretraining_share": 0}, "ppo_ptx": {"ptx_coef": 0}}
    return Recipe(**without_text | {"runtime": {"device": "cpu"}} | sections)


@pytest.fixture
def gpt2(tmp_path):
    """A GPT-2 without a pad token, its BOS its EOS, as the original."""
    tokenizer = tiny_tokenizers.gpt2()
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=len(tokenizer), n_positions=32))
    folder = tmp_path / "gpt2"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_missing_pad_token_is_added_once_and_the_old_rows_stay(gpt2, tmp_path):
    tokenizer, model = models.load_tokenizer(gpt2, recipe()), models.load_policy(gpt2, recipe())
    assert tokenizer.pad_token is None
    before, size = model.get_input_embeddings().weight.clone(), len(tokenizer)
    for _ in range(2):
        contract = models.contract_of(gpt2, tokenizer, recipe())
        models.fit(model, contract)
    after = model.get_input_embeddings().weight
    assert tokenizer.pad_token == PAD
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(after) == len(tokenizer) == size + 1
    assert torch.equal(after[:size], before)
    torch.testing.assert_close(after[size], before.mean(0))
    assert after.data_ptr() == model.get_output_embeddings().weight.data_ptr()
    models.save(model, contract, tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token_id == tokenizer.pad_token_id
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.pad_token_id == tokenizer.pad_token_id


def test_padding_that_is_the_end_is_replaced(gpt2):
    tokenizer, model = models.load_tokenizer(gpt2, recipe()), models.load_policy(gpt2, recipe())
    tokenizer.pad_token = tokenizer.eos_token
    models.fit(model, models.contract_of(gpt2, tokenizer, recipe()))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_a_reward_model_reads_the_end_and_loads_with_the_stock_class(gpt2, tmp_path):
    tokenizer, policy = models.load_tokenizer(gpt2, recipe()), models.load_policy(gpt2, recipe())
    contract = models.contract_of(gpt2, tokenizer, recipe())
    models.fit(policy, contract)
    models.save(policy, contract, tmp_path / "sft")
    model = models.init_reward_model(tmp_path / "sft", recipe())
    assert model.score.bias is None
    trunk = policy.transformer.state_dict()
    assert all(torch.equal(weight, trunk[name]) for name, weight in model.transformer.state_dict().items())
    model.config.reward_bias = 0.75
    models.save(model, contract, tmp_path / "rm")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    loaded, bias = models.load_reward_model(tmp_path / "rm", recipe())
    assert bias == 0.75
    ids = contract.prompt("some") + contract.response("words")
    padded = torch.tensor([ids + [tokenizer.pad_token_id] * 3])
    hidden = loaded.transformer(torch.tensor([ids])).last_hidden_state
    assert ids[-1] == tokenizer.eos_token_id
    expected = loaded.score(hidden[:, -1])
    for one in (loaded, stock):
        torch.testing.assert_close(one(padded).logits, expected)


def test_precision_is_the_recipes(gpt2):
    model = models.load_policy(gpt2, recipe(model={"dtype": "bfloat16"}))
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not model.training


def test_wrong_paths_are_one_sentence(gpt2, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    no_weights = tmp_path / "no weights"
    no_weights.mkdir()
    (no_weights / "config.json").write_text((gpt2 / "config.json").read_text())
    torch.save({}, no_weights / "pytorch_model.bin")
    for path, message in (
        (tmp_path / "absent", "there is no such folder"),
        (tmp_path / "empty", "the folder holds no config.json"),
        (tmp_path / "file", "is a file; give the folder"),
        (no_weights, "holds no .safetensors weights"),
        ("./absent", "there is no such folder"),
        ("a/b/c", "there is no such folder"),
        ("not a name!", "neither a folder nor a Hub id"),
    ):
        with pytest.raises(UserError) as caught:
            models.load_policy(path, recipe())
        assert message in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_without_a_network_a_hub_id_fails_in_one_sentence(monkeypatch):
    def no_route(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_route)
    with pytest.raises(UserError, match=r"model\.path=nobody/nothing: .* the Hub cannot be reached; give a local"):
        models.load_policy("nobody/nothing", recipe())


def test_offline_looks_at_the_disk_only(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked at the network"))
    with pytest.raises(UserError, match=r"runtime\.offline is set"):
        models.load_policy("nobody/nothing", recipe(runtime={"offline": True}))


def test_a_tokenizer_without_an_end_is_refused(gpt2):
    config = json.loads((gpt2 / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (gpt2 / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no EOS token"):
        models.load_tokenizer(gpt2, recipe())


def test_a_device_that_is_not_there_is_named():
    assert models.device(recipe()).type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"runtime\.device=cuda: .* no CUDA device"):
            models.device(recipe(runtime={"device": "cuda"}))
