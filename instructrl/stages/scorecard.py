"""Paper versus you: each of the paper's claims beside this run, with a verdict, and several runs side by side."""

from collections.abc import Iterable, Mapping, Sequence

from instructrl.stages.markup import cell, grid
from instructrl.stages.paper_claims import CLAIMS, DIRECTION, NOT, NOT_MEASURED, REPRODUCED

VERDICTS = (REPRODUCED, DIRECTION, NOT, NOT_MEASURED)


def scorecard(metrics: dict) -> list[dict]:
    """[{claim, text, paper: {number, where, low, high}, border, yours: {number, n, note}, verdict, scale}].

    `paper.low` and `.high`: between which numbers the paper's lies; null where it prints none.
    """
    return [claim.row(metrics) for claim in CLAIMS]


# ---- Markdown

MARKS = {REPRODUCED: REPRODUCED, DIRECTION: DIRECTION, NOT: "**not**", NOT_MEASURED: "*not measured*"}


def section(metrics: dict) -> list[str]:
    """The report's section."""
    rows = metrics.get("scorecard")
    if not rows:
        return []
    cells = [
        [
            row["claim"],
            *map(cell, (said(row), row["paper"]["number"], row["paper"]["where"])),
            *(yours(row), str(row["yours"]["n"] or "-"), MARKS[row["verdict"]]),
        ]
        for row in rows
    ]
    return [
        "## Paper versus you",
        f"{tally(rows)}. Reproduced: your whole 95 % interval is on the claimed side and meets the paper's number; "
        "direction only: it is on that side; not: anything else, also an interval that decides nothing. What is read "
        "off a figure is taken to be right to 10 %.",
        grid(["", "claim", "paper", "where", "yours [95 %]", "n", "verdict"], cells, escaped=True),
        *(f"{', '.join(names)}: {cell(text)}" for text, names in scales(rows).items()),
    ]


def said(row: Mapping) -> str:
    """The claim, and what of the run it is about."""
    return row["text"] + (f" ({row['yours']['note']})" if row["yours"]["note"] else "")


def yours(row: Mapping) -> str:
    number = row["yours"]["number"]
    return "-" if number is None else "{:.3f} [{:.3f}, {:.3f}]".format(*number)


def tally(rows: Iterable[Mapping]) -> str:
    """`5 reproduced, 2 direction only, 3 not, 16 not measured`"""
    found = [row["verdict"] for row in rows]
    return ", ".join(f"{found.count(name)} {name}" for name in VERDICTS)


def scales(rows: Iterable[Mapping]) -> dict[str, list[str]]:
    """Each sentence on scale with the claims that it is about."""
    found: dict[str, list[str]] = {}
    for row in rows:
        names = found.setdefault(row["scale"], [])
        if row["claim"] not in names:
            names.append(row["claim"])
    return found


def across(runs: Mapping[str, Sequence[Mapping]]) -> str:
    """A table of several scorecards side by side, {title: scorecard}: for each claim every run's number and verdict."""
    first = next(iter(runs.values()))
    cells = []
    for number, row in enumerate(first):
        found = [rows[number] for rows in runs.values()]
        shown = [
            f"{yours(one)} {MARKS[one['verdict']]}" if one["yours"]["n"] else MARKS[one["verdict"]] for one in found
        ]
        cells.append([row["claim"], cell(row["text"]), cell(row["paper"]["number"]), *shown])
    return grid(["", "claim", "paper", *runs], cells, escaped=True)
