"""Rows of one local file, one after the other: no format is held in memory, and nothing is unpickled.

Every row comes with where it stands (file and line or row), so that an error can point at it.
"""

import codecs
import csv
import gzip
import json
import re
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj
from typing import IO

from instructrl.errors import UserError

LONGEST = 256 * 2**20
"""Bytes of a line, or characters of a row of a JSON array. A longer one means a file without line ends, or no data."""

CHUNK = 2**20  # characters of a JSON array read at a time
BATCH = 256  # rows of a Parquet file decoded at a time
BLANK = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True)
class Row:
    """One raw row: the source's own columns, and where it stands, for error messages."""

    values: dict[str, object]
    where: str


def read_file(file: Path, key: str) -> Iterator[Row]:
    """The rows of a file with one of our `ENDINGS`. Raises UserError for what cannot be read, and for no row at all."""
    with _readable(file, key) as reached:
        for row in READERS[ending(file)](file):
            reached[:] = [row.where.removeprefix(str(file))]
            yield row
    if not reached:
        raise UserError(f"{key}.path: {file} is empty")


def ending(path: Path) -> str:
    """`.jsonl` for both `a.jsonl` and `a.jsonl.gz`; "" for an ending we do not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in READERS else ""


@contextmanager
def _readable(file: Path, key: str) -> Iterator[list[str]]:
    """Turn what a broken file raises into one sentence. What is yielded is for the place of the last row read."""
    reached: list[str] = []
    try:
        yield reached
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{key}: {file} is no complete gzip file{_after(reached)} ({error})") from None
    except OSError as error:
        problem = error.strerror or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{key}: cannot read {file}{_after(reached)} ({problem})") from None


def _after(reached: list[str]) -> str:
    return f" after{reached[0]}" if reached else ""


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if file.suffix.lower() == ".gz" else file.open("rb")  # type: ignore[return-value]


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """Number and text of each line, with its end. Decoded line by line, so that an error knows which one it is."""
    with _open(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
            if len(line) > LONGEST:
                raise UserError(f"{file} line {number} is longer than {LONGEST // 2**20} MB")
            if number == 1:
                _refuse_utf16(line, file)
                # Spreadsheets write a byte-order mark, which would become part of the first column's name.
                line = line.removeprefix(codecs.BOM_UTF8)
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file} line {number} is not UTF-8 text (byte {error.start} of the line: {error.reason})"
                ) from None


def _refuse_utf16(start: bytes, file: Path) -> None:
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file} is UTF-16 text; save it as UTF-8")


def _jsonl(file: Path) -> Iterator[Row]:
    for number, line in _lines(file):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            problem = f"{error.msg} at column {error.colno}"
            raise UserError(
                f"{file} line {number} is no JSON ({problem}); a .jsonl file has one object a line"
            ) from None
        except RecursionError:
            raise UserError(f"{file} line {number} is nested too deeply") from None
        except ValueError as error:  # an integer of thousands of digits
            raise UserError(f"{file} line {number} is no JSON we read ({str(error).split(';')[0]})") from None
        if not isinstance(values, dict):
            raise UserError(f'{file} line {number} is {_kind(values)}, but must be an object like {{"prompt": ...}}')
        yield Row(values, f"{file} line {number}")


class _Json:
    """A JSON text that is read as far as it is needed."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.chunks = self._chunks()
        self.text, self.at, self.ended = "", 0, False
        self.decoder = json.JSONDecoder()

    def _chunks(self) -> Iterator[str]:
        decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
        with _open(self.file) as stream:
            start = stream.read(len(codecs.BOM_UTF8))
            _refuse_utf16(start, self.file)
            raw = start.removeprefix(codecs.BOM_UTF8) or stream.read(CHUNK)
            try:
                while raw:
                    yield decoder.decode(raw)
                    read += len(raw)
                    raw = stream.read(CHUNK)
                yield decoder.decode(b"", final=True)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.file} is not UTF-8 text (near byte {read + error.start}: {error.reason})"
                ) from None

    def more(self) -> bool:
        """Read at least as much again as is waiting; False at the end of the file."""
        self.text, self.at = self.text[self.at :], 0
        wanted = max(2 * len(self.text), 1)
        while len(self.text) < wanted and not self.ended:
            chunk = next(self.chunks, None)
            self.ended = chunk is None
            self.text += chunk or ""
        return not self.ended

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            self.at = BLANK.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def value(self, what: str) -> object:
        """The next value; `what` says which it is."""
        while True:
            try:
                value, self.at = self.decoder.raw_decode(self.text, self.at)
                return value
            except RecursionError:
                raise UserError(f"{what} is nested too deeply") from None
            except json.JSONDecodeError as error:  # a mistake, or the rest of the value is still to be read
                if len(self.text) - self.at > LONGEST:
                    problem = f"{error.msg}), or is longer than {LONGEST // 2**20} MB"
                elif self.more():
                    continue
                else:
                    problem = f"{error.msg}); if {self.file.name} has one object a line, name it .jsonl"
                raise UserError(f"{what} is no JSON ({problem}") from None
            except ValueError as error:  # an integer of thousands of digits
                raise UserError(f"{what} is no JSON we read ({str(error).split(';')[0]})") from None


def _json(file: Path) -> Iterator[Row]:
    """The objects of one array, each read when it is asked for."""
    text, number, after = _Json(file), 0, ","
    if text.peek() != "[":
        listed = text.value(str(file))
        if text.peek():
            raise UserError(f"{file} is no JSON (extra data); if it has one object a line, name it .jsonl")
        raise UserError(f"{file} is {_kind(listed)}, but must be an array of objects: [{{...}}, {{...}}]")
    text.at += 1
    if text.peek() == "]":
        return
    while after == ",":
        number += 1
        where = f"{file} row {number}"
        text.peek()  # past the blanks, which the decoder does not skip
        values = text.value(where)
        if not isinstance(values, dict):
            raise UserError(f"{where} is {_kind(values)}, but must be an object")
        yield Row(values, where)
        after = text.peek()
        if after not in (",", "]"):
            found = f"{after!r} follows" if after else "the file ends"
            raise UserError(f"{file} is no JSON: {found} after row {number}, where ',' or ']' must be")
        text.at += 1
    if text.peek():
        raise UserError(f"{file} is no JSON: {text.peek()!r} follows the array")


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # the default stops at 128 kB a cell
    reader = csv.DictReader((line for _, line in _lines(file)), strict=True)
    try:
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]
        if twice:
            raise UserError(f"{file} has two columns {twice[0]!r}; rename one")
        for values in reader:
            where = f"{file} line {reader.line_num}"
            if None in values or None in values.values():
                raise UserError(f"{where} does not have as many cells as the header has columns")
            yield Row(values, where)
    except csv.Error as error:
        # Where the row begins, not where it was given up: an open quote takes all that follows with it.
        raise UserError(f"{file} line {reader.line_num + 1} is no CSV ({error})") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with _open(file) as stream, tempfile.TemporaryFile() as plain:
            if file.suffix.lower() == ".gz":  # Parquet is read from its end
                copyfileobj(stream, plain)
                stream = plain
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(values, f"{file} row {number}")
    except UnicodeDecodeError as error:
        last = number + BATCH
        raise UserError(f"{file} is not UTF-8 text in rows {number + 1} to {last} ({error.reason})") from None
    except pyarrow.ArrowInvalid as error:
        after = f" after row {number}" if number else ""
        raise UserError(f"{file} is no Parquet file{after} ({str(error).splitlines()[0]})") from None


def _txt(file: Path) -> Iterator[Row]:
    """Paragraphs: what stands between blank lines."""
    lines: list[str] = []
    first = 1
    for number, line in _lines(file):
        if line.strip():
            first = first if lines else number
            lines.append(line.rstrip("\r\n"))
        elif lines:
            yield Row({"text": "\n".join(lines)}, f"{file} line {first}")
            lines = []
    if lines:
        yield Row({"text": "\n".join(lines)}, f"{file} line {first}")


READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}
ENDINGS = tuple(READERS)


def _kind(value: object) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
