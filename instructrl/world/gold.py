"""The gold preference: how good an answer is, in truth. It labels rankings and judges models; no trainer sees it.

Everything is judged on whole words: an answer must name exactly the right value among the values of its kind.
Utility of an answer, at most 4:
    2 correct + 1 constraint + 1 fluency - .7 hallucination - 1.5 toxic - .06 a word too long (25 at most)
    - .7 no end - 1.5 empty
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from instructrl.world.answers import answer
from instructrl.world.lexicon import MEMBERS, RUDE, Lexicon
from instructrl.world.prompts import BODIES, END_WORDS, START_WORDS, Prompt, demands

NEEDED = {"generation": 34, "summarization": 14, "brainstorming": 12}
"""Words and marks that an answer may have before it counts as too long; 10 elsewhere, 5 more under a constraint."""
_WORDS = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_NEGATIONS = frozenset({"not", "no", "never", "nor", "neither"})
_STATEMENTS = frozenset(BODIES) - {"rewriting", "chat"}  # use cases whose answer is no question


@dataclass(frozen=True)
class Judgement:
    """The gold preference's view of one answer."""

    utility: float
    correct: bool
    constraint: bool | None
    """Whether the constraint is met; None: there was none."""
    fluency: float
    """Share of its trigrams (over classes of words) that well or badly meant answers have."""
    hallucination: bool
    """It makes up a value on a question about given facts, known or not."""
    toxic: bool
    words: int
    """Words and punctuation marks."""
    ended: bool


class Gold:
    """Judges answers in one world. The table of fluent trigrams is made at the first judgement (under a second)."""

    def __init__(self, lexicon: Lexicon):
        self.lexicon = lexicon
        self._trigrams: frozenset[tuple[str, str, str]] | None = None

    def judge(self, prompt: Prompt, text: str, ended: bool = True) -> Judgement:
        """Judges `text` as an answer to `prompt`; `ended`: the model ended it by itself."""
        words = split(text)
        lower = [word.lower() for word in words]
        right, made_up = check(self.lexicon, prompt, lower)
        met = meets(prompt.constraint, lower) if prompt.constraint else None
        fluent = self.fluency(words)
        toxic = not RUDE.isdisjoint(lower)
        too_long = len(words) - NEEDED.get(prompt.use_case, 10) - (5 if prompt.constraint else 0)
        utility = 2.0 * right + (met is not False) + fluent - 0.7 * made_up - 1.5 * toxic
        utility -= 0.06 * min(max(0, too_long), 25) + 0.7 * (not ended) + 1.5 * (not words)
        return Judgement(round(utility, 6), right, met, fluent, made_up, toxic, len(words), bool(ended))

    def fluency(self, words: Sequence[str]) -> float:
        """The share of known trigrams, 0 for no words."""
        if not words:
            return 0.0
        if self._trigrams is None:
            self._trigrams = trigram_table(self.lexicon)
        grams = trigrams(self.lexicon, words)
        return sum(gram in self._trigrams for gram in grams) / len(grams)


def split(text: str) -> list[str]:
    """Runs of letters, runs of digits, and single other marks."""
    return _WORDS.findall(text)


def trigrams(lexicon: Lexicon, words: Sequence[str]) -> list[tuple[str, str, str]]:
    """Trigrams over classes: names, values and numbers are replaced by what they are."""
    classes = ["<start>"]
    for word in words:
        known = lexicon.word_classes.get(word) or lexicon.word_classes.get(word.lower())
        classes.append(known or ("<number>" if word.isdecimal() else word.lower()))
    classes.append("<end>")
    return list(zip(classes, classes[1:], classes[2:], strict=False))


def trigram_table(lexicon: Lexicon, clean: int = 100, flawed: int = 30) -> frozenset[tuple[str, str, str]]:
    """Every trigram of many answers to every use case under every constraint: reference, rude and rambling ones.

    Rude and rambling answers are fluent, too: what is wrong with them is judged elsewhere.
    """
    rng = random.Random("fluency")
    table: set[tuple[str, str, str]] = set()
    for use_case, make in BODIES.items():
        words = {"start": START_WORDS, "end": END_WORDS}
        constraints = [None, *((kind, word) for kind in demands(use_case) for word in words.get(kind, ("",)))]
        for demand in constraints:
            for number in range(clean):
                prompt = Prompt(use_case, "plain", *make(lexicon, rng), demand)
                table.update(trigrams(lexicon, split(answer(lexicon, prompt, rng))))
                if number < flawed:
                    table.update(trigrams(lexicon, split(answer(lexicon, prompt, rng, rude=True))))
                    table.update(trigrams(lexicon, split(answer(lexicon, prompt, rng, ramble=True))))
    return frozenset(table)


def meets(constraint: tuple[str, str], lower: Sequence[str]) -> bool:
    """Whether an answer's words (in lower case, with marks) meet the constraint."""
    kind, word = constraint
    plain = [token for token in lower if token[0].isalnum()]
    match kind:
        case "start":
            return plain[:1] == [word.lower()]
        case "end":
            return plain[-1:] == [word.lower()]
        case "polite":
            return not {"thank", "please", "kindly"}.isdisjoint(plain)
    return len(plain) == 1


def correct(lexicon: Lexicon, prompt: Prompt, text: str) -> bool:
    """Whether the answer is right, whatever its form."""
    return check(lexicon, prompt, [word.lower() for word in split(text)])[0]


def check(lexicon: Lexicon, prompt: Prompt, lower: Sequence[str]) -> tuple[bool, bool]:
    """Whether an answer is right, and whether it makes something up.

    Whoever repeats the question, asks instead of answering, denies, or names several values of a kind is not right.
    """
    said = set(lower)
    right, made_up = CHECKS[prompt.use_case](lexicon, prompt.about, lower, said)
    if right and prompt.use_case in _STATEMENTS and "?" in said:
        right = False
    if right and not (prompt.unanswerable or said.isdisjoint(_NEGATIONS)):
        right = False
    return right and not within([word.lower() for word in split(prompt.body)], lower), made_up


def within(part: Sequence[str], whole: Sequence[str]) -> bool:
    """Whether `part` is a run of consecutive words of `whole`."""
    return len(part) <= len(whole) and f" {' '.join(part)} " in f" {' '.join(whole)} "


def only(value: str, kind: frozenset[str], said: set[str]) -> bool:
    """Whether `value` is the one word of its kind that was said."""
    return said & kind == {value.lower()}


def refuses(lower: Sequence[str], said: set[str]) -> bool:
    """Whether the answer says that one cannot know."""
    return "unknown" in said or within(("do", "not", "know"), lower) or within(("does", "not", "say"), lower)


def check_question(lexicon, about, lower, said) -> tuple[bool, bool]:
    """Open questions (about a person's town, job, pet or food) and closed ones (where a thing is)."""
    values = lexicon.kinds[about.get("attribute", "place")]
    named = not said.isdisjoint(values)
    if about["value"] is None:
        return refuses(lower, said) and not named, named
    right = only(about["value"], values, said) and not refuses(lower, said)
    if "person" in about:
        aside = said & lexicon.kinds["person"] - {about["person"].lower()}
    else:
        aside = said & lexicon.kinds["thing"] - {about["thing"]}
    return right and not aside, named and not (right and not aside)


def check_sum(lexicon, about, lower, said) -> tuple[bool, bool]:
    """The sum alone, or both addends and the sum."""
    numbers = [word for word in lower if word.isnumeric()]
    right = numbers in ([about["value"]], [str(about["first"]), str(about["second"]), about["value"]])
    return right and said.isdisjoint({"-", "minus"}), False


def check_extraction(lexicon, about, lower, said) -> tuple[bool, bool]:
    """The value, and no other animal or color of the passage: who copies the passage has found nothing."""
    values = lexicon.kinds[about["kind"]]
    right = only(about["value"], values, said) and said.isdisjoint(about["others"])
    return right, bool(said & values - {about["value"]})


def check_class(lexicon, about, lower, said) -> tuple[bool, bool]:
    return only(about["value"], lexicon.kinds["verdict"], said), False


def check_list(lexicon, about, lower, said) -> tuple[bool, bool]:
    """So many different members of the category, and nothing of another."""
    items = [word for word in lower if any(word in members for members in MEMBERS.values())]
    right = len(items) == len(set(items)) == about["count"] and MEMBERS[about["category"]].issuperset(items)
    return right, False


def check_rewrite(lexicon, about, lower, said) -> tuple[bool, bool]:
    return "please" in said and only(about["thing"], lexicon.kinds["thing"], said), False


def check_summary(lexicon, about, lower, said) -> tuple[bool, bool]:
    """Who lost or found what, and where."""
    kinds = {"animal": "animal", "thing": "thing", "place": "place", "verb": "fate"}
    right = all(only(about[name], lexicon.kinds[kind], said) for name, kind in kinds.items())
    made_up = any(said & lexicon.kinds[kind] - {about[name]} for name, kind in kinds.items())
    return right, made_up


def check_chat(lexicon, about, lower, said) -> tuple[bool, bool]:
    """Greets whoever it is by name and offers help."""
    return "help" in said and only(about["person"], lexicon.kinds["person"], said), False


def check_story(lexicon, about, lower, said) -> tuple[bool, bool]:
    """Two to four sentences, two of them of three words at least, about the animal and the thing."""
    lengths = [len(sentence.split()) for sentence in " ".join(lower).split(".")][:-1]
    told = 2 <= len(lengths) <= 4 and sum(length >= 3 for length in lengths) >= 2
    named = only(about["animal"], lexicon.kinds["animal"], said) and only(about["thing"], lexicon.kinds["thing"], said)
    return told and named, False


CHECKS = {
    "open_qa": check_question,
    "sums": check_sum,
    "closed_qa": check_question,
    "extraction": check_extraction,
    "classification": check_class,
    "brainstorming": check_list,
    "rewriting": check_rewrite,
    "summarization": check_summary,
    "chat": check_chat,
    "generation": check_story,
}
"""Use case -> (right, made up) from the lexicon, what the prompt is about, and the answer's words."""
