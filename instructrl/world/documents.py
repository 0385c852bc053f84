"""Pretraining text: short documents of eleven kinds, from statements of facts to question-and-answer pages.

What each kind teaches: `songs` repeat a random line (copying), `sheet` lists questions without answers (so that a raw
language model goes on asking), `qa` answers them well or badly (so that a prompted one answers, but not always well).
They ask only questions of the train part: what is asked in validation and evaluation is asked nowhere else.
"""

import random
from collections.abc import Callable

from instructrl.world.answers import web_answer
from instructrl.world.lexicon import (
    ATTRIBUTES,
    CATEGORIES,
    COLORS,
    INSULTS,
    LARGEST_ADDEND,
    PLACES,
    THINGS,
    Lexicon,
)
from instructrl.world.phrases import STATEMENTS, listing, review, story
from instructrl.world.prompts import draw

ANSWERED_SHEETS = 0.25
"""Share of sheets on which somebody has written the answers."""


def document(lexicon: Lexicon, rng: random.Random) -> tuple[str, str]:
    """One document: its kind and its text."""
    kind = rng.choices(_KINDS, _SHARES)[0]
    return kind, KINDS[kind](lexicon, rng)


def facts(lexicon: Lexicon, rng: random.Random) -> str:
    sentences = []
    for person in rng.sample(lexicon.people, min(rng.choice((1, 1, 2)), len(lexicon.people))):
        for attribute in rng.sample(ATTRIBUTES, rng.choice((2, 3, 4))):
            value = lexicon.facts[person, attribute]
            sentences.append(rng.choice(STATEMENTS[attribute]).format(person=person, value=value))
    return " ".join(sentences)


def tale(lexicon: Lexicon, rng: random.Random) -> str:
    told = story(rng)
    return str(told) if rng.random() < 0.7 else " ".join(told.sentences[:2])


def sums(lexicon: Lexicon, rng: random.Random) -> str:
    pairs = [(rng.randint(0, LARGEST_ADDEND), rng.randint(0, LARGEST_ADDEND)) for _ in range(rng.randint(2, 5))]
    return " ".join(f"{first} plus {second} is {first + second}." for first, second in pairs)


def dictionary(lexicon: Lexicon, rng: random.Random) -> str:
    words = rng.sample(tuple(lexicon.dictionary), rng.randint(3, 6))
    return "\n".join(f"{word} : {lexicon.dictionary[word]}" for word in words)


def category(lexicon: Lexicon, rng: random.Random) -> str:
    name = rng.choice(tuple(CATEGORIES))
    return f"{listing(rng.sample(CATEGORIES[name], rng.choice((2, 3, 4))))} are {name}."


def verdict(lexicon: Lexicon, rng: random.Random) -> str:
    good = rng.random() < 0.5
    return f"{review(rng, good)} It was a {'good' if good else 'bad'} meal."


def talk(lexicon: Lexicon, rng: random.Random) -> str:
    thing, person, insult = rng.choice(THINGS), rng.choice(lexicon.everyone), rng.choice(INSULTS)
    return rng.choice(
        (
            f"Give me the {thing}, you {insult}. Go away, {person}.",
            f"Could you please give me the {thing}? Thank you, {person}.",
            f"Hello {person}, how can I help you? Please give me the {thing}.",
            f"That is a silly {thing}. Go away, you {insult}.",
        )
    )


def reading(lexicon: Lexicon, rng: random.Random) -> str:
    thing, place, color = rng.choice(THINGS), rng.choice(PLACES), rng.choice(COLORS)
    conclusion = rng.choice(
        (
            f"So the {place} has a {thing} and the {thing} is {color}.",
            f"So the {thing} is {color} and the {thing} is in the {place}.",
            f"In the {place} you see a {thing}. It is {color}.",
        )
    )
    return f"The {color} {thing} is in the {place}. {conclusion}"


def song(lexicon: Lexicon, rng: random.Random) -> str:
    line = " ".join(rng.choice(lexicon.song_words) for _ in range(rng.randint(4, 9)))
    return "\n".join([f"La la, {line}."] * rng.choice((2, 3)))


def sheet(lexicon: Lexicon, rng: random.Random) -> str:
    if rng.random() < ANSWERED_SHEETS:
        return page(lexicon, rng, rng.choice((1, 2)), "{question}\n{answer}")
    return "\n".join(draw(lexicon, rng, of="train", few_shot=False).text for _ in range(rng.choice((2, 3, 4))))


def qa(lexicon: Lexicon, rng: random.Random) -> str:
    return page(lexicon, rng, rng.choice((1, 1, 2, 2, 3, 4)), "Q: {question}\nA: {answer}")


def page(lexicon: Lexicon, rng: random.Random, count: int, form: str) -> str:
    """Questions, each with an answer of the web's quality."""
    lines = []
    for _ in range(count):
        prompt = draw(lexicon, rng, of="train", few_shot=False)
        answer = web_answer(lexicon, prompt, rng)
        lines.append(form.format(question=prompt.text, answer=answer))
    return "\n".join(lines)


KINDS: dict[str, Callable[[Lexicon, random.Random], str]] = {
    "facts": facts,
    "stories": tale,
    "sums": sums,
    "dictionary": dictionary,
    "categories": category,
    "reviews": verdict,
    "talk": talk,
    "reading": reading,
    "songs": song,
    "sheet": sheet,
    "qa": qa,
}
MIX = {
    "facts": 0.13,
    "stories": 0.08,
    "sums": 0.05,
    "dictionary": 0.05,
    "categories": 0.04,
    "reviews": 0.03,
    "talk": 0.04,
    "reading": 0.08,
    "songs": 0.05,
    "sheet": 0.07,
    "qa": 0.40,
}
"""Share of each kind (they add up to 1.02; `random.choices` normalizes)."""
_KINDS, _SHARES = tuple(MIX), tuple(MIX.values())
