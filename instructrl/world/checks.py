"""Whether an answer is right, and whether it makes something up: one check for each use case.

Everything is judged on whole words, in lower case. A right answer names exactly the right value among the values of
its kind: whoever lists them all, repeats the question, asks instead of answering, or denies is not right.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from instructrl.world.lexicon import MEMBERS, Lexicon
from instructrl.world.prompts import Prompt

_WORDS = re.compile(r"[^\W_]+|[^\w\s]|_")
_NEGATIONS = frozenset({"not", "no", "never", "nor", "neither"})
_QUESTIONS_ALLOWED = frozenset({"rewriting", "chat"})  # 'Could you please ...?', 'how can I help you?'


def split(text: str) -> list[str]:
    """Runs of letters and digits, and single other marks."""
    return _WORDS.findall(text)


def correct(lexicon: Lexicon, prompt: Prompt, text: str) -> bool:
    """Whether the answer is right, whatever its form."""
    return check(lexicon, prompt, split(text))[0]


def check(lexicon: Lexicon, prompt: Prompt, words: list[str]) -> tuple[bool, bool]:
    """Whether an answer (in words, as `split`) is right, and whether it makes something up."""
    reply = Reply(lexicon, prompt.about, [word.lower() for word in words])
    right, made_up = CHECKS[prompt.use_case](reply)
    asks = "?" in reply.said and prompt.use_case not in _QUESTIONS_ALLOWED
    denies = not (prompt.unanswerable or reply.said.isdisjoint(_NEGATIONS))
    right = right and not (asks or denies or reply.has([word.lower() for word in split(prompt.body)]))
    return right, made_up


@dataclass(frozen=True)
class Reply:
    """An answer's words in lower case, and what it should be about."""

    lexicon: Lexicon
    about: dict[str, Any]
    words: list[str]

    @cached_property
    def said(self) -> frozenset[str]:
        return frozenset(self.words)

    def names(self, kind: str) -> frozenset[str]:
        """The words of a kind that were said."""
        return self.said & self.lexicon.kinds[kind]

    def names_only(self, value: str, kind: str) -> bool:
        """Whether `value` is the one word of its kind that was said."""
        return self.names(kind) == {value.lower()}

    def names_other(self, value: str, kind: str) -> bool:
        """Whether a word of its kind other than `value` was said."""
        return not self.names(kind) <= {value.lower()}

    def has(self, run: list[str]) -> bool:
        """Whether these words were said one after the other."""
        return len(run) <= len(self.words) and f" {' '.join(run)} " in f" {' '.join(self.words)} "

    @property
    def refuses(self) -> bool:
        """Whether it says that one cannot know."""
        return "unknown" in self.said or self.has(["do", "not", "know"]) or self.has(["does", "not", "say"])


def question(reply: Reply) -> tuple[bool, bool]:
    """Open questions (about a person's town, job, pet or food) and closed ones (where a thing is)."""
    about = reply.about
    kind = about.get("attribute", "place")
    named = bool(reply.names(kind))
    if about["value"] is None:
        return reply.refuses and not named, named
    right = reply.names_only(about["value"], kind) and not reply.refuses
    subject = "person" if "person" in about else "thing"
    return right and not reply.names_other(about[subject], subject), named and not right


def sums(reply: Reply) -> tuple[bool, bool]:
    """The sum alone, or both addends and the sum."""
    first, second, total = str(reply.about["first"]), str(reply.about["second"]), reply.about["value"]
    numbers = [word for word in reply.words if word.isnumeric()]
    return numbers in ([total], [first, second, total]) and reply.said.isdisjoint({"-", "minus"}), False


def extraction(reply: Reply) -> tuple[bool, bool]:
    """The value, and no other animal or color of the passage: who copies the passage has found nothing."""
    value, kind = reply.about["value"], reply.about["kind"]
    right = reply.names_only(value, kind) and reply.said.isdisjoint(reply.about["others"])
    return right, reply.names_other(value, kind)


def classification(reply: Reply) -> tuple[bool, bool]:
    """Good or bad, not both."""
    return reply.names_only(reply.about["value"], "verdict"), False


def brainstorming(reply: Reply) -> tuple[bool, bool]:
    """So many different members of the category, and nothing of another."""
    items = [word for word in reply.words if any(word in members for members in MEMBERS.values())]
    enough = len(items) == len(set(items)) == reply.about["count"]
    return enough and MEMBERS[reply.about["category"]].issuperset(items), False


def rewriting(reply: Reply) -> tuple[bool, bool]:
    """Says please, about the right thing."""
    return "please" in reply.said and reply.names_only(reply.about["thing"], "thing"), False


def summarization(reply: Reply) -> tuple[bool, bool]:
    """Who lost or found what, and where."""
    told = [(reply.about[kind], kind) for kind in ("animal", "thing", "place", "verb")]
    return all(reply.names_only(*each) for each in told), any(reply.names_other(*each) for each in told)


def chat(reply: Reply) -> tuple[bool, bool]:
    """Greets whoever it is by name and offers help."""
    return "help" in reply.said and reply.names_only(reply.about["person"], "person"), False


def generation(reply: Reply) -> tuple[bool, bool]:
    """Two to four sentences, two of them of three words at least, about the animal and the thing."""
    lengths = [len(sentence.split()) for sentence in " ".join(reply.words).split(".")][:-1]
    told = 2 <= len(lengths) <= 4 and sum(length >= 3 for length in lengths) >= 2
    return told and all(reply.names_only(reply.about[kind], kind) for kind in ("animal", "thing")), False


CHECKS: dict[str, Callable[[Reply], tuple[bool, bool]]] = {
    "open_qa": question,
    "sums": sums,
    "closed_qa": question,
    "extraction": extraction,
    "classification": classification,
    "brainstorming": brainstorming,
    "rewriting": rewriting,
    "summarization": summarization,
    "chat": chat,
    "generation": generation,
}
"""Use case -> (right, made up)."""
