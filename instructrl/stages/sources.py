"""Where a recipe's rows come from: local files, folders and the Hub, without a cache and without unpickling anything.

This module imports neither torch nor datasets before it needs them: `check` runs while a recipe is planned.
"""

from collections.abc import Iterator
from pathlib import Path

from instructrl import tasks
from instructrl.columns import nearest
from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import hub, trees
from instructrl.stages.readers import ENDINGS, Row, ending, read_file

KINDS = ("demonstrations", "rankings", "prompts", "text")
"""The tables that `data` makes."""

LISTS = (*KINDS, "evaluation_sets")
"""Every key of `data` that lists sources."""


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
        if source.files:
            found = [_named(path, name, found, key) for name in source.files]
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
    """(kind, the source's place in the recipe, the source) of every table that `data` makes."""
    for kind in KINDS:
        for number, source in enumerate(getattr(data, kind)):
            yield kind, f"data.{kind}[{number}]", source


def check(recipe: Recipe) -> None:
    """Find missing files, empty files and missing columns before anything runs: reads the start of local sources."""
    from instructrl.stages import records

    tasks.check(recipe)
    if not recipe.data.world:
        _check_kinds(recipe)
        _check_extras(recipe)
    for kind, key, source in named_sources(recipe.data):
        if files(source, key):
            next(records.checked(rows(source, key), kind, source, key), None)
    for number, source in enumerate(recipe.data.evaluation_sets):  # all of a row counts: no column is missing
        key = f"data.evaluation_sets[{number}]"
        if files(source, key):
            next(rows(source, key), None)
    if recipe.eval.labels and files(recipe.eval.labels, "eval.labels"):
        labels = rows(recipe.eval.labels, "eval.labels")
        next(records.checked(labels, "labels", recipe.eval.labels, "eval.labels"), None)


def _check_extras(recipe: Recipe) -> None:
    from instructrl.stages import language, pii

    for wanted, key, off, module in (
        (recipe.data.pii_filter, "data.pii_filter", "false", pii),
        (recipe.data.languages, "data.languages", "[]", language),
    ):
        if wanted:
            try:
                module.check()
            except UserError as error:
                raise UserError(f"{key}: {error}, or set {key}={off}") from None


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
    """All rows of a source in their order, one at a time; of a `tree`, those of `trees.grouped`.

    Nothing is held in memory but a line, a part of a Parquet file, or a tree. `where` and `limit` are the caller's.

    Raises:
        UserError: for what cannot be read, when it is reached.
    """
    found = _raw(source, key)
    return trees.grouped(found, source.tree, key) if source.tree else found


def _raw(source: Source, key: str) -> Iterator[Row]:
    local = files(source, key)
    if not local:
        yield from hub.hub_rows(source, key)
    for file in local:
        yield from read_file(file, key)


def _named(folder: Path, name: str, found: list[Path], key: str) -> Path:
    if folder / name not in found:
        known = [file.relative_to(folder).as_posix() for file in found]
        raise UserError(f"{key}.files: the folder {folder} holds no {name}{nearest(name, known)}")
    return folder / name


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
