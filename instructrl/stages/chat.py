"""A tokenizer's chat template as what the text contract needs: text around a prompt, and the token that ends a turn.

The template is rendered once, around placeholders, and never sees a user's text: what looks like a special token in a
prompt cannot become one, and a template that depends on the day (Llama 3.2 writes today's date) gives the same text on
every day.
"""

import datetime
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from instructrl.errors import UserError

PROMPT, RESPONSE = "\ue000prompt\ue001", "\ue000response\ue001"  # private-use characters: in no template
DAY = datetime.date(2024, 7, 26)  # Llama 3's own default
SETTINGS = {
    "date_string": DAY.strftime("%d %b %Y"),
    "strftime_now": DAY.strftime,
    "enable_thinking": False,  # demonstrations answer at once (Qwen3)
}


@dataclass(frozen=True)
class Frame:
    """What stands before and after a prompt, special tokens as their text."""

    before: str
    after: str
    end: str | None = None
    """The special token that ends an answer; None: the tokenizer's EOS."""
    strips: bool = False
    """Whether the template takes away the whitespace around a message, as Llama 3's does."""


def chat_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The frame of a conversation with one message of a user's.

    Raises:
        UserError: the tokenizer has no chat template, or it fails, or it does not show the message exactly once.
    """
    if not tokenizer.chat_template:
        raise UserError(
            "model.template=chat: this tokenizer has no chat template, as those of most base models; write the text "
            "around a prompt instead, as model.template='{prompt}\\n\\n'."
        )
    asked = {"role": "user", "content": PROMPT}
    before, found, after = _render(tokenizer, [asked], True).partition(PROMPT)
    if not found or PROMPT in after:
        times = "more than once" if found else "nowhere"
        raise UserError(f"model.template=chat: this tokenizer's chat template shows the user's message {times}.")
    answered = _render(tokenizer, [asked, {"role": "assistant", "content": RESPONSE}], False)
    spaced = {"role": "user", "content": f"\n {PROMPT} \n"}
    strips = spaced["content"] not in _render(tokenizer, [spaced], True)
    return Frame(before, after, _end(tokenizer, answered.partition(RESPONSE)[2]), strips)


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict], ask: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask, **SETTINGS)
    except Exception as error:  # a template is a program: it may fail in any way
        why = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise UserError(f"model.template=chat: this tokenizer's chat template fails: {why}.") from error


def _end(tokenizer: PreTrainedTokenizerBase, after_response: str) -> str | None:
    """The special token right after an answer, with nothing but whitespace before it."""
    for piece in pieces(tokenizer, after_response):
        if isinstance(piece, int):
            return tokenizer.convert_ids_to_tokens(piece)
        if piece.strip():
            return None
    return None


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int | str]:
    """A template's text cut at its special tokens, which are ids; as the tokenizer itself cuts before all else."""
    special = {str(token): (id_, token) for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    if not special or not text:
        return [text] if text else []
    longest_first = sorted(map(re.escape, special), key=len, reverse=True)
    found: list[int | str] = []
    strip_next = False
    for part in re.split(f"({'|'.join(longest_first)})", text):
        if part in special:
            id_, token = special[part]
            if token.lstrip and found and isinstance(found[-1], str):
                found[-1] = found[-1].rstrip()
            found.append(id_)
            strip_next = token.rstrip
        else:
            found.append(part.lstrip() if strip_next else part)
    return [piece for piece in found if piece != ""]
