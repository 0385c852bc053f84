"""Trees of messages, one a row, as rows for each message and the answers to it."""

from collections.abc import Iterator

from instructrl.columns import at, holds, word
from instructrl.config import Tree
from instructrl.errors import UserError
from instructrl.stages.readers import Row


def grouped(rows: Iterator[Row], tree: Tree, key: str) -> Iterator[Row]:
    """A row for each message that has answers: its own columns, and `path` and `replies` (see `config.Tree`).

    The rows of a tree must stand together: one tree at a time is in memory, and of the others their names.

    Raises:
        UserError: a column is missing, two messages of a tree have one name, or a tree goes on after another.
    """
    done: set[str] = set()
    name, group = None, []
    for row in rows:
        for column in (tree.id, tree.parent, tree.group):
            if column not in row.values:
                known = ", ".join(map(repr, row.values))
                raise UserError(f"{key}.tree: {row.where} has no column {column!r}; its columns are {known}")
        this = word(row.values[tree.group])
        if this != name:
            yield from _messages(group, tree, key)
            if name is not None:
                done.add(name)
            if this in done:
                raise UserError(
                    f"{key}.tree: {row.where}: the tree {this!r} goes on here, but another one began since; "
                    f"sort the rows by {tree.group}"
                )
            name, group = this, []
        group.append(row)
    yield from _messages(group, tree, key)


def _messages(group: list[Row], tree: Tree, key: str) -> Iterator[Row]:
    by_name: dict[str, Row] = {}
    answers: dict[str, list[Row]] = {}
    for row in group:
        name = word(at(tree.id, row.values))
        if name in by_name:
            raise UserError(f"{key}.tree: {row.where}: {tree.id} {name!r} is also that of {by_name[name].where}")
        by_name[name] = row
        if holds(tree.where, row.values):
            answers.setdefault(word(at(tree.parent, row.values), ""), []).append(row)
    # From the first messages down, each before what answers it. What answers a message left out is never reached.
    waiting = answers.get("", [])[::-1]
    while waiting:
        row = waiting.pop()
        below = answers.get(word(row.values[tree.id]), [])
        waiting += below[::-1]
        replies = [reply.values for reply in below if holds(tree.replies, reply.values)]
        if len(replies) >= tree.at_least:
            yield Row({**row.values, "path": _path(row, by_name, tree), "replies": replies}, row.where)


def _path(row: Row, by_name: dict[str, Row], tree: Tree) -> list[dict[str, object]]:
    """The messages from the tree's first to this one."""
    path = [row.values]
    while parent := word(path[-1][tree.parent], ""):
        path.append(by_name[parent].values)
    return path[::-1]
