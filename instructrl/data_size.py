"""How many rows the recipe's data has and how long they are, before it is made: counted, sampled from the beginning of
files, published, or assumed; each says which."""

import gzip
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

from instructrl import columns
from instructrl.config import Recipe, Source
from instructrl.errors import UserError
from instructrl.shapes import Shape
from instructrl.stages import records, sources

SAMPLE = 100
"""Rows read of a file."""
BEGINNING = 2**22
"""Bytes decompressed of a file, to see by how much it grows."""


@dataclass(frozen=True)
class Rows:
    """A table: rows, and mean tokens of a prompt (or text) and of an answer."""

    count: float
    prompt: float
    answer: float = 0.0
    ranked: float = 2.0
    """Answers of a ranking."""


PUBLISHED = {
    "databricks/databricks-dolly-15k": Rows(15_011, 130, 120),
    "Anthropic/hh-rlhf": Rows(160_800, 150, 80),
    "trl-lib/tldr": Rows(116_722, 360, 40),
    "trl-lib/tldr-preference": Rows(92_858, 360, 40),
    "Salesforce/wikitext": Rows(860_000, 130),
}
"""Rows by the sets' cards; lengths are rough means."""
ASSUMED = Rows(10_000, 200, 200)
WORLD = Rows(0, 20, 12, 4)
"""Lengths in the built-in world, in the tokens that `pretrain` makes of it."""
WORLD_DOCUMENT = 42


@dataclass(frozen=True)
class Amounts:
    """What the stages read. Counts of rows, and mean tokens."""

    demonstrations: float
    demonstration_prompt: float
    demonstration: float
    labelled: float
    """Prompts whose answers `label` samples."""
    rankings: float
    judged: float
    """Rankings that train the judge."""
    ranked: float
    """Answers of one."""
    answer: float
    """Tokens of one of those."""
    prompt: float
    response: float
    """Tokens of a policy's."""
    document: float
    evaluated: float
    """Prompts there are for eval."""
    said: tuple[str, ...]
    """Where the numbers come from."""


def amounts(recipe: Recipe, shape: Shape) -> Amounts:
    """Of a recipe's data. Reads the beginning of local files, and asks nobody."""
    data = recipe.data
    if data.world:
        world, lengths = data.world, WORLD
        return Amounts(
            demonstrations=world.demonstrations,
            demonstration_prompt=lengths.prompt,
            demonstration=lengths.answer,
            labelled=world.ranked_prompts + world.valid_ranked_prompts,
            rankings=world.ranked_prompts,
            judged=0,
            ranked=recipe.label.responses_per_prompt,
            answer=lengths.answer,
            prompt=lengths.prompt,
            response=lengths.answer,
            document=WORLD_DOCUMENT,
            evaluated=world.eval_prompts,
            said=("the built-in world's rows, as data.world counts them",),
        )
    said: list[str] = []
    tables = {kind: list(_tables(kind, getattr(data, kind), shape, said)) for kind in sources.KINDS}
    demonstrations, rankings = _joined(tables["demonstrations"]), _joined(tables["rankings"])
    prompts = _joined(tables["prompts"]) if tables["prompts"] else rankings
    text = _joined(tables["text"])
    judge = data.judge_ranking_share if recipe.eval.judge == "reward_model" else 0.0
    most, longest = data.max_prompt_tokens, data.max_response_tokens
    return Amounts(
        demonstrations=demonstrations.count * (1 - data.valid_share),
        demonstration_prompt=min(demonstrations.prompt, most),
        demonstration=min(demonstrations.answer, longest),
        labelled=0,
        rankings=rankings.count * (1 - data.valid_ranking_share - judge),
        judged=rankings.count * judge,
        ranked=rankings.ranked,
        answer=min(rankings.answer, longest),
        prompt=min(prompts.prompt, most),
        response=recipe.ppo.response_length,
        document=text.prompt,
        evaluated=max(1.0, prompts.count * data.valid_share),
        said=tuple(dict.fromkeys(said)),
    )


def _tables(kind: str, named: tuple[Source, ...], shape: Shape, said: list[str]) -> Iterator[Rows]:
    """The rows of each source."""
    for number, source in enumerate(named):
        local = _local(kind, f"data.{kind}[{number}]", source, shape)
        found = local or PUBLISHED.get(source.path, ASSUMED)
        how = "by a sample of it" if local else "as published" if source.path in PUBLISHED else "assumed"
        count = min(found.count, source.limit or found.count)
        lengths = f"{found.prompt + found.answer:,.0f} tokens"
        said.append(f"{Path(source.path).name if local else source.path}: {count:,.0f} {kind} of {lengths}, {how}")
        yield Rows(count, found.prompt, found.answer, found.ranked)


def _joined(tables: list[Rows]) -> Rows:
    """Several tables as one."""
    count = sum(rows.count for rows in tables)
    if not count:
        return Rows(0, 0)
    return Rows(
        count,
        *(sum(getattr(rows, name) * rows.count for rows in tables) / count for name in ("prompt", "answer", "ranked")),
    )


def _local(kind: str, key: str, source: Source, shape: Shape) -> Rows | None:
    """What the first rows of a local source say of all of it; None for a Hub id, and for what cannot be read."""
    try:
        files = sources.files(source, key)
        if not files:
            return None
        read, size, found = 0, 0, []
        for row in islice(sources.rows(source, key), SAMPLE):
            read += 1
            size += len(json.dumps(row.values, ensure_ascii=False, default=str))
            with suppress(columns.Invalid):
                found += records.record(row, kind, source, key)
        rows = sum(_rows_of(file, size / read) for file in files) * len(found) / read
    except (UserError, OSError, ArithmeticError):
        return None
    if not found:
        return None
    given = [record.get("responses", [record["response"]] if "response" in record else []) for record in found]
    answers = [len(text) for texts in given for text in texts] or [0]
    characters = 4 if shape.vocabulary >= 16_000 else 3 if shape.vocabulary >= 2_000 else 2  # a token
    prompt = fmean(len(record.get("prompt", record.get("text", ""))) for record in found)
    return Rows(rows, prompt / characters, fmean(answers) / characters, fmean(map(len, given)) or 2.0)


def _rows_of(file: Path, row: float) -> float:
    """Rows of a file, by the characters of a row."""
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        with ParquetFile(file) as table:
            return table.metadata.num_rows
    return _unpacked(file) / row


def _unpacked(file: Path) -> float:
    """Bytes of a file, decompressed; by its beginning."""
    size = file.stat().st_size
    if file.suffix != ".gz":
        return size
    with file.open("rb") as packed, gzip.open(packed) as unpacked:
        read = len(unpacked.read(BEGINNING))
        return size * read / max(packed.tell(), 1) if read == BEGINNING else read
