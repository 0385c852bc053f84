"""One tokenisation path: round trips, BOS and EOS, special tokens in a text, what is too long."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from instructrl.errors import UserError
from instructrl.stages.pretrain import make_tokenizer
from instructrl.stages.template import Limits, Template

STORIES = Path(__file__).parents[2] / "shared/data/model/stories260K-hf"
TEXTS = ["The cat sat on the mat. " * 20, "Q: What is 2 plus 3?\nA: 5. " * 20]


@pytest.fixture(scope="module")
def tiny():
    return Template(make_tokenizer(TEXTS, 300), "Q: {prompt}\nA:")


@pytest.fixture(scope="module")
def stories():
    if not STORIES.exists():
        pytest.skip(f"{STORIES} is absent")
    return Template(AutoTokenizer.from_pretrained(STORIES))


def test_prompt_response_and_document_have_their_special_tokens(tiny):
    end = tiny.tokenizer.eos_token_id
    assert tiny.bos == [end]
    assert tiny.prompt("x")[0] == end
    assert tiny.prompt("x")[-1] != end
    assert tiny.decode(tiny.prompt("hello")) == "Q: hello\nA:"
    assert tiny.response("x")[0] != end
    assert tiny.response("x")[-1] == end
    assert tiny.document("x")[0] == tiny.document("x")[-1] == end


def test_a_bos_that_differs_from_eos_is_used(stories):
    assert stories.bos == [stories.tokenizer.bos_token_id]
    assert stories.prompt("Once")[0] == 1
    assert stories.response("Once")[0] != 1
    assert stories.document("Once upon a time")[:3] == [1, *stories.tokenizer("Once upon a time")["input_ids"][1:3]]


def test_gpt2_reads_no_bos(tiny):
    """Its tokenizer has one, equal to EOS, and adds none."""
    tokenizer = make_tokenizer(TEXTS, 300)
    tokenizer.backend_tokenizer.post_processor = None
    assert Template(tokenizer).bos == []


@settings(max_examples=60, deadline=None)
@given(st.text())
def test_any_text_survives_the_round_trip(tiny, text):
    text = text.encode("utf-8", "ignore").decode()  # lone surrogates are no text
    assert tiny.decode(tiny.response(text)) == text
    assert tiny.decode(tiny.document(text)) == text


@pytest.mark.parametrize("text", ["hello", "two  spaces", " begins with one", "line\nbreak", "caf\u00e9 \u2603"])
def test_round_trip_of_a_sentencepiece_tokenizer(stories, text):
    assert stories.decode(stories.response(text)) == text


def test_special_tokens_in_a_text_stay_text(tiny, stories):
    for template, text in ((tiny, "a <|endoftext|> b <|pad|>"), (stories, "a </s> b <s> c <unk>")):
        special = set(template.tokenizer.all_special_ids)
        assert not special & set(template.prompt(text)[1:])
        assert special & set(template.response(text)) == {template.tokenizer.eos_token_id}
        assert template.decode(template.response(text)) == text


def test_save_and_load(tiny, tmp_path):
    tiny.save(tmp_path)
    loaded = Template.load(tmp_path)
    assert loaded.template == tiny.template
    for ids in (lambda t: t.prompt("2 plus 3"), lambda t: t.response("5 </s>"), lambda t: t.document("The cat")):
        assert ids(loaded) == ids(tiny)
    assert loaded.tokenizer.pad_token_id == tiny.tokenizer.pad_token_id != tiny.tokenizer.eos_token_id


def test_a_folder_without_a_template_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no template\.json"):
        Template.load(tmp_path)


def test_limits_name_the_key():
    limits = Limits(prompt=3, response=2, both=4)
    assert limits.problem([1, 2], [3, 4]) is None
    assert "data.max_prompt_tokens=3" in limits.problem([1] * 4, [1])
    assert "data.max_response_tokens=2" in limits.problem([1], [1] * 3)
    assert "context of 4" in limits.problem([1] * 3, [1] * 2)
