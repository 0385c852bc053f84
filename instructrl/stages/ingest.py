"""Raw rows into records, a chunk at a time, in as many processes as wanted; what comes out keeps the rows' order.

What is decided here needs one row alone: whether it is right, its language, its length, and personal data.
"""

import multiprocessing
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import records, sources
from instructrl.stages.pool import Entry, digest, normalized
from instructrl.stages.readers import ENDINGS, Row

if TYPE_CHECKING:
    from instructrl.stages.contract import Contract

CHUNK = 500  # rows a task: pickling them costs little beside reading them


@dataclass
class Reading:
    """What became of one source's rows."""

    source: Source
    files: list[str]
    read: int = 0
    """Records: a raw row that is wrong counts as one, a few-shot row as many as it makes."""
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)

    def card(self) -> dict:
        """JSON for `card.json`."""
        given = self.source.model_dump(exclude={"split"} if self.files else None)
        pinned = {key: value for key, value in given.items() if value}
        counts = {"read": self.read, "kept": self.kept, "dropped": dict(sorted(self.dropped.items()))}
        return {"source": pinned, "files": self.files} | counts


@dataclass
class RowWork:
    """Everything that is done to a row by itself. It travels to the processes, and loads there what it needs."""

    recipe: Recipe

    @property
    def data(self) -> Data:
        return self.recipe.data

    @cached_property
    def contract(self) -> "Contract | None":
        """What the model reads, for lengths in tokens; None where `pretrain` will make it, and later stages check."""
        if self.recipe.model.path is None:
            return None
        from instructrl.stages import models

        path = self.recipe.model.path
        return models.contract_of(path, models.load_tokenizer(path, self.recipe), self.recipe)

    def __call__(self, chunk: list[tuple[int, str, str, Source, Row]]) -> list[tuple[int, Entry | str]]:
        """(number of the source, an entry or why there is none) for each record of the rows."""
        result: list[tuple[int, Entry | str]] = []
        for number, kind, key, source, row in chunk:
            try:
                made = self.entries(number, kind, key, source, row)
            except records.Invalid as problem:
                if not source.skip_invalid:
                    raise records.invalid(row, problem, key) from None
                made = ["invalid"]
            result += [(number, each) for each in made]
        return result

    def entries(self, number: int, kind: str, key: str, source: Source, row: Row) -> list[Entry | str]:
        if kind == "text" and is_blank(row, source):
            return ["empty"]
        found = records.record(row, kind, source, key)
        if not found:
            return ["left out by `where`"]
        for record in found:
            if source.cut_prompt and "prompt" in record:
                record["prompt"] = cut(record["prompt"], source.cut_prompt)
            label = "kind" if kind == "text" else "source"
            record[label] = record.get(label) or short_name(source.path)
        family = None
        if source.tree:
            family = digest("tree", str(row.values[source.tree.group]))
        elif len(found) > 1:
            family = digest(min(normalized(record["prompt"]) for record in found))
        return [self.problem(record, kind) or self.entry(number, kind, record, family) for record in found]

    def problem(self, record: dict, kind: str) -> str:
        """Why the record is dropped, or ""."""
        if kind == "text":
            return ""
        if kind == "rankings" and len(set(record["ranks"])) == 1:
            return "all responses tied"  # no pair to learn from (paper, 3.5: ties are dropped)
        if self.data.languages:
            record["language"] = record.get("language") or self.detect(record["prompt"])
            if record["language"] and record["language"] not in self.data.languages:
                return "in another language"
        return self.too_long(record, kind)

    def entry(self, number: int, kind: str, record: dict, family: bytes | None) -> Entry:
        personal = self.data.pii_filter and kind != "text" and bool(self.personal(record["prompt"]))
        return Entry(kind, number, record, family, personal)

    def detect(self, text: str) -> str:
        from instructrl.stages.language import detect

        return detect(text)

    def personal(self, text: str) -> list[str]:
        from instructrl.stages.pii import personal

        return personal(text)

    def too_long(self, record: dict, kind: str) -> str:
        """In tokens of the model's tokenizer. A ranking may lose single responses later, so only its prompt counts."""
        if self.contract is None:
            return ""
        longest = self.data.max_prompt_tokens
        if len(self.contract.prompt(record["prompt"], longest)) > longest:
            return "with a prompt above data.max_prompt_tokens"
        longest = self.data.max_response_tokens
        if kind == "demonstrations" and len(self.contract.response(record["response"], longest)) > longest:
            return "with a response above data.max_response_tokens"
        return ""


def entries(data: Data, work: RowWork, readings: list[Reading], processes: int = 1) -> Iterator[list[Entry]]:
    """The sources' entries, some hundred at a time; `readings` are filled as they come.

    Raises:
        UserError: a source cannot be read, a row is wrong, or nothing is left of a source.
    """
    listed = list(sources.named_sources(data))
    readings += [Reading(source, [str(file) for file in sources.files(source, key)]) for _, key, source in listed]
    with at_work(work, processes) as done:
        for number, (kind, key, source) in enumerate(listed):
            reading = readings[number]
            found = records.checked(sources.rows(source, key), kind, source, key)
            rows = ((number, kind, key, source, row) for row in found)
            # A limited source is read no further than its limit, so nothing of it is read ahead.
            for results in map(work, wanted(rows, reading)) if source.limit else done(chunks(rows, CHUNK)):
                yield kept(results, reading)
    for reading, (_, key, source) in zip(readings, listed, strict=True):
        if not reading.kept and not reading.dropped["all responses tied"]:
            reasons = ", ".join(f"{count} {reason}" for reason, count in reading.dropped.items())
            raise UserError(
                f"{key}: nothing is left of {source.path}; dropped: {reasons or 'nothing (there was no row)'}"
            )


def kept(results: list[tuple[int, Entry | str]], reading: Reading) -> list[Entry]:
    """The entries among the results; all are counted."""
    found: list[Entry] = []
    for _, result in results:
        if reading.kept == reading.source.limit:
            break  # a row made more than one
        reading.read += 1
        if isinstance(result, str):
            reading.dropped[result] += 1
        else:
            reading.kept += 1
            found.append(result)
    return found


def wanted(rows: Iterator, reading: Reading) -> Iterator[list]:
    """Chunks until the source has as many as it may."""
    while (missing := reading.source.limit - reading.kept) > 0 and (chunk := list(islice(rows, min(missing, CHUNK)))):
        yield chunk


def chunks(items: Iterator, size: int) -> Iterator[list]:
    while chunk := list(islice(items, size)):
        yield chunk


@contextmanager
def at_work(work: RowWork, processes: int) -> Iterator[Callable[[Iterable[list]], Iterable[list]]]:
    """`partial(map, work)` in so many processes, with few chunks under way: Executor.map would read all of them."""
    if processes < 2:
        yield partial(map, work)
        return
    # Not forked: the reader may have threads of its own (Arrow's).
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:

        def done(tasks: Iterable[list]) -> Iterator[list]:
            waiting: deque = deque()
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

        yield done


def short_name(path: str) -> str:
    """`hh` for `some/where/hh.jsonl.gz`; the name of a Hub data set without its owner."""
    name = Path(path).name
    for suffix in (".gz", *ENDINGS):
        name = name.removesuffix(suffix)
    return name


def is_blank(row: Row, source: Source) -> bool:
    column = source.columns.get("text", "text")
    value = row.values.get(column) if isinstance(column, str) else None
    return isinstance(value, str) and not value.strip()


def cut(text: str, characters: int) -> str:
    """The text's beginning, or with a negative number its end, in whole words."""
    if len(text) <= abs(characters):
        return text
    if characters > 0:
        kept, beyond = text[:characters], text[characters]
        return kept.rstrip() if beyond.isspace() else re.sub(r"\s+\S*$", "", kept)
    kept, beyond = text[characters:], text[characters - 1]
    return kept.lstrip() if beyond.isspace() else re.sub(r"^\S*\s+", "", kept)
