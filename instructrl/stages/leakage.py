"""Whether what a model is measured on occurs in what it learns from: equal texts, and runs of 13 words in common.

As GPT-3 was checked (Brown et al. 2020, arXiv 2005.14165, App. C), with words in lower case and without punctuation. A
run of words that many training rows and several held-out texts share is a phrase of the format ("Answer the following
question ..."), not a leak, and does not count.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy
from numpy.typing import NDArray

WORD = re.compile(r"\w+")
SHORTEST = 4
"""Words: 'yes' as a whole text is no leak. Our choice."""
COMMON = 10
"""A run of words in more training rows than this, as in GPT-3, and in two held-out texts or more, is a phrase."""
EXAMPLES, CHARACTERS = 3, 120  # of each set, in the card
PHRASES = 20  # in the card
_BASE = numpy.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0


def words(text: str) -> NDArray[numpy.uint64]:
    """A number for each word: [words]. The same word has the same number in one process only."""
    found = WORD.findall(text.casefold())
    return numpy.fromiter(map(hash, found), dtype=numpy.int64, count=len(found)).view(numpy.uint64)


def runs(numbers: NDArray[numpy.uint64], length: int) -> NDArray[numpy.uint64]:
    """A number for each run of so many words: [words - length + 1], [0] of a shorter text.

    A polynomial modulo 2^64: two different runs with one number are not to be expected among fewer than billions.
    """
    if len(numbers) < length:
        return numpy.empty(0, dtype=numpy.uint64)
    powers = _BASE ** numpy.arange(1, length + 1, dtype=numpy.uint64)
    return numpy.correlate(numbers, powers)


def whole(numbers: NDArray[numpy.uint64]) -> int:
    """A number for all words together, in their order."""
    return hash(numbers.tobytes())


def strings(value: object) -> Iterator[str]:
    """All texts in a row, however nested."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from strings(each)


@dataclass
class Leak:
    """Training rows that hold something of one held-out set."""

    against: str
    exact: set[int] = field(default_factory=set)
    ngram: set[int] = field(default_factory=set)
    examples: list[str] = field(default_factory=list)

    @property
    def rows(self) -> set[int]:
        return self.exact | self.ngram

    def card(self) -> dict:
        counts = {"exact": len(self.exact), "ngram": len(self.ngram - self.exact)}
        return {"against": self.against, **counts, "examples": self.examples}


class HeldOut:
    """The texts of all held-out sets, by their words.

    Args:
        sets: (name, texts) of each.
        length: words of a run.
    """

    def __init__(self, sets: Iterable[tuple[str, Iterable[str]]], length: int) -> None:
        self.length = length
        self.names: list[str] = []
        self.wholes: list[set[int]] = []  # of each set
        self.set_runs: list[NDArray[numpy.uint64]] = []  # sorted, of each set
        distinct: set[int] = set()  # a text that two sets have is one text
        counted = []
        for name, texts in sets:
            wholes, found = set(), []
            for text in texts:
                numbers = words(text)
                if len(numbers) < SHORTEST:
                    continue
                wholes.add(this := whole(numbers))
                found.append(its := numpy.unique(runs(numbers, length)))
                if this not in distinct:
                    distinct.add(this)
                    counted.append(its)
            self.names.append(name)
            self.wholes.append(wholes)
            self.set_runs.append(numpy.unique(joined(found)))
        self.runs, self.texts = numpy.unique(joined(counted), return_counts=True)
        self.rows = numpy.zeros(len(self.runs), dtype=numpy.int32)  # training rows that have each run
        self.phrases: Counter[str] = (
            Counter()
        )  # the training rows of no leak that have a phrase, by the first they have

    def matches(self, texts: list[NDArray[numpy.uint64]]) -> NDArray[numpy.intp]:
        """Which of all runs a row with these texts has: indices of `runs`."""
        every = joined([runs(numbers, self.length) for numbers in texts])
        if not len(every) or not len(self.runs):
            return numpy.empty(0, dtype=numpy.intp)
        places = numpy.searchsorted(self.runs, every)
        places[places == len(self.runs)] = 0
        places = places[self.runs[places] == every]
        return numpy.unique(places) if len(places) else places

    def is_phrase(self) -> NDArray[numpy.bool]:
        return (self.rows > COMMON) & (self.texts > 1)

    def first_phrase(self, texts: list[str], matched: NDArray[numpy.intp]) -> str:
        """The first words of the texts that are one of the runs `matched`, as far as runs of it go on."""
        wanted = self.runs[matched]
        for text in texts:
            there = numpy.isin(runs(words(text), self.length), wanted)
            if there.any():
                start = int(there.argmax())
                ends = numpy.flatnonzero(~there[start:])
                count = (int(ends[0]) if len(ends) else len(there) - start) + self.length - 1
                return " ".join(WORD.findall(text.casefold())[start : start + count])
        raise ValueError("none of the texts has such a run")

    def phrase_card(self) -> dict:
        """What was taken for a phrase, for the card: how many rows have one, and the most frequent."""
        listed = sorted(self.phrases.items(), key=lambda item: (-item[1], item[0]))[:PHRASES]
        return {"rows": self.phrases.total(), "most": [{"rows": rows, "words": text} for text, rows in listed]}


def joined(parts: list[NDArray[numpy.uint64]]) -> NDArray[numpy.uint64]:
    return numpy.concatenate(parts) if parts else numpy.empty(0, dtype=numpy.uint64)


def find(training: Callable[[], Iterable[tuple[int, list[str]]]], held_out: HeldOut) -> list[Leak]:
    """The training rows, (number, its texts), that leak, by held-out set.

    They are read twice, first to learn which runs are phrases. Rows that share these alone do not leak, and are counted
    in `held_out.phrases`. Memory: a byte a row, what leaks, and the phrases.
    """
    suspected = bytearray()
    for number, texts in training():
        numbers = [words(text) for text in texts]
        matched = held_out.matches(numbers)
        held_out.rows[matched] += 1
        if len(matched) or any(whole(each) in known for each in numbers for known in held_out.wholes):
            suspected.extend(bytes(max(0, number + 1 - len(suspected))))
            suspected[number] = 1
    phrase, leaks = held_out.is_phrase(), [Leak(name) for name in held_out.names]
    for number, texts in training():
        if number >= len(suspected) or not suspected[number]:
            continue
        numbers = [words(text) for text in texts]
        wholes = {whole(each) for each in numbers if len(each) >= SHORTEST}
        matched = held_out.matches(numbers)
        shared = held_out.runs[matched[~phrase[matched]]]
        leaks_here = False
        for leak, its_wholes, its_runs in zip(leaks, held_out.wholes, held_out.set_runs, strict=True):
            if wholes & its_wholes:
                leak.exact.add(number)
            if numpy.isin(shared, its_runs, assume_unique=True).any():
                leak.ngram.add(number)
            if number in leak.exact or number in leak.ngram:
                leaks_here = True
                if len(leak.examples) < EXAMPLES:
                    leak.examples.append(" ".join(texts[0].split())[:CHARACTERS])
        if not leaks_here and len(matched):
            held_out.phrases[held_out.first_phrase(texts, matched)] += 1
    return leaks
