"""Rows of a data set in another form."""

from collections.abc import Callable, Iterable

from datasets import Dataset


def made(rows: Iterable[dict], of: Callable[[dict], dict]) -> Dataset:
    """`of` each row."""
    return Dataset.from_list([of(row) for row in rows])


def column(row: dict, *names: str) -> object:
    """The first of these columns that the row has.

    Raises:
        ValueError: it has none of them.
    """
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"has no column {' or '.join(map(repr, names))}")
