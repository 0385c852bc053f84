"""What is counted of a prepared table: rows by use case, kind, language and source, lengths, and prompts a user.

A table is read in batches and never held. What is held are counters, whose size depends on how many different lengths
and names there are, and 8 bytes a row to count users.
"""

import hashlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow.parquet
from numpy.typing import NDArray

from instructrl.stages.paper_data import Summary

BATCH_ROWS = 1024

MOST_NAMES = 1000
"""Of a column's values so many are counted by name, and further ones as OTHERS, so that a column with another value in
every row (an id taken for a category) cannot fill the memory. Which ones follows from the order of rows."""

OTHERS = "(others)"

NAMED = ("category", "kind", "language", "source")
"""The columns of a table whose values are counted."""

Count = Callable[[list[str]], list[int]]
"""Lengths of texts, in tokens or in words."""


def count_words(texts: list[str]) -> list[int]:
    """Lengths in words: what whitespace separates."""
    return [len(text.split()) for text in texts]


class Lengths(Counter[int]):
    """How often each length occurs."""

    def summary(self) -> Summary | None:
        """Mean, sample standard deviation, quartiles (linear interpolation) and extremes; None of nothing."""
        if not self:
            return None
        values = np.array(sorted(self), dtype=np.int64)
        below = np.cumsum([self[int(value)] for value in values])
        count, total = int(below[-1]), sum(value * often for value, often in self.items())
        squares = sum(value * value * often for value, often in self.items())
        spread = (squares - total * total / count) / (count - 1) if count > 1 else 0.0
        quartiles = [_at(values, below, share * (count - 1)) for share in (0.25, 0.5, 0.75)]
        return Summary(count, total / count, max(spread, 0.0) ** 0.5, int(values[0]), *quartiles, int(values[-1]))


def _at(values: NDArray[np.int64], below: NDArray[np.int64], place: float) -> float:
    """The value at this place, from 0, of all that are counted, sorted; between two places, between their values."""
    low, high = (int(values[np.searchsorted(below, whole, side="right")]) for whole in (int(place), -int(-place // 1)))
    return low + (high - low) * (place - int(place))


@dataclass
class Tally:
    """The counts of one table."""

    rows: int = 0
    names: dict[str, Counter[str]] = field(default_factory=lambda: {column: Counter() for column in NAMED})
    """Rows by each column's value; "" is unknown."""
    prompts: dict[tuple[str, str], Lengths] = field(default_factory=lambda: defaultdict(Lengths))
    """Lengths of prompts by (column, value), and of all by ("", "")."""
    responses: dict[tuple[str, str], Lengths] = field(default_factory=lambda: defaultdict(Lengths))
    """Of demonstrations, the same of responses."""
    ranked: Counter[int] = field(default_factory=Counter)
    """Of rankings, how often each number of responses occurs."""
    users: array = field(default_factory=lambda: array("Q"))
    """A hash of the user of each row whose user is known."""

    def prompts_a_user(self) -> NDArray[np.int64]:
        """The number of prompts of each user, in no order that means anything."""
        return np.unique(np.frombuffer(self.users, dtype=np.uint64), return_counts=True)[1]

    def name(self, column: str, value: str) -> str:
        """Count one row's value. Returns what it is counted as."""
        known = self.names[column]
        counted = value if value in known or len(known) < MOST_NAMES else OTHERS
        known[counted] += 1
        return counted


def tally(path: Path, count: Count) -> Tally:
    """Read a table of `tables.py` in batches of BATCH_ROWS rows and count."""
    found = Tally()
    file = pyarrow.parquet.ParquetFile(path)
    there = set(file.schema_arrow.names)
    wanted = [name for name in (*NAMED, "user", "prompt", "response", "ranks") if name in there]
    for batch in batches(file, wanted):
        columns = {name: batch[name].to_pylist() for name in wanted}
        found.rows += batch.num_rows
        named = {
            column: [found.name(column, value or "") for value in columns[column]]
            for column in NAMED
            if column in columns
        }
        for texts, lengths in (("prompt", found.prompts), ("response", found.responses)):
            if texts in columns:
                _add(lengths, count(columns[texts]), named)
        found.ranked.update(len(ranks) for ranks in columns.get("ranks", ()))
        found.users.extend(_hashed(user) for user in columns.get("user", ()) if user)
    return found


def batches(file: pyarrow.parquet.ParquetFile, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
    """One group of rows at a time: over all of them `iter_batches` keeps what it has read."""
    for group in range(file.num_row_groups):
        yield from file.iter_batches(BATCH_ROWS, [group], columns)


def _add(lengths: dict[tuple[str, str], Lengths], counted: list[int], named: dict[str, list[str]]) -> None:
    lengths["", ""].update(counted)
    for column, values in named.items():
        for value, length in zip(values, counted, strict=True):
            lengths[column, value][length] += 1


def _hashed(user: str) -> int:
    """64 bits: of a million users, two share a hash with a chance of 3 in 10^8."""
    return int.from_bytes(hashlib.blake2b(user.encode(errors="surrogatepass"), digest_size=8).digest())
