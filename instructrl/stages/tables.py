"""The tables of the data and label artifacts: Parquet files whose columns and types the stages agree on.

Plain Parquet instead of `datasets.save_to_disk`: one file a table, readable by any tool, and no cache folder.
"""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

BATCH = 2048  # rows that are in memory at a time
_RANKS = pyarrow.list_(pyarrow.int64())

_NOTES = {column: pyarrow.string() for column in ("category", "kind", "user", "language", "source")}
"""Of a prompt, each may be "": its use case (paper, Table 1), its kind (plain, few-shot, ...; App. A.1), who wrote it,
the code of its language, and where it comes from."""

DEMONSTRATIONS = pyarrow.schema(
    {"prompt": pyarrow.string(), "response": pyarrow.string(), **_NOTES, "spec": pyarrow.string()}
)
"""A prompt and how a demonstrator answers it. `spec`: the world's prompt as JSON, "" for the user's own data."""

RANKINGS = pyarrow.schema(
    {
        "prompt": pyarrow.string(),
        "responses": pyarrow.list_(pyarrow.string()),
        "ranks": _RANKS,
        "annotators": pyarrow.list_(_RANKS),
        "held_out": pyarrow.list_(_RANKS),
        "gold": _RANKS,
        "labeler": pyarrow.string(),
        **_NOTES,
    }
)
"""K responses to a prompt and their ranks: 1 is best, equal ranks are ties. The reward model learns from `ranks`.

`annotators`: each annotator's ranks of the same responses; `held_out`: those of labelers who rank nothing for
training; `gold`: the ranks of the world's gold preference. Each may be empty.
"""

PROMPTS = pyarrow.schema({"prompt": pyarrow.string(), **_NOTES, "spec": pyarrow.string()})
"""A prompt to answer. `spec` as in DEMONSTRATIONS."""

TEXT = pyarrow.schema({"text": pyarrow.string(), "kind": pyarrow.string()})
"""A pretraining document and what kind of document it is."""

TASKS = pyarrow.schema(
    {
        "task": pyarrow.string(),
        "context": pyarrow.string(),
        "choices": pyarrow.list_(pyarrow.string()),
        "answer": pyarrow.int64(),
    }
)
"""A multiple-choice question in pretraining form; `answer` is the index of the right choice."""


def write_table(path: Path, rows: Iterable[dict], schema: pyarrow.Schema) -> int:
    """Write the rows as they come; return their number. A column that a row lacks is empty: "" or [], never null."""
    empty = {field.name: "" if field.type == pyarrow.string() else [] for field in schema}
    count, iterator = 0, iter(rows)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while batch := [empty | row for row in islice(iterator, BATCH)]:
            unknown = {column for row in batch for column in row} - set(schema.names)
            if unknown:
                raise ValueError(f"{path.name} has no column {sorted(unknown)}; its columns are {schema.names}")
            writer.write_table(pyarrow.Table.from_pylist(batch, schema=schema))
            count += len(batch)
    return count


def read_table(path: Path) -> list[dict]:
    """The rows of a Parquet file, in their order."""
    return pyarrow.parquet.read_table(path).to_pylist()
