"""What a model reads and writes, as token ids: the one path from text to ids that every stage uses."""

import json
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from instructrl.config import Recipe
from instructrl.errors import UserError

FILE = "template.json"


@dataclass(frozen=True)
class Template:
    """A tokenizer and the text around a prompt.

    Prompt and response are tokenised apart and joined as ids, so that a response has the same ids wherever it is
    trained on, sampled or scored: tokenising the joined text may merge tokens across the boundary.

    A sequence starts with BOS if the tokenizer adds one itself, or has one that is not its EOS. (GPT-2's BOS is its EOS
    and its tokenizer adds none, so it reads none.)

    What looks like a special token in a text stays text: `</s>` in a prompt is four characters, not the end.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "{prompt}\n\n"

    @cached_property
    def bos(self) -> list[int]:
        """[BOS], or [] for a model that was not trained with one."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        adds = self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if adds or bos != self.tokenizer.eos_token_id else []

    def prompt(self, text: str) -> list[int]:
        """The ids a model reads before it answers: BOS and the prompt within its template."""
        return self.bos + self._ids(self.template.replace("{prompt}", text))

    def response(self, text: str) -> list[int]:
        """The ids of a complete answer; the last is EOS."""
        return [*self._ids(text), self.tokenizer.eos_token_id]

    def document(self, text: str) -> list[int]:
        """The ids of a pretraining document: BOS, text, EOS."""
        return [*self.bos, *self._ids(text), self.tokenizer.eos_token_id]

    def decode(self, ids: list[int]) -> str:
        """The text of a response's ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(self, folder: Path) -> None:
        """Write the tokenizer and `template.json` beside a model's weights."""
        self.tokenizer.save_pretrained(folder)
        (folder / FILE).write_text(json.dumps({"template": self.template}, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Template":
        """Read what `save` wrote.

        Raises:
            UserError: the folder has no `template.json`.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} holds no {FILE}; it was not made by instructrl.")
        text = json.loads((folder / FILE).read_text(encoding="utf-8"))["template"]
        return cls(AutoTokenizer.from_pretrained(folder, local_files_only=True), text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Limits:
    """The most tokens a prompt, a response and both together may have."""

    prompt: int
    response: int
    both: int

    @classmethod
    def of(cls, recipe: Recipe, model: PreTrainedModel) -> "Limits":
        """`data.max_prompt_tokens`, `data.max_response_tokens` (App. C: 1k each) and the model's context."""
        context = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
        return cls(recipe.data.max_prompt_tokens, recipe.data.max_response_tokens, context)

    def problem(self, prompt: list[int], response: list[int]) -> str | None:
        """Why the two are dropped, in words that a count is put before, or None."""
        if len(prompt) > self.prompt:
            return f"with a prompt above data.max_prompt_tokens={self.prompt}"
        if len(response) > self.response:
            return f"with a response above data.max_response_tokens={self.response}"
        if len(prompt) + len(response) > self.both:
            return f"longer than the model's context of {self.both} tokens"
        return None
