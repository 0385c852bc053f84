"""From the rows read to the rows kept: every removal in a `card.json`, and whether the counts add up."""

import re
from dataclasses import dataclass, field
from typing import Any

KINDS = ("demonstrations", "rankings", "prompts", "text")
"""What a source is read as."""


@dataclass(frozen=True)
class Change:
    """Rows that one step removed (below 0) or added (above), by kind."""

    says: str
    """`share a long prefix with a kept prompt`"""
    key: str
    """The recipe's key that asks for it, or ""."""
    setting: Any
    """That key's value, or None."""
    rows: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Flow:
    """read + the sum of all changes = kept, for each of KINDS."""

    read: dict[str, int]
    changes: list[Change]
    kept: dict[str, int]


def flow(card: dict) -> Flow | None:
    """What became of all rows; None where the card tells of none, as that of the built-in world.

    A source has "read", "kept", "dropped" {reason: rows}, and perhaps "added" {reason: rows}: rows that one row read
    became, beyond the first. A step has "removed" {kind: rows} and perhaps "added" {kind: rows}.

    Raises:
        ValueError: a source's counts, or those of all sources and steps, do not add up.
    """
    if "read" not in card or "kept" not in card:
        return None
    found: dict[str, dict[str, int]] = {}
    for key, reading in card.get("sources", {}).items():
        signed = {why: -rows for why, rows in reading.get("dropped", {}).items()} | reading.get("added", {})
        if "read" in reading:
            _check(key, reading["read"], signed.values(), reading["kept"])
        kind = (re.match(r"data\.(\w+)\[", key) or ["", ""])[1]
        if kind in KINDS:
            for why, rows in signed.items():
                of = found.setdefault(why, {})
                of[kind] = of.get(kind, 0) + rows
    changes = [Change(why, "", None, rows) for why, rows in found.items()]
    for step in card.get("steps", ()):
        rows = {kind: step.get("added", {}).get(kind, 0) - step.get("removed", {}).get(kind, 0) for kind in KINDS}
        changes.append(Change(step["says"], step.get("key", ""), step.get("setting"), rows))
    read, kept = ({kind: card[of].get(kind, 0) for kind in KINDS} for of in ("read", "kept"))
    for kind in KINDS:
        _check(kind, read[kind], [change.rows.get(kind, 0) for change in changes], kept[kind])
        written = sum(rows for table, rows in card["rows"].items() if table.partition(".")[0] == kind)
        if written != kept[kind]:
            raise ValueError(f"{kind}: {kept[kind]} rows are kept, but the tables hold {written}")
    return Flow(read, changes, kept)


def _check(of: str, read: int, changes: Any, kept: int) -> None:
    if read + sum(changes) != kept:
        raise ValueError(f"{of}: the counts do not add up: {read} rows read, {kept} kept, {-sum(changes)} removed")
