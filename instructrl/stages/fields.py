"""The values of one raw row under our names, as texts, lists and notes."""

import json

from instructrl import columns
from instructrl.columns import Invalid
from instructrl.config import Source
from instructrl.stages import chats
from instructrl.stages.readers import Row

NOTES = ("category", "kind", "user", "language", "source")
"""What may be known of a prompt, as in `stages.tables`."""


class Fields:
    """A row's values under our names, with `columns` applied."""

    def __init__(self, row: Row, source: Source) -> None:
        self.values = row.values
        self.columns = source.columns

    def __contains__(self, column: str) -> bool:
        return column in self.columns or column in self.values

    def has(self, column: str) -> bool:
        """Whether an optional column is there and not null. One that a path leads into is, whatever is in it."""
        rule = self.columns.get(column, column)
        paths = list(columns.names(rule))
        return not paths or any(self.values.get(columns.head(path, self.values)) is not None for path in paths)

    def name(self, column: str) -> str:
        """What the column is called in errors: their name, or ours where a rule makes it."""
        theirs = self.columns.get(column, column)
        return " + ".join(theirs) if isinstance(theirs, tuple) else theirs if isinstance(theirs, str) else column

    def value(self, column: str, responses: int = 0) -> object:
        """Whatever is there."""
        return columns.value(self.columns.get(column, column), self.values, responses)

    def text(self, column: str) -> str:
        """A text that is not empty; several columns are joined by a blank line, empty ones left out."""
        theirs = self.columns.get(column, column)
        if not isinstance(theirs, tuple):
            return chats.text(self.value(column), self.name(column))
        parts = [chats.text(columns.at(path, self.values), path, may_be_empty=True) for path in theirs]
        return chats.not_empty("\n\n".join(part for part in parts if part.strip()), self.name(column))

    def reply(self, column: str) -> str:
        """A response that is not empty."""
        if isinstance(self.columns.get(column), tuple):
            return self.text(column)
        return chats.reply(self.value(column), self.name(column))

    def note(self, column: str) -> str:
        """An optional text, number or list of them: "" if it is missing, null or something else."""
        value = self.value(column) if self.has(column) else None
        if isinstance(value, list):
            return ", ".join(filter(None, (_note(entry, self.name(column)) for entry in value)))
        return _note(value, self.name(column))

    def notes(self) -> dict[str, str]:
        """Everything that may be known of a prompt."""
        return {column: self.note(column) for column in NOTES}

    def list(self, column: str, responses: int = 0) -> list:
        """A list: of several columns' values, or one column's, written as JSON where a format has no lists (CSV)."""
        value, name = self.value(column, responses), self.name(column)
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise Invalid(f"{name} is a string, but must be a list") from None
        if not isinstance(value, list):
            raise Invalid(f"{name} is {chats.kind(value)}, but must be a list")
        return value


def _note(value: object, name: str) -> str:
    return "" if isinstance(value, dict | list) else chats.encodable(columns.word(value, null=""), name)
