"""Reading rows from local files, folders and the Hub, without a cache and without unpickling anything.

Every row comes with where it stands (file and line), so that an error can point at it. This module imports neither
torch nor datasets before it needs them: `check` runs while a recipe is planned.
"""

import csv
import gzip
import json
import os
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import IO

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError

ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
KINDS = ("demonstrations", "rankings", "prompts", "text")


@dataclass(frozen=True)
class Row:
    """One raw row: the source's own columns, and where it stands, for error messages."""

    values: dict[str, object]
    where: str


def ending(path: Path) -> str:
    """`.jsonl` for both `a.jsonl` and `a.jsonl.gz`; "" for an ending we do not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ENDINGS else ""


def is_local(path: str) -> bool:
    """Whether the path means this disk: it exists, starts as paths do, or ends as our files do. Else it is a Hub id."""
    return path.startswith((".", "/", "~")) or bool(ending(Path(path))) or Path(path).exists()


def files(source: Source, key: str) -> list[Path]:
    """The files of a local source, sorted; empty for a Hub id. `key` is the source's place in the recipe."""
    if not is_local(source.path):
        return []
    path = Path(source.path).expanduser()
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and ending(file) and file.name[0] != ".")
        if not found:
            raise UserError(
                f"{key}.path: the folder {source.path} holds no {_listed(ENDINGS)} file (each may end in .gz)"
            )
    elif path.is_file():
        if not ending(path):
            raise UserError(f"{key}.path: {source.path} is no {_listed(ENDINGS)} file (each may end in .gz)")
        found = [path]
    else:
        raise UserError(f"{key}.path: there is no file or folder {source.path}{_beside(path)}")
    for file in found:
        if file.stat().st_size == 0:
            raise UserError(f"{key}.path: {file} is empty")
    return found


def named_sources(data: Data) -> Iterator[tuple[str, str, Source]]:
    """(kind, the source's place in the recipe, the source) of everything `data` reads."""
    for kind in KINDS:
        for number, source in enumerate(getattr(data, kind)):
            yield kind, f"data.{kind}[{number}]", source


def check(recipe: Recipe) -> None:
    """Find missing files, empty files and missing columns before anything runs: reads one row of each local source."""
    from instructrl.stages import records

    if not recipe.data.world:
        _check_kinds(recipe)
    for kind, key, source in named_sources(recipe.data):
        for row in islice(rows(source, key), 1) if files(source, key) else ():
            records.check_columns(row, kind, source, key)
    if recipe.eval.labels and files(recipe.eval.labels, "eval.labels"):
        for row in islice(rows(recipe.eval.labels, "eval.labels"), 1):
            records.check_columns(row, "labels", recipe.eval.labels, "eval.labels")


def _check_kinds(recipe: Recipe) -> None:
    for kind, use in (("demonstrations", "sft"), ("rankings", "reward_model")):
        if not getattr(recipe.data, kind):
            raise UserError(
                f"data.{kind} is empty, and {use} learns from it: name a file or a Hub id, "
                f"`data.{kind}: [{{path: ...}}]`"
            )
    if not recipe.data.valid_share and recipe.data.prompts:
        raise UserError("data.valid_share is 0, so no prompt is left for eval: set it to 0.1")
    if not recipe.data.valid_ranking_share:
        raise UserError(
            "data.valid_ranking_share is 0, so no ranking is left to measure the reward model: set it to 0.2"
        )
    if recipe.eval.judge == "reward_model" and not recipe.data.judge_ranking_share:
        raise UserError(
            "data.judge_ranking_share is 0, but eval.judge=reward_model learns from that share: set it to 0.3"
        )


def rows(source: Source, key: str) -> Iterator[Row]:
    """All rows of a source in their order. Raises UserError for what cannot be read; `limit` is the caller's."""
    local = files(source, key)
    if not local:
        yield from _hub_rows(source, key)
    for file in local:
        empty = True
        with _readable(file, key):
            for row in _READERS[ending(file)](file):
                empty = False
                yield row
        if empty:
            raise UserError(f"{key}.path: {file} is empty")


@contextmanager
def _readable(file: Path, key: str) -> Iterator[None]:
    """Turn what a broken file raises into one sentence."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {file} is not UTF-8 text (byte {error.start}: {error.reason})") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{key}: {file} is no complete gzip file ({error})") from None
    except OSError as error:
        raise UserError(f"{key}: cannot read {file} ({error.strerror or error})") from None


def _open(file: Path) -> IO[str]:
    # utf-8-sig: spreadsheets write a byte-order mark, which would become part of the first column's name.
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    return opener(file, "rt", encoding="utf-8-sig", newline="")


def _jsonl(file: Path) -> Iterator[Row]:
    with _open(file) as stream:
        for number, line in enumerate(stream, 1):
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
            if not isinstance(values, dict):
                raise UserError(
                    f'{file} line {number} is {_kind(values)}, but must be an object like {{"prompt": ...}}'
                )
            yield Row(values, f"{file} line {number}")


def _json(file: Path) -> Iterator[Row]:
    with _open(file) as stream:
        try:
            listed = json.load(stream)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{file} is no JSON ({error}); if it has one object a line, name it .jsonl") from None
    if not isinstance(listed, list):
        raise UserError(f"{file} is {_kind(listed)}, but must be an array of objects: [{{...}}, {{...}}]")
    for number, values in enumerate(listed, 1):
        if not isinstance(values, dict):
            raise UserError(f"{file} row {number} is {_kind(values)}, but must be an object")
        yield Row(values, f"{file} row {number}")


def _csv(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize if sys.maxsize < 2**31 else 2**31 - 1)  # the default stops at 128 kB a cell
    with _open(file) as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for values in reader:
                where = f"{file} line {reader.line_num}"
                if None in values or None in values.values():
                    raise UserError(f"{where} does not have as many cells as the header has columns")
                yield Row(values, where)
        except csv.Error as error:
            raise UserError(f"{file} line {reader.line_num} is no CSV ({error})") from None


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        raw = BytesIO(gzip.decompress(file.read_bytes())) if file.suffix.lower() == ".gz" else file
        number = 0
        for batch in pyarrow.parquet.ParquetFile(raw).iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Row(values, f"{file} row {number}")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{file} is no Parquet file ({error})") from None


def _txt(file: Path) -> Iterator[Row]:
    """Paragraphs: what stands between blank lines."""
    with _open(file) as stream:
        lines: list[str] = []
        first = 1
        for number, line in enumerate(stream, 1):
            if line.strip():
                first = first if lines else number
                lines.append(line.rstrip("\r\n"))
            elif lines:
                yield Row({"text": "\n".join(lines)}, f"{file} line {first}")
                lines = []
        if lines:
            yield Row({"text": "\n".join(lines)}, f"{file} line {first}")


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _txt}


def _hub_rows(source: Source, key: str) -> Iterator[Row]:
    """Rows of a Hub data set. Data only: a repository that needs its own code is refused (datasets >= 4)."""
    what = f"the Hub data set {source.path!r}"
    on_this_disk = "download it where there is a network and set path to the local file or folder"
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        on_this_disk += ", or set runtime.offline=false"
    import datasets

    try:
        table = datasets.load_dataset(source.path, source.name, split=source.split, revision=source.revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{key}.path: {source.path!r} is neither a file or folder here nor a data set on the Hub "
            f"({_first_line(error)}); to use local data, {on_this_disk}"
        ) from None
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"{key}.path: {what} cannot be loaded, there is no network or the Hub does not answer "
            f"({_first_line(error)}); {on_this_disk}"
        ) from None
    except (ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        # An unknown name, split or revision, or a data set that is a script: the library's own sentence says which.
        raise UserError(f"{key}: {what} cannot be loaded: {_first_line(error)}") from None
    for number, values in enumerate(table, 1):
        yield Row(values, f"{source.path} row {number}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _kind(value: object) -> str:
    names = {list: "an array", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _listed(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _beside(path: Path) -> str:
    """`; did you mean ...?`, from the names beside a path that is not there."""
    from difflib import get_close_matches

    parent = path.parent
    if not parent.is_dir():
        return f" (nor a folder {parent})"
    near = get_close_matches(path.name, [other.name for other in parent.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {parent / near[0]}?" if near else ""
