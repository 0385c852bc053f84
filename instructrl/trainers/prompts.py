"""Prompts as token ids, from the forms in which TRL's trainers take them."""

from collections.abc import Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class Prompts:
    """The rows of a data set, and each row's prompt as ids.

    A row has `prompt_ids` (or TRL 1.12's `input_ids`), or `prompt`: text, or a conversation [{role, content}, ...],
    which the tokenizer's chat template turns into ids, up to where the assistant begins.

    Raises:
        ValueError: a row has none of these, or there is no chat template for a conversation.
    """

    def __init__(self, dataset: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> None:
        self.dataset = dataset
        self.ids = [prompt_ids(row, tokenizer) for row in rows_of(dataset)]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        return fetch(self.dataset, numbers)


def rows_of(dataset: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    return (dataset[number] for number in range(len(dataset)))


def prompt_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """One row's prompt, as `Prompts` takes it."""
    for name in ("prompt_ids", "input_ids"):
        if name in row:
            return list(row[name])
    if "prompt" not in row:
        raise ValueError(f"a row has neither prompt nor prompt_ids, only {', '.join(row)}")
    if not is_conversation(row["prompt"]):
        return tokenizer(row["prompt"])["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("a prompt is a conversation, and the tokenizer has no chat template: set chat_template")
    return tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=False)


def document_ids(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A pretraining example: its `input_ids`, or its `text` with EOS at the end.

    Raises:
        ValueError: it is padded, or too short to predict anything.
    """
    ids = (
        list(row["input_ids"]) if "input_ids" in row else [*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]
    )
    if len(ids) < 2 or tokenizer.pad_token_id in ids:
        raise ValueError("a row of ptx_dataset is padded, or has fewer than two tokens: pass documents as they are")
    return ids


def is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list)


def fetch(dataset: Sequence[dict[str, Any]], numbers: Sequence[int]) -> list[dict[str, Any]]:
    """Rows by number, all at once where the dataset can (datasets.Dataset)."""
    if hasattr(dataset, "__getitems__"):
        return dataset.__getitems__(list(numbers))
    return [dataset[number] for number in numbers]
