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
_MULTIPLIERS = numpy.array([0xBF58476D1CE4E5B9, 0x94D049BB133111EB], dtype=numpy.uint64)  # odd, of splitmix64


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


class Sieve:
    """A set of numbers in 16 MB, however many: it has every number that was added, and seldom another (Bloom 1970).

    With two bits a number of 2^27, a million numbers let 1 in 4,500 others through, ten million 1 in 50.
    """

    BITS = 27

    def __init__(self) -> None:
        self.bits = numpy.zeros(2 ** (self.BITS - 3), dtype=numpy.uint8)

    def places(self, numbers: NDArray[numpy.uint64]) -> tuple[NDArray[numpy.intp], NDArray[numpy.uint8]]:
        """(byte, bit in it) of each number's two bits: [2, numbers] each."""
        mixed = (numbers ^ (numbers >> numpy.uint64(31))) * _MULTIPLIERS[:, None] >> numpy.uint64(64 - self.BITS)
        within = (mixed & numpy.uint64(7)).astype(numpy.uint8)
        return (mixed >> numpy.uint64(3)).astype(numpy.intp), numpy.uint8(1) << within

    def add(self, numbers: NDArray[numpy.uint64]) -> None:
        numpy.bitwise_or.at(self.bits, *self.places(numbers))

    def has(self, numbers: NDArray[numpy.uint64]) -> NDArray[numpy.bool]:
        bytes_, bits = self.places(numbers)
        return (self.bits[bytes_] & bits).all(axis=0)


Sets = Callable[[], Iterable[tuple[str, Iterable[str]]]]
"""(name, texts) of each held-out set, as often as it is called."""
Rows = Callable[[], Iterable[tuple[int, list[str]]]]
"""(number, its texts) of each training row, as often as it is called."""


def numbered(texts: Iterable[str], length: int) -> NDArray[numpy.uint64]:
    """The runs of the texts, and each long enough text as a whole."""
    found = []
    for numbers in map(words, texts):
        if len(numbers) >= SHORTEST:
            found += [runs(numbers, length), numpy.array([whole(numbers)], dtype=numpy.int64).view(numpy.uint64)]
    return joined(found)


def sift(training: Rows, sets: Sets, length: int) -> tuple[bytearray, Sieve]:
    """What may leak, in memory that does not grow with the held-out sets: (1 for each training row that may have
    something of theirs, by its number; what of them training may have)."""
    held_out, shared, suspected = Sieve(), Sieve(), bytearray()
    for _, texts in sets():
        for text in texts:
            held_out.add(numbered([text], length))
    for number, texts in training():
        every = numbered(texts, length)
        its = every[held_out.has(every)]
        if len(its):
            shared.add(its)
            suspected.extend(bytes(max(0, number + 1 - len(suspected))))
            suspected[number] = 1
    return suspected, shared


class HeldOut:
    """The texts of all held-out sets, by their words; of these only what training may have, too.

    Args:
        sets: (name, texts) of each.
        length: words of a run.
        shared: the runs and texts that training may have.
    """

    def __init__(self, sets: Iterable[tuple[str, Iterable[str]]], length: int, shared: Sieve) -> None:
        self.length = length
        self.names: list[str] = []
        self.wholes: list[set[int]] = []  # of each set
        self.set_runs: list[NDArray[numpy.uint64]] = []  # sorted, of each set
        distinct: set[int] = set()  # a text that two sets have is one text
        counted = []
        for name, texts in sets:
            wholes, found = set(), []
            for text in texts:
                its = numbered([text], length)
                its = its[shared.has(its)]
                if not len(its):
                    continue
                numbers = words(text)
                wholes.add(this := whole(numbers))
                its = runs(numbers, length)
                found.append(its := numpy.unique(its[shared.has(its)]))
                if this not in distinct:
                    distinct.add(this)
                    counted.append(its)
            self.names.append(name)
            self.wholes.append(wholes)
            self.set_runs.append(numpy.unique(joined(found)))
        self.runs, self.texts = numpy.unique(joined(counted), return_counts=True)
        self.rows = numpy.zeros(len(self.runs), dtype=numpy.int32)  # training rows that have each run
        self.phrases: Counter[str] = Counter()  # rows of no leak that have a phrase, by the first they have

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


def find(training: Rows, sets: Sets, length: int) -> tuple[list[Leak], HeldOut]:
    """The training rows that leak, by held-out set; and the sets, which have counted the phrases.

    Training rows are read three times: to learn which may leak, which runs are phrases, and what leaks. Rows that share
    phrases alone do not leak. Memory: two sieves, a byte a row, and what training and the sets share.
    """
    suspected, shared = sift(training, sets, length)
    held_out = HeldOut(sets(), length, shared)

    def suspects() -> Iterator[tuple[int, list[str]]]:
        return ((number, texts) for number, texts in training() if suspected[number : number + 1] == b"\1")

    for _, texts in suspects():
        held_out.rows[held_out.matches([words(text) for text in texts])] += 1
    phrase, leaks = held_out.is_phrase(), [Leak(name) for name in held_out.names]
    for number, texts in suspects():
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
    return leaks, held_out
