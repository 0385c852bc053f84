"""Charts as SVG for a page: text stays text, and colours are the page's own, so that dark mode works.

matplotlib draws with the light colours of THEME; each then becomes a CSS variable with that colour as its fallback.
Colours of models are those of Okabe and Ito, which colour-blind people tell apart (https://jfly.uni-koeln.de/color/),
lighter on dark paper; each model has a marker of its own, too.
"""

import io
import re
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from instructrl.display import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

THEME = {  # name of the CSS variable -> on light paper, on dark paper
    "ink": ("#1c1f23", "#e6e8ea"),
    "muted": ("#5f666d", "#a3abb3"),
    "rule": ("#e3e5e8", "#33383e"),
    "paper": ("#fefefe", "#15181b"),
    "gpt": ("#6e6e6f", "#b4b8bc"),
    "gpt-prompted": ("#cc79a7", "#e3a3c6"),
    "sft": ("#b87a00", "#f0b43c"),
    "ppo": ("#0072b2", "#5cb3ee"),
    "ppo-ptx": ("#d55e00", "#ff8c42"),
    "best-of-n": ("#008f67", "#3ccfa0"),
}
MARKERS = {"gpt": "s", "gpt-prompted": "D", "sft": "^", "ppo": "o", "ppo-ptx": "P", "best-of-n": "X"}
DASHES = {"gpt": ":", "sft": "-.", "ppo-ptx": (0, (5, 1.5))}  # of lines; others are solid
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same sizes everywhere
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # a $ in the user's text is a dollar
    "svg.fonttype": "none",
    "svg.hashsalt": "instructrl",  # the same numbers give the same bytes
}
NARROW, WIDE = 3.7, 5.0  # inches: a panel of many, and a chart; readable on a phone without scrolling
SVG, XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def ink(name: str) -> str:
    """The colour to draw with, by the CSS variable's name or the model's."""
    return THEME.get(name.replace("_", "-"), THEME["muted"])[0]


def marker(model: str) -> str:
    return MARKERS.get(model.replace("_", "-"), "o")


def dashes(model: str) -> str | tuple:
    return DASHES.get(model.replace("_", "-"), "-")


def label(text: str, longest: int = 30) -> str:
    """A name in a chart: one line, of so many characters at most."""
    shown = " ".join(printable(text).split()) or "(none)"
    return shown if len(shown) <= longest else f"{shown[: longest - 3]}..."


@dataclass
class Chart:
    """A finished chart. `inline` is for a page that defines the colours, `file` is an SVG file by itself."""

    name: str
    caption: str
    inline: str = field(default="", repr=False)
    file: str = field(default="", repr=False)


@contextmanager
def drawing(
    chart: Chart, height: float, width: float = WIDE, margins: dict[str, float] | None = None
) -> Generator[tuple["Figure", "Axes"]]:
    """A figure of so many inches, finished at the end. No window, and no setting of the user's has a say.

    Args:
        margins: as `subplots_adjust` takes them; None: found by a layout engine, in twice the time.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colours = dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), ink("ink"))
    colours |= dict.fromkeys(("xtick.color", "ytick.color"), ink("muted"))
    colours |= {"axes.edgecolor": ink("muted"), "grid.color": ink("rule")}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # the browser has it
        matplotlib.rcdefaults()
        settings: Any = matplotlib.rcParams
        settings.update(STYLE | colours)
        figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
        axes = figure.subplots(gridspec_kw=margins or {})
        axes.tick_params(length=0)
        yield figure, axes
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = themed(written.getvalue(), chart)
    size = {name: root.attrib.pop(name) for name in ("width", "height")}
    chart.inline = ElementTree.tostring(root, encoding="unicode")
    root.attrib.update(size)
    style = ElementTree.Element(f"{{{SVG}}}style")
    style.text = f"svg {{ {variables(0)} }} @media (prefers-color-scheme: dark) {{ svg {{ {variables(1)} }} }}"
    root.insert(0, style)
    chart.file = ElementTree.tostring(root, encoding="unicode")


def variables(dark: int) -> str:
    """The CSS variables of the light theme (0) or the dark one (1)."""
    return " ".join(f"--{name}: {colours[dark]};" for name, colours in THEME.items())


def themed(svg: str, chart: Chart) -> ElementTree.Element:
    """matplotlib's SVG with CSS variables as colours, ids of its own, and a name for those who do not see it."""
    ElementTree.register_namespace("", SVG)
    ElementTree.register_namespace("xlink", XLINK)
    root = ElementTree.fromstring(svg)
    names = {colours[0]: name for name, colours in THEME.items()}
    for element in root.iter():
        for attribute, value in element.attrib.items():
            if attribute == "id":
                value = f"{chart.name}-{value}"
            elif attribute == f"{{{XLINK}}}href" or "url(#" in value:
                value = re.sub(r"^#|url\(#", rf"\g<0>{chart.name}-", value)
            elif attribute in ("style", "fill", "stroke"):
                value = re.sub(r"#[0-9a-f]{6}\b", lambda hit: variable(hit[0], names), value)
                value = value.replace("'DejaVu Sans'", "system-ui, 'DejaVu Sans', sans-serif")
            element.set(attribute, value)
    metadata = root.find(f"{{{SVG}}}metadata")
    if metadata is not None:
        root.remove(metadata)
    root.set("role", "img")
    root.set("aria-label", chart.caption)
    return root


def variable(colour: str, names: dict[str, str]) -> str:
    return f"var(--{names[colour]}, {colour})" if colour in names else colour


def legend(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    """Below the axes, each name once."""
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if once:
        figure.legend(once.values(), once.keys(), loc="outside lower left", ncols=columns, handletextpad=0.5)


def whiskers(
    axes: "Axes", place: float, interval: Sequence[float], model: str, name: str | None = None, hollow: bool = False
) -> None:
    """A mean with its 95 % interval, if it has one, on a horizontal line. [mean, low, high] or [mean]."""
    mean, *ends = interval
    if ends:
        axes.plot(ends, [place, place], color=ink(model), linewidth=1.6, solid_capstyle="butt")
    face = ink("paper") if hollow else ink(model)
    axes.plot(
        [mean], [place], marker(model), color=ink(model), markerfacecolor=face, markersize=6.5, label=name, linestyle=""
    )
