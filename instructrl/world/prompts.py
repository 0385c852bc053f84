"""Prompts over the paper's use cases (Table 1) and of its three kinds (section 3.2): plain, few-shot, user-based."""

import json
import random
from collections.abc import Set
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

from instructrl.world.answers import answer
from instructrl.world.lexicon import (
    ANIMALS,
    ATTRIBUTES,
    CATEGORIES,
    COLORS,
    INSULTS,
    LARGEST_ADDEND,
    NUMBERS,
    PLACES,
    THINGS,
    Lexicon,
)
from instructrl.world.phrases import QUESTIONS, review, story

USE_CASES = {
    "open_qa": 0.20,
    "sums": 0.12,
    "closed_qa": 0.12,
    "extraction": 0.08,
    "classification": 0.10,
    "brainstorming": 0.12,
    "rewriting": 0.10,
    "summarization": 0.06,
    "chat": 0.05,
    "generation": 0.05,
}
"""Share of each use case. The paper's names, and sums; more of what has one right answer than in Table 1."""
START_WORDS = ("Right", "Sure", "Yes", "Indeed")
END_WORDS = ("friend", "cheers", "done", "bye")
OPENINGS = (
    "I run a quiz.",
    "I work at the inn.",
    "I am writing a letter.",
    "This is for my class.",
    "I need help.",
)
CONSTRAINED, FEW_SHOT, USER = 0.6, 0.15, 0.2
"""Shares of prompts with a constraint, with shots (of the use cases that can have them), and with an opening."""
HAS_SHOTS = {"open_qa", "sums", "classification", "extraction", "brainstorming"}
ONE_WORD = {"open_qa", "sums", "closed_qa", "extraction", "classification"}
STRANGERS, UNSAID = 0.2, 0.3
"""Shares of open and of closed questions that cannot be answered."""
TRAIN, VALID = 65, 15
"""Percent of all questions that training and validation prompts are drawn from; evaluation has the rest."""
_REDRAWS = 60
_USE_CASES, _SHARES = tuple(USE_CASES), tuple(USE_CASES.values())


@dataclass(frozen=True)
class Prompt:
    """One instruction, and what the gold judge has to know of it."""

    use_case: str
    kind: str
    """plain, few_shot (two solved questions first) or user (somebody says who they are first)."""
    body: str
    """What is asked, without the constraint."""
    about: dict[str, Any]
    """What the answer must name; a `value` of None: it cannot be known."""
    constraint: tuple[str, str] | None = None
    """(start, word), (end, word), (polite, "") or (one_word, "")."""
    opening: str = ""
    shots: tuple[tuple[str, str], ...] = ()

    @property
    def question(self) -> str:
        """The body and the constraint: what `part` splits by."""
        if self.constraint is None:
            return self.body
        kind, word = self.constraint
        demand = {"polite": "Be polite.", "one_word": "Use one word."}.get(kind)
        return f"{self.body} {demand or f'{kind.capitalize()} with the word {word}.'}"

    @property
    def text(self) -> str:
        """What the model reads."""
        if self.opening:
            return f"{self.opening} {self.question}"
        return "\n".join([line for shot in self.shots for line in shot] + [self.question])

    @property
    def unanswerable(self) -> bool:
        """Whether the right answer is that one does not know."""
        return "value" in self.about and self.about["value"] is None

    def to_json(self) -> str:
        return json.dumps(asdict(self), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Prompt":
        fields = json.loads(text)
        fields["constraint"] = fields["constraint"] and tuple(fields["constraint"])
        fields["shots"] = tuple(tuple(shot) for shot in fields["shots"])
        return cls(**fields)


def part(lexicon: Lexicon, question: str) -> str:
    """train, valid or eval: every question belongs to exactly one, by its hash.

    The questions of a world are finite (98 ways to ask for a sum), so a split of random prompts would either share
    them or leave training without whole use cases. A split of the questions themselves keeps a held-out question out
    of training whatever stands before it: an opening, shots, or nothing.
    """
    place = int.from_bytes(blake2b(f"{lexicon.seed} {question}".encode(), digest_size=4).digest()) % 100
    return "train" if place < TRAIN else "valid" if place < TRAIN + VALID else "eval"


def draw(
    lexicon: Lexicon,
    rng: random.Random,
    *,
    of: str | None = None,
    seen: Set[str] = frozenset(),
    use_case: str | None = None,
    few_shot: bool = True,
    simple: bool = False,
) -> Prompt:
    """A random prompt.

    Args:
        of: the part (train, valid or eval) that its question belongs to; None: any.
        seen: texts to avoid where the mix of use cases, kinds and constraints leaves any other.
        use_case: one of `USE_CASES`; None: by their shares.
        few_shot: whether it may have shots. They are always of the train part, where there are parts.
        simple: plain and without a constraint.
    """
    while True:  # a use case, kind and constraint without any question in this part is given up
        chosen = use_case or rng.choices(_USE_CASES, _SHARES)[0]
        demand = "" if simple or rng.random() >= CONSTRAINED else rng.choice(demands(chosen))
        luck = 0.5 if simple else rng.random()
        shots = few_shot and luck < FEW_SHOT and chosen in HAS_SHOTS
        finish = partial(finished, lexicon, rng, of=of, shots=shots, opening=luck > 1 - USER)
        prompt = None
        for _ in range(_REDRAWS):
            body, about = BODIES[chosen](lexicon, rng)
            candidate = Prompt(chosen, "plain", body, about, constraint(demand, rng))
            if of is None or part(lexicon, candidate.question) == of:
                prompt = finish(candidate)
                if prompt.text not in seen:
                    break
        if prompt:
            return prompt


def finished(
    lexicon: Lexicon, rng: random.Random, prompt: Prompt, *, of: str | None, shots: bool, opening: bool
) -> Prompt:
    """The plain prompt with two shots or an opening before it."""
    if opening:
        return replace(prompt, kind="user", opening=rng.choice(OPENINGS))
    if not shots:
        return prompt
    solved: dict[str, str] = {}
    while len(solved) < 2:
        shot = draw(lexicon, rng, of=of and "train", use_case=prompt.use_case, simple=True)
        if shot.question != prompt.question and shot.question not in solved:
            solved[shot.question] = answer(lexicon, shot, rng)
    return replace(prompt, kind="few_shot", shots=tuple(solved.items()))


def demands(use_case: str) -> tuple[str, ...]:
    """The constraints that make sense for a use case."""
    if use_case in ("rewriting", "chat"):
        return ("start", "end")
    return ("start", "end", "polite", "one_word") if use_case in ONE_WORD else ("start", "end", "polite")


def constraint(demand: str, rng: random.Random) -> tuple[str, str] | None:
    """The demand with its word, if it has one."""
    words = {"start": START_WORDS, "end": END_WORDS}.get(demand)
    return (demand, rng.choice(words) if words else "") if demand else None


Body = tuple[str, dict[str, Any]]


def open_qa(lexicon: Lexicon, rng: random.Random) -> Body:
    person = rng.choice(lexicon.strangers if rng.random() < STRANGERS else lexicon.people)
    attribute = rng.choice(ATTRIBUTES)
    value = lexicon.facts.get((person, attribute))
    question = rng.choice(QUESTIONS[attribute]).format(person=person)
    return question, {"person": person, "attribute": attribute, "value": value}


def sums(lexicon: Lexicon, rng: random.Random) -> Body:
    first, second = rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)
    question = rng.choice((f"What is {first} plus {second}?", f"Add {first} and {second}."))
    return question, {"first": first, "second": second, "value": str(first + second)}


def closed_qa(lexicon: Lexicon, rng: random.Random) -> Body:
    things, place = rng.sample(THINGS, 2), rng.choice(PLACES)
    unsaid = rng.random() < UNSAID
    asked = things[unsaid]
    question = f"The {things[0]} is in the {place}. Where is the {asked}?"
    return question, {"thing": asked, "value": None if unsaid else place}


def extraction(lexicon: Lexicon, rng: random.Random) -> Body:
    animal, thing, color, place = (rng.choice(words) for words in (ANIMALS, THINGS, COLORS, PLACES))
    kind, value = rng.choice((("animal", animal), ("color", color), ("place", place)))
    others = [word for word in (animal, color) if word != value]
    return f"Find the {kind}: a {animal} saw a {color} {thing} at the {place}.", {
        "kind": kind,
        "value": value,
        "others": others,
    }


def classification(lexicon: Lexicon, rng: random.Random) -> Body:
    good = rng.random() < 0.5
    question = rng.choice(("Is this good or bad?", "Good or bad?"))
    return f"{question} {review(rng, good)}", {"value": "good" if good else "bad"}


def brainstorming(lexicon: Lexicon, rng: random.Random) -> Body:
    category, count = rng.choice(tuple(CATEGORIES)), rng.choice(tuple(NUMBERS))
    return f"{rng.choice(('List', 'Name'))} {NUMBERS[count]} {category}.", {"category": category, "count": count}


def rewriting(lexicon: Lexicon, rng: random.Random) -> Body:
    thing, insult = rng.choice(THINGS), rng.choice(INSULTS)
    harsh = rng.choice((f"Give me the {thing}.", f"Bring the {thing} here.", f"I want the {thing}, you {insult}."))
    return f"Make this kind: {harsh}", {"thing": thing}


def summarization(lexicon: Lexicon, rng: random.Random) -> Body:
    told = story(rng)
    return f"Sum up: {told}", {"animal": told.animal, "thing": told.thing, "place": told.place, "verb": told.verb}


def chat(lexicon: Lexicon, rng: random.Random) -> Body:
    person = rng.choice(lexicon.everyone)
    return rng.choice((f"Hello, I am {person}.", f"Hi, my name is {person}.")), {"person": person}


def generation(lexicon: Lexicon, rng: random.Random) -> Body:
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    return f"Write a story about a {animal} and a {thing}.", {"animal": animal, "thing": thing}


BODIES = {
    "open_qa": open_qa,
    "sums": sums,
    "closed_qa": closed_qa,
    "extraction": extraction,
    "classification": classification,
    "brainstorming": brainstorming,
    "rewriting": rewriting,
    "summarization": summarization,
    "chat": chat,
    "generation": generation,
}
"""Use case -> what is asked, and what the judge has to know of it."""
