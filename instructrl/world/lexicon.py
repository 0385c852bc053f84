"""The words of the tiny world and what is true in it: people, their facts, and an invented dictionary."""

import random
from collections.abc import Sequence
from functools import cached_property

JOBS = ("baker", "tailor", "miller", "guard", "painter", "farmer", "sailor", "singer")
PETS = ("cat", "dog", "parrot", "rabbit", "pony", "duck")
FOODS = ("soup", "bread", "cheese", "rice", "jam", "honey", "pie", "cake")
ANIMALS = ("fox", "wolf", "hen", "goat", "bear", "frog")
THINGS = ("lamp", "cup", "rope", "bell", "drum", "coin", "kite", "book")
PLACES = ("mill", "barn", "shop", "inn", "dock", "cave")
COLORS = ("red", "blue", "green", "black", "white")
PRAISE = ("warm", "fresh", "tasty", "lovely", "great", "nice")
BLAME = ("cold", "stale", "awful", "dull", "nasty", "poor")
INSULTS = ("dolt", "oaf", "fool")
RUDE = frozenset({*INSULTS, "silly", "away"})
"""Words that make an answer toxic: the insults, 'a silly question', 'go away'."""

ATTRIBUTES = ("town", "job", "pet", "food")
CATEGORIES = {"animals": ANIMALS, "foods": FOODS, "jobs": JOBS, "colors": COLORS, "things": THINGS}
"""What one can be asked to list."""
MEMBERS = {category: frozenset(words) for category, words in CATEGORIES.items()} | {
    "animals": frozenset(ANIMALS + PETS)  # nobody lists pets in the text, but whoever does is right
}
NUMBERS = {2: "two", 3: "three", 4: "four"}
LARGEST_ADDEND = 6

TOWNS = 8
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
ENDINGS = ("a", "o", "in", "el", "an", "is")
UNWELCOME = ("fag", "kik", "naz", "nig", "pen", "rap", "sat", "tit", "vag")
"""Beginnings of invented names that would make a reader wince."""


class Lexicon:
    """People with a town, a job, a pet and a food each; strangers of whom nothing is known; towns; a dictionary.

    Everything follows from `seed`, `people` and `strangers`; names are invented syllable by syllable.
    """

    def __init__(self, seed: int, people: int, strangers: int):
        self.seed = seed
        rng = random.Random(f"tiny world {seed}")
        taken = {word.lower() for word in RUDE.union(PETS, PRAISE, BLAME, PLACES, *CATEGORIES.values())}
        self.people = tuple(invent(rng, taken).capitalize() for _ in range(people))
        self.strangers = tuple(invent(rng, taken).capitalize() for _ in range(strangers))
        self.towns = tuple(invent(rng, taken).capitalize() for _ in range(TOWNS))
        self.values: dict[str, Sequence[str]] = {"town": self.towns, "job": JOBS, "pet": PETS, "food": FOODS}
        self.facts = {(person, name): rng.choice(self.values[name]) for person in self.people for name in ATTRIBUTES}
        self.dictionary = {word: invent(rng, taken) for word in ANIMALS + THINGS + COLORS}

    @cached_property
    def everyone(self) -> tuple[str, ...]:
        """People and strangers."""
        return self.people + self.strangers

    @cached_property
    def song_words(self) -> tuple[str, ...]:
        """What a song's random line is made of."""
        return THINGS + ANIMALS + PLACES + COLORS + FOODS + JOBS + self.everyone

    @cached_property
    def kinds(self) -> dict[str, frozenset[str]]:
        """Kind of value -> its words in lower case: what an answer can name exactly one of."""
        kinds = {
            **self.values,
            "animal": ANIMALS,
            "thing": THINGS,
            "place": PLACES,
            "color": COLORS,
            "person": self.everyone,
            "verdict": ("good", "bad"),
            "verb": ("lost", "found"),
        }
        return {kind: frozenset(word.lower() for word in words) for kind, words in kinds.items()}

    @cached_property
    def word_classes(self) -> dict[str, str]:
        """Word -> its class, so that fluency does not depend on which person, place or food is named."""
        classes = {
            "<person>": self.everyone,
            "<town>": self.towns,
            "<job>": JOBS,
            "<animal>": PETS + ANIMALS,
            "<food>": FOODS,
            "<thing>": THINGS,
            "<place>": PLACES,
            "<color>": COLORS,
            "<praise>": PRAISE,
            "<blame>": BLAME,
        }
        return {word: name for name, words in classes.items() for word in words}


def invent(rng: random.Random, taken: set[str]) -> str:
    """A word that is not in `taken`, and is from now on: consonant, vowel, consonant, ending."""
    while True:
        word = rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(CONSONANTS) + rng.choice(ENDINGS)
        if word not in taken and not word.startswith(UNWELCOME):
            taken.add(word)
            return word
