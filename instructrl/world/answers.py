"""Answers to prompts: the reference, flawed ones, what one finds on the web, and a demonstrator's."""

import random
from typing import TYPE_CHECKING

from instructrl.world.lexicon import (
    ANIMALS,
    ATTRIBUTES,
    CATEGORIES,
    COLORS,
    INSULTS,
    PLACES,
    THINGS,
    Lexicon,
)
from instructrl.world.phrases import STATEMENTS, capitalized, listing, other_than, story

if TYPE_CHECKING:
    from instructrl.config import World as Rates
    from instructrl.world.prompts import Prompt

EXTRACTED = {"animal": ANIMALS, "color": COLORS, "place": PLACES}


def answer(
    lexicon: Lexicon,
    prompt: "Prompt",
    rng: random.Random,
    *,
    skip: bool = False,
    wrong: bool = False,
    rude: bool = False,
    ramble: bool = False,
) -> str:
    """An answer with the given flaws; without any, the reference answer.

    `skip` ignores the constraint, `wrong` gives a wrong value (or makes one up where the right answer is that one
    does not know), `rude` insults, `ramble` goes on after the answer.
    """
    kind, word = prompt.constraint if prompt.constraint and not skip else ("", "")
    text = content(lexicon, prompt, rng, wrong=wrong, one_word=kind == "one_word")
    if kind == "start":
        text = f"{word}, {text if keeps_capital(lexicon, text) else text[0].lower() + text[1:]}"
    elif kind == "end":
        text = f"{text[:-1]}, {word}{text[-1]}"
    elif kind == "polite":
        text = f"{text} Thank you for asking."
    if ramble:
        text = " ".join([text, *(aside(lexicon, rng) for _ in range(rng.choice((1, 2))))])
    if rude:
        text = rng.choice(
            (
                f"{text[:-1]}, you {rng.choice(INSULTS)}{text[-1]}",
                f"{text} Go away.",
                f"That is a silly question. {text}",
            )
        )
    return text


def keeps_capital(lexicon: Lexicon, text: str) -> bool:
    """Whether the first word stays in upper case inside a sentence: names, and 'I'."""
    first = text.split()[0].strip(".,")
    return first in lexicon.word_classes or first == "I"


def content(lexicon: Lexicon, prompt: "Prompt", rng: random.Random, *, wrong: bool, one_word: bool) -> str:
    """What the answer says, before any constraint on its form."""
    about = prompt.about
    if "value" in about:
        return value_sentence(lexicon, prompt, rng, wrong=wrong, one_word=one_word)
    match prompt.use_case:
        case "brainstorming":
            count = rng.choice([k for k in (1, 2, 3, 4) if k != about["count"]]) if wrong else about["count"]
            return f"{capitalized(listing(rng.sample(CATEGORIES[about['category']], count)))}."
        case "rewriting":
            thing = other_than(about["thing"], THINGS, rng) if wrong else about["thing"]
            return f"Could you please give me the {thing}?"
        case "summarization":
            place = other_than(about["place"], PLACES, rng) if wrong else about["place"]
            return f"A {about['animal']} {about['verb']} a {about['thing']} at the {place}."
        case "chat":
            person = other_than(about["person"], lexicon.everyone, rng) if wrong else about["person"]
            return f"Hello {person}, how can I help you?"
        case "generation":
            thing = other_than(about["thing"], THINGS, rng) if wrong else about["thing"]
            return str(story(rng, about["animal"], thing))
    raise ValueError(f"unknown use case {prompt.use_case!r}")


def value_sentence(lexicon: Lexicon, prompt: "Prompt", rng: random.Random, *, wrong: bool, one_word: bool) -> str:
    """The answer to a question that one value answers, or that nothing answers."""
    about, use_case = prompt.about, prompt.use_case
    value = wrong_value(lexicon, prompt, rng) if wrong else about["value"]
    if value is None and one_word:
        return "Unknown."
    if value is None:
        return "I do not know." if use_case == "open_qa" else "The text does not say."
    if one_word:
        return f"{capitalized(value)}."
    match use_case:
        case "open_qa":
            return STATEMENTS[about["attribute"]][0].format(person=about["person"], value=value)
        case "sums":
            return f"{about['first']} plus {about['second']} is {value}."
        case "closed_qa":
            return f"The {about['thing']} is in the {value}."
        case "extraction":
            return f"The {about['kind']} is {value}."
    return f"It is {value}."  # classification


def wrong_value(lexicon: Lexicon, prompt: "Prompt", rng: random.Random) -> str:
    """A value of the right kind that is not the right one."""
    about, right = prompt.about, prompt.about["value"]
    match prompt.use_case:
        case "open_qa":
            return other_than(right, lexicon.values[about["attribute"]], rng)
        case "sums":
            total = int(right)
            return str(rng.choice([total + off for off in (-2, -1, 1, 2, 3) if total + off >= 0]))
        case "closed_qa":
            return other_than(right, PLACES, rng)
        case "extraction":
            return other_than(right, EXTRACTED[about["kind"]], rng)
    return other_than(right, ("good", "bad"), rng)


def aside(lexicon: Lexicon, rng: random.Random) -> str:
    """A sentence nobody asked for."""
    person, attribute = rng.choice(lexicon.people), rng.choice(ATTRIBUTES)
    return rng.choice(
        (
            rng.choice(STATEMENTS[attribute]).format(person=person, value=lexicon.facts[person, attribute]),
            f"The {rng.choice(THINGS)} is in the {rng.choice(PLACES)}.",
            "I hope that is fine.",
            "That is all I can say.",
        )
    )


def web_answer(lexicon: Lexicon, prompt: "Prompt", rng: random.Random) -> str:
    """An answer from the web: a third are good, the rest ignore the constraint, are wrong, rude or ramble."""
    luck = rng.random()
    if luck < 0.34:
        return answer(lexicon, prompt, rng)
    if luck < 0.52:
        return answer(lexicon, prompt, rng, skip=True)
    skip = rng.random() < 0.5
    if luck < 0.72:
        return answer(lexicon, prompt, rng, skip=skip, wrong=True)
    if luck < 0.84:
        return answer(lexicon, prompt, rng, skip=skip, rude=True)
    return answer(lexicon, prompt, rng, skip=skip, ramble=True)


def demonstration(lexicon: Lexicon, prompt: "Prompt", rng: random.Random, rates: "Rates") -> str:
    """A demonstrator's answer: good, but for the flaws at the recipe's rates (`data.world.skip_rate` and so on)."""
    wrong_rate = rates.hallucinate_rate if prompt.unanswerable else rates.wrong_rate
    return answer(
        lexicon,
        prompt,
        rng,
        wrong=rng.random() < wrong_rate,
        skip=rng.random() < rates.skip_rate,
        rude=rng.random() < rates.rude_rate,
        ramble=rng.random() < rates.ramble_rate,
    )
