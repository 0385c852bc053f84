"""Prompts and pretraining examples in every form that the PPO trainer takes."""

import pytest
import tiny_models as tiny
from datasets import Dataset

from instructrl.trainers.prompts import Prompts, document_ids

TEMPLATE = "{% for m in messages %}{{ m.role[0] == 'u' and 'w3 ' or 'w4 ' }}{{ m.content }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}w4{% endif %}"


def chat_tokenizer():
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    return words


@pytest.mark.parametrize(
    "row",
    [
        {"prompt_ids": [3, 9, 10, 4]},
        {"input_ids": [3, 9, 10, 4]},
        {"prompt": "w3 w9 w10 w4"},
        {"prompt": [{"role": "user", "content": "w9 w10"}]},
    ],
)
def test_every_form_gives_the_same_ids(row):
    assert Prompts([row], chat_tokenizer()).ids == [[3, 9, 10, 4]]
    assert Prompts(Dataset.from_list([row, row]), chat_tokenizer()).ids == [[3, 9, 10, 4]] * 2


def test_a_conversation_without_a_template_is_one_sentence():
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        Prompts([{"prompt": [{"role": "user", "content": "w9"}]}], tiny.tokenizer())


def test_a_row_without_a_prompt_is_one_sentence():
    with pytest.raises(ValueError, match="neither prompt nor prompt_ids, only question, answer"):
        Prompts([{"question": "w3", "answer": "w4"}], tiny.tokenizer())


def test_pretraining_text_ends_with_eos():
    assert document_ids({"text": "w5 w6"}, tiny.tokenizer()) == [5, 6, tiny.EOS]
    assert document_ids({"input_ids": [5, 6]}, tiny.tokenizer()) == [5, 6]
