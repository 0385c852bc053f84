"""Sentences that documents, prompts and answers share: facts, questions about them, stories, reviews, lists."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from instructrl.world.lexicon import ANIMALS, BLAME, FOODS, PLACES, PRAISE, THINGS

STATEMENTS = {
    "town": ("{person} lives in {value}.", "{person} is from {value}.", "The home of {person} is in {value}."),
    "job": ("{person} works as a {value}.", "{person} is a {value}.", "The job of {person} is {value}."),
    "pet": ("{person} has a pet {value}.", "{person} keeps a {value}.", "The pet of {person} is a {value}."),
    "food": ("{person} likes {value}.", "{person} often eats {value}.", "{person} is fond of {value}."),
}
QUESTIONS = {
    "town": ("Where does {person} live?", "Which town is {person} from?", "Tell me where {person} lives."),
    "job": ("What is the job of {person}?", "What does {person} work as?", "Tell me the job of {person}."),
    "pet": ("What pet does {person} have?", "Which animal does {person} keep?", "Tell me the pet of {person}."),
    "food": ("What does {person} like to eat?", "Which food does {person} like?", "Tell me what {person} eats."),
}


@dataclass(frozen=True)
class Story:
    """An animal that loses or finds a thing at a place, and how it ends."""

    animal: str
    thing: str
    place: str
    verb: str  # lost or found
    goes_home: bool

    @property
    def sentences(self) -> tuple[str, str, str]:
        lost = self.verb == "lost"
        leaving = f"The {self.animal} went home" if self.goes_home else f"Then the {self.animal} left the {self.place}"
        return (
            f"One day a {self.animal} {self.verb} a {self.thing} at the {self.place}.",
            f"The {self.animal} was {'sad' if lost else 'happy'}.",
            f"{leaving} {'without' if lost else 'with'} the {self.thing}.",
        )

    def __str__(self) -> str:
        return " ".join(self.sentences)


def story(rng: random.Random, animal: str | None = None, thing: str | None = None) -> Story:
    """A random story, about the given animal and thing if any."""
    return Story(
        animal or rng.choice(ANIMALS),
        thing or rng.choice(THINGS),
        rng.choice(PLACES),
        rng.choice(("lost", "found")),
        rng.random() < 0.5,
    )


def review(rng: random.Random, good: bool) -> str:
    """One sentence on a food, without the verdict."""
    first, second = rng.sample(PRAISE if good else BLAME, 2)
    return f"The {rng.choice(FOODS)} was {first} and {second}."


def listing(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def capitalized(text: str) -> str:
    """The text with its first letter in upper case, the rest as it is."""
    return text[:1].upper() + text[1:]


def other_than(word: str | None, words: Sequence[str], rng: random.Random) -> str:
    """One of `words`, but not `word`."""
    return rng.choice([other for other in words if other != word])
