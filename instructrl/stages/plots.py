"""The data card's plots, as PNG. The same numbers give the same bytes (with the same version of matplotlib).

Colours are those of Okabe and Ito, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/); what the
paper's data looks like is grey and has a shape of its own.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from instructrl.stages.flow import Flow
from instructrl.stages.markup import printable
from instructrl.stages.paper_data import MOST_PROMPTS_A_USER, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLOURS = {"demonstrations": "#0072B2", "rankings": "#D55E00", "prompts": "#009E73", "text": "#CC79A7"}
PAPER = "#6E6E6E"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#B0B0B0",
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "text.parse_math": False,  # a $ in the user's text is a dollar
    "savefig.dpi": 150,
}
WIDTH = 8.0  # inches
LONGEST = 32  # characters of a label


@contextmanager
def figure(path: Path, rows: float, columns: int = 1) -> Iterator[tuple["Figure", Sequence["Axes"]]]:
    """A figure for so many rows of bars, saved at the end. No window, and no setting of the user's has a say."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # shown as a box
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        made = Figure(figsize=(WIDTH, 1.3 + 0.28 * max(rows, 4)), layout="constrained")
        axes = made.subplots(1, columns, sharey=True, squeeze=False)[0]
        yield made, axes
        made.savefig(path, format="png", metadata={"Software": None})


def label(text: str, longest: int = LONGEST) -> str:
    """A name in a plot: one line, of so many characters at most."""
    shown = " ".join(printable(text).split()) or "(unknown)"
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


def use_cases(path: Path, shares: Mapping[str, Mapping[str, float]], paper: Mapping[str, float]) -> None:
    """Bars of per cent by use case, one a set; the paper's as diamonds. All sets' mappings have the same keys."""
    names = list(next(iter(shares.values())))
    height = 0.8 / len(shares)
    with figure(path, len(names) * (0.6 + 0.4 * len(shares))) as (made, (axes,)):
        place = np.arange(len(names))
        for number, (kind, found) in enumerate(shares.items()):
            offset = (number - (len(shares) - 1) / 2) * height
            axes.barh(place + offset, [found[name] for name in names], height, color=COLOURS[kind], label=kind)
        said = [(at, paper[name]) for at, name in enumerate(names) if name in paper]
        if said:
            at, share = zip(*said, strict=True)
            axes.scatter(share, at, marker="D", s=34, color=PAPER, edgecolor="white", zorder=3, label="paper, RM set")
        axes.set_yticks(place, [label(name) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("% of the prompts whose use case is known")
        axes.set_title("Use cases")
        _finish(made, axes)


def lengths(path: Path, rows: Sequence[tuple[str, str, Summary, Summary | None]], unit: str) -> None:
    """The middle half, median and mean of prompt lengths.

    Args:
        rows: (table, kind, ours, the paper's or None).
        unit: what a length counts.
    """
    with figure(path, 2 * len(rows)) as (_, (axes,)):
        for place, (_, kind, ours, paper) in enumerate(rows):
            _box(axes, place - 0.14, ours, COLOURS[kind])
            if paper:
                _box(axes, place + 0.2, paper, PAPER)
        axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xscale("log")
        axes.set_xlim(left=0.8 * max(0.8, min(of.quarter for row in rows for of in row[2:] if of)))
        _numbered(axes.xaxis)
        paper_unit = "" if unit == "tokens" else ", the paper's in tokens"
        axes.set_xlabel(f"{unit} a prompt{paper_unit}: bar 25 % to 75 %, line median, diamond mean")
        axes.set_title("Prompt lengths; grey: the paper's")
        axes.grid(axis="x")
        axes.tick_params(length=0)


def _box(axes: "Axes", place: float, of: Summary, colour: str) -> None:
    low, high = max(of.quarter, 0.8), max(of.three_quarters, 0.8)
    axes.barh(place, high - low, left=low, height=0.26, color=colour, alpha=0.45)
    axes.plot([max(of.median, 0.8)] * 2, [place - 0.13, place + 0.13], color=colour, linewidth=2.5)
    axes.scatter(max(of.mean, 0.8), place, marker="D", s=26, color=colour, edgecolor="white", zorder=3)


def users(path: Path, counts: Mapping[str, NDArray[np.int64]]) -> None:
    """For each table, the share of users with at least so many prompts."""
    styles = {"train": "-", "valid": "--"}
    with figure(path, 9) as (made, (axes,)):
        for name, found in counts.items():
            kind, _, part = name.partition(".")
            prompts, often = np.unique(found, return_counts=True)
            share = 100 * often[::-1].cumsum()[::-1] / often.sum()
            x, y = np.append(prompts, prompts[-1]), np.append(share, 100 / often.sum() / 2)
            axes.step(x, y, where="pre", color=COLOURS[kind], linestyle=styles.get(part, ":"), label=name, linewidth=2)
        axes.axvline(MOST_PROMPTS_A_USER, color=PAPER, linewidth=1, label=f"the paper's cap, {MOST_PROMPTS_A_USER}")
        axes.set_xscale("log")
        axes.set_yscale("log")
        _numbered(axes.xaxis)
        _numbered(axes.yaxis)
        axes.set_xlabel("prompts a user")
        axes.set_ylabel("% of users with at least so many")
        axes.set_title("Prompts a user")
        _finish(made, axes, both=True)


def removed(path: Path, found: Flow) -> None:
    """A panel a kind: rows read, removed by each step, and kept."""
    kinds = [kind for kind, rows in found.read.items() if rows]
    names = ["read", *(change.says for change in found.changes), "kept"]
    with figure(path, len(names), len(kinds)) as (_, panels):
        for axes, kind in zip(panels, kinds, strict=True):
            rows = [found.read[kind], *(change.rows.get(kind, 0) for change in found.changes), found.kept[kind]]
            ends = [PAPER, *[COLOURS[kind]] * len(found.changes), PAPER]
            axes.barh(range(len(rows)), [abs(count) for count in rows], color=ends, height=0.7)
            most = max(1, *map(abs, rows))
            for place, count in enumerate(rows):
                sign = "" if place in (0, len(rows) - 1) else "+" if count > 0 else ""
                axes.text(abs(count) + most * 0.02, place, f"{sign}{count:,}", va="center", fontsize=8)
            axes.set_xlim(0, most * 1.35)
            axes.set_xticks([])
            axes.spines["bottom"].set_visible(False)
            axes.set_title(kind)
            axes.tick_params(length=0)
        panels[0].set_yticks(range(len(names)), ["\n".join(wrap(label(name, 60), LONGEST)) for name in names])
        panels[0].invert_yaxis()


def languages(path: Path, rows: Mapping[str, int]) -> None:
    """Bars of prompts by language, on a logarithmic axis: English is most."""
    total = sum(rows.values())
    with figure(path, len(rows)) as (_, (axes,)):
        axes.barh(range(len(rows)), list(rows.values()), color=COLOURS["demonstrations"], height=0.7)
        for place, count in enumerate(rows.values()):
            axes.text(count * 1.1, place, f"{100 * count / total:.1f} %", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [label(name) for name in rows])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(0.7, max(rows.values()) * 3)
        _numbered(axes.xaxis)
        axes.set_xlabel("prompts whose language is known")
        axes.set_title("Languages")
        axes.tick_params(axis="y", length=0)


def _numbered(axis: "Axis") -> None:
    """Plain numbers on a logarithmic axis, at 1, 2 and 5. Of less than a decade matplotlib would number the ticks
    between, too, as mathematics, which is not parsed here."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:,.12g}")
    axis.set_minor_formatter(NullFormatter())


def _finish(made: "Figure", axes: "Axes", both: bool = False) -> None:
    axes.grid(axis="both" if both else "x")
    axes.tick_params(axis="both" if both else "y", length=0)
    made.legend(loc="outside lower center", ncols=4, frameon=False)
