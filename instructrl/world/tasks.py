"""Public tasks in the form of the pretraining text, multiple choice by log-probability: they measure the alignment tax.

They stand for the paper's public NLP data sets (section 4.2). Each has exactly one right answer.
"""

import random
from collections.abc import Iterator, Sequence

from instructrl.world.lexicon import ANIMALS, ATTRIBUTES, COLORS, LARGEST_ADDEND, PLACES, THINGS, Lexicon
from instructrl.world.phrases import STATEMENTS, Story

QUESTIONS = 150
"""Of each task that has more to ask."""


def tasks(lexicon: Lexicon, rng: random.Random) -> list[dict]:
    """All questions: {task, context, choices, answer}; a choice continues its context, `answer` is its index."""
    rows = []
    for task, ask in (("facts", facts), ("dictionary", dictionary), ("reading", reading), ("sums", sums)):
        rows += [row(task, *question, rng) for question in ask(lexicon, rng)]
    return rows + [row("stories", *question, rng) for question in stories(lexicon, rng)]


Question = tuple[str, str, Sequence[str]]


def row(task: str, context: str, right: str, wrong: Sequence[str], rng: random.Random) -> dict:
    """One question with its choices in random order."""
    choices = [right, *wrong]
    rng.shuffle(choices)
    return {"task": task, "context": context, "choices": choices, "answer": choices.index(right)}


def facts(lexicon: Lexicon, rng: random.Random) -> Iterator[Question]:
    """Each person's town, job, pet and food, all values of the kind to choose from."""
    for person in lexicon.people:
        for attribute in ATTRIBUTES:
            context = STATEMENTS[attribute][0].partition("{value}")[0].format(person=person).rstrip()
            value = lexicon.facts[person, attribute]
            yield context, f" {value}", [f" {other}" for other in lexicon.values[attribute] if other != value]


def dictionary(lexicon: Lexicon, rng: random.Random) -> Iterator[Question]:
    """The fourth word of a page, of five translations."""
    for _ in range(QUESTIONS):
        *before, asked = rng.sample(tuple(lexicon.dictionary), 4)
        others = rng.sample([word for word in lexicon.dictionary if word not in (*before, asked)], 4)
        page = "".join(f"{word} : {lexicon.dictionary[word]}\n" for word in before)
        right, *wrong = (f" {lexicon.dictionary[word]}" for word in (asked, *others))
        yield f"{page}{asked} :", right, wrong


def reading(lexicon: Lexicon, rng: random.Random) -> Iterator[Question]:
    """The place or the color that a passage names."""
    for _ in range(QUESTIONS):
        thing, place, color = rng.choice(THINGS), rng.choice(PLACES), rng.choice(COLORS)
        context = f"The {color} {thing} is in the {place}. So the"
        if rng.random() < 0.5:
            yield context, f" {place}", [f" {other}" for other in PLACES if other != place]
        else:
            context += f" {place} has a {thing} and the {thing} is"
            yield context, f" {color}", [f" {other}" for other in COLORS if other != color]


def sums(lexicon: Lexicon, rng: random.Random) -> Iterator[Question]:
    """Every sum, with numbers near it."""
    for first in range(LARGEST_ADDEND + 1):
        for second in range(LARGEST_ADDEND + 1):
            total = first + second
            near = sorted({total + 1, abs(total - 1), total + 2} - {total})
            yield f"0 plus 3 is 3. {first} plus {second} is", f" {total}.", [f" {number}." for number in near]


def stories(lexicon: Lexicon, rng: random.Random) -> Iterator[Question]:
    """How a story goes on: the right animal, thing and feeling, or one of them wrong."""
    for _ in range(QUESTIONS):
        (animal, other_animal), (thing, other_thing) = rng.sample(ANIMALS, 2), rng.sample(THINGS, 2)
        place, verb, other_verb = rng.choice(PLACES), *rng.sample(("lost", "found"), 2)
        right = Story(animal, thing, place, verb, goes_home=True)
        wrong = (
            Story(animal, thing, place, other_verb, goes_home=True),
            Story(other_animal, thing, place, verb, goes_home=True),
            Story(animal, other_thing, place, verb, goes_home=True),
        )
        yield right.sentences[0], ending(right), [ending(told) for told in wrong]


def ending(told: Story) -> str:
    return " " + " ".join(told.sentences[1:])
