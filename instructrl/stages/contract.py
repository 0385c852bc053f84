"""What a model reads and writes, as token ids: the one path from text to ids that every stage uses.

`docs/text-contract.md` tells of it from the outside.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from instructrl.config import CHAT, Recipe
from instructrl.errors import UserError
from instructrl.stages.chat import Frame, chat_frame, pieces
from instructrl.stages.fingerprint import difference, digest, meaning

FILE = "contract.json"
PAD = "<|pad|>"
SPARE = (  # tokens that a tokenizer may hold for padding, or for whatever one likes
    PAD,
    "<pad>",
    "[PAD]",
    "<|padding|>",  # Pythia
    "<|finetune_right_pad_id|>",  # Llama 3.1
    "<|reserved_special_token_0|>",  # Llama 3
    "<|fim_pad|>",  # Qwen2.5
    "<|vision_pad|>",  # Qwen2
    "<unused0>",  # Gemma
)
CHARACTERS = 64
"""A token has fewer, but for runs of spaces or dashes. Where a text has more for each token that it may have, a
beginning of it is tokenised first."""
PROBE = (
    "Hi  there,\r\n\n\tna\u00efve: 3+14=17; \u05e9\u05dc\u05d5\u05dd \u4f60\u597d \U0001f642 "
    "</s><|endoftext|><|im_end|> Bye. "
)
"""What two contracts are compared on: whatever tokenizers tend to differ in."""


@dataclass(frozen=True)
class Contract:
    """A tokenizer, the text around a prompt, and what becomes of a prompt that is too long.

    Prompt and response are tokenised apart and joined as ids, so that a response has the same ids wherever it is
    trained on, sampled or scored: tokenising the joined text may merge tokens across the boundary.

    What looks like a special token in a text stays text: `</s>` in a prompt is four characters, not the end. In the
    template it is the token.

    A document, and a prompt whose template is not the tokenizer's chat template, starts with BOS if the tokenizer adds
    one itself, or has one that is not its EOS and no chat template (where BOS may open a turn). GPT-2's BOS is its EOS
    and its tokenizer adds none, so it reads none.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str = "{prompt}\n\n"
    """As `model.template`."""
    truncation: str = "drop"
    """As `model.truncation`."""
    max_prompt_tokens: int | None = None
    """Where a prompt is cut; None with `drop`."""
    document_end: int | None = None
    """What ends a document, if not EOS: a chat template's EOS ends a turn."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, recipe: Recipe) -> "Contract":
        """The contract that a recipe asks for. The tokenizer's EOS becomes what ends a turn of its chat template, where
        that is asked for, and it gets a padding token of its own; both go into the saved tokenizer.

        Raises:
            UserError: there is no chat template, or the template alone is longer than a prompt may be.
        """
        document_end = tokenizer.eos_token_id
        if recipe.model.template == CHAT:
            tokenizer.eos_token = chat_frame(tokenizer).end or tokenizer.eos_token
        cut = recipe.model.truncation != "drop"
        contract = cls(
            tokenizer,
            recipe.model.template,
            recipe.model.truncation,
            recipe.data.max_prompt_tokens if cut else None,
            document_end if document_end != tokenizer.eos_token_id else None,
        )
        contract._give_pad()
        alone = len(contract._framed(""))
        if cut and alone > recipe.data.max_prompt_tokens:
            raise UserError(
                f"data.max_prompt_tokens={recipe.data.max_prompt_tokens}: model.template alone has {alone} tokens, so "
                "nothing would be left of a prompt; raise it."
            )
        return contract

    def plain(self) -> "Contract":
        """The same tokenizer without a template, for text that is read as documents are."""
        return dataclasses.replace(self, template="{prompt}", truncation="drop", max_prompt_tokens=None)

    @cached_property
    def bos(self) -> list[int]:
        """What a document starts with: [BOS], or [] for a model that was not trained with one."""
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        adds = self.tokenizer("a")["input_ids"][:1] == [bos]
        return [bos] if adds or (bos != self.tokenizer.eos_token_id and not self.tokenizer.chat_template) else []

    @cached_property
    def frame(self) -> Frame:
        """What stands around a prompt, as text."""
        return chat_frame(self.tokenizer) if self.template == CHAT else Frame(*self.template.split("{prompt}"))

    def prompt(self, text: str, most: int | None = None) -> list[int]:
        """The ids a model reads before it answers: the prompt, cut if need be, within its template.

        Args:
            most: how many are of use. Of a text with far more only a beginning is read, which has more, too: a text of
                50 MB takes 10 GB to tokenise.
        """
        return _beginning(self._framed, self.kept(text), most)

    def kept(self, text: str) -> str:
        """What is read of a prompt: all of it, or with `truncation` left or right as much as fits, in characters."""
        text = text.strip() if self.frame.strips else text
        most = self.max_prompt_tokens
        if most is None:
            return text

        def part(characters: int) -> str:
            left = text[:characters] if self.truncation == "right" else text[len(text) - characters :]
            return left.strip() if self.frame.strips else left

        fits, exceeds = 0, CHARACTERS * most
        while exceeds < len(text) and len(self._framed(part(exceeds))) <= most:
            fits, exceeds = exceeds, 4 * exceeds
        if exceeds >= len(text):
            exceeds = len(text)
            if len(self._framed(text)) <= most:
                return text
        while exceeds - fits > 1:
            middle = (fits + exceeds) // 2
            if len(self._framed(part(middle))) <= most:
                fits = middle
            else:
                exceeds = middle
        return part(fits)

    def response(self, text: str, most: int | None = None) -> list[int]:
        """The ids of a complete answer; the last is EOS. `most` as in `prompt`."""
        return [*_beginning(self._ids, text, most), self.tokenizer.eos_token_id]

    def document(self, text: str) -> list[int]:
        """The ids of a pretraining document: BOS, text, and what ends a document."""
        end = self.tokenizer.eos_token_id if self.document_end is None else self.document_end
        return [*self.bos, *self._ids(text), end]

    def decode(self, ids: list[int]) -> str:
        """The text of a response's ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    # ---- on disk

    @cached_property
    def card(self) -> dict[str, Any]:
        """Everything that decides which ids a text becomes, hashed where it is long; `fingerprint` is the hash of all,
        and `probe` the ids and tokens of a text within the template and as an answer."""
        token = self.tokenizer.convert_ids_to_tokens
        ids = self.prompt(PROBE) + self.response(PROBE)
        parts = {
            "template": self.template,
            "before": self.frame.before,
            "after": self.frame.after,
            "bos": token(self.bos)[0] if self.bos else None,
            "eos": self.tokenizer.eos_token,
            "pad": self.tokenizer.pad_token,
            "document_end": None if self.document_end is None else token(self.document_end),
            "truncation": self.truncation,
            "max_prompt_tokens": self.max_prompt_tokens,
            "tokenizer": {name: digest(value) for name, value in meaning(self.tokenizer).items()},
        }
        return {"fingerprint": digest(parts), **parts, "probe": {"ids": ids, "tokens": token(ids)}}

    def told(self) -> dict[str, Any]:
        """What a person wants to know of it."""
        return {name: self.card[name] for name in ("fingerprint", "template", "bos", "eos", "pad", "truncation")}

    def save(self, folder: Path, tokenizer: bool = True) -> None:
        """Write `contract.json` and, beside a model's weights, the tokenizer."""
        if tokenizer:
            self.tokenizer.save_pretrained(folder)
        text = json.dumps(self.card, indent=2, ensure_ascii=False) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Contract":
        """Read what `save` wrote.

        Raises:
            UserError: the folder has no `contract.json`, or the tokenizer in it is not the one of that contract.
        """
        if not (folder / FILE).is_file():
            raise UserError(f"{folder} holds no {FILE}; it was not made by instructrl.")
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        end = saved["document_end"] and tokenizer.convert_tokens_to_ids(saved["document_end"])
        found = cls(tokenizer, saved["template"], saved["truncation"], saved["max_prompt_tokens"], end)
        told = difference(saved, found.card, f"its {FILE}", "its tokenizer")
        if told:
            raise UserError(f"{folder}: the tokenizer was changed after the model was made: {told}.")
        return found

    def check(self, model: Path, name: str, mine: str, remedy: str = "Make both from one recipe.") -> None:
        """Refuse a model that reads text otherwise.

        Args:
            name, mine: what the model's folder and this contract's owner are called.

        Raises:
            UserError: it was made under another contract. Says at which token of a probe text they part.
        """
        if not (model / FILE).is_file():
            raise UserError(f"{name}: {model} holds no {FILE}; it was not made by instructrl.")
        saved = json.loads((model / FILE).read_text(encoding="utf-8"))
        told = difference(saved, self.card, name, mine)
        if told:
            raise UserError(f"{name} was made under another text contract than {mine}: {told}. {remedy}")
        Contract.load(model)

    # ---- inside

    def _framed(self, text: str) -> list[int]:
        before, left, right, after = self._around
        return before + self._ids(left + text + right) + after

    @cached_property
    def _around(self) -> tuple[list[int], str, str, list[int]]:
        """The frame as ids, but for the text next to the prompt: a tokenizer merges it with the prompt's."""
        before, after = (pieces(self.tokenizer, text) for text in (self.frame.before, self.frame.after))
        left = before.pop() if before and isinstance(before[-1], str) else ""
        right = after.pop(0) if after and isinstance(after[0], str) else ""
        first, last = (
            [id_ for piece in part for id_ in ([piece] if isinstance(piece, int) else self._ids(piece))]
            for part in (before, after)
        )
        bos = [] if self.template == CHAT or (self.bos and first[:1] == self.bos) else self.bos
        return bos + first, left, right, last

    def _ids(self, text: str) -> list[int]:
        if not text:
            return []
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _give_pad(self) -> None:
        """Padding that means nothing else: with pad = EOS the reward model would read the token before EOS, and with
        pad = UNK a text with an unknown character would have probability 0, as pad has."""
        tokenizer, frame = self.tokenizer, self.frame
        taken = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, self.document_end}
        taken |= set(pieces(tokenizer, frame.before) + pieces(tokenizer, frame.after))
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in taken:
            return
        why = "has no padding token" if tokenizer.pad_token_id is None else f"pads with {tokenizer.pad_token}"
        special = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
        spare = next((name for name in SPARE if special.get(name, tokenizer.eos_token_id) not in taken), None)
        tokenizer.add_special_tokens({"pad_token": spare or PAD})
        what = "a spare token that it holds" if spare else "a new token"
        print(f"The tokenizer {why}: padding is {tokenizer.pad_token}, {what} ({tokenizer.pad_token_id}).", flush=True)


def _beginning(encode: Callable[[str], list[int]], text: str, most: int | None) -> list[int]:
    """The ids of a text, or of so much of its beginning as has more than twice as many ids as are of use."""
    characters = CHARACTERS * most if most else len(text)
    while characters < len(text):
        ids = encode(text[:characters])
        if len(ids) > 2 * most:
            return ids
        characters *= 4
    return encode(text)


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
