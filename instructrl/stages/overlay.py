"""The figure of a sweep: the target's numbers over what was swept, mean and 95 % interval over seeds.

Runs in a process of its own (`worker --overlay`): nothing else need import matplotlib.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from instructrl.artifacts import MANIFEST, read_json, write_atomically
from instructrl.display import is_number
from instructrl.stages.plots import PAPER, STYLE, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SEED = "seed"
MODEL = "model"
PANELS = {  # of eval: name in its metrics -> title, and the models whose values say something there
    "win_rate": ("win rate vs SFT", ("sft", "ppo", "ppo_ptx")),
    "reward": ("reward", ("sft", "ppo", "ppo_ptx")),
    "kl": ("KL from SFT, nats", ("ppo", "ppo_ptx")),
    "tasks_average": ("public tasks", ("gpt", "sft", "ppo", "ppo_ptx")),
    "text_loss_all": ("held-out loss", ("gpt", "sft", "ppo", "ppo_ptx")),
    "length": ("length, tokens", ("sft", "ppo", "ppo_ptx")),
}
MODELS = {
    "gpt": ("GPT", PAPER),
    "sft": ("SFT", "#000000"),
    "ppo": ("PPO", "#D55E00"),
    "ppo_ptx": ("PPO-ptx", "#0072B2"),
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, as in `plots`
MOST_PANELS = 9
STUDENT = (  # 97.5 % quantiles of Student's t, for 1, 2, ... degrees of freedom
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
Interval = tuple[float, float, float]  # mean, low, high


@dataclass(frozen=True)
class Place:
    """One value of the key on the x axis, for one line."""

    x: Any
    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]  # each seed's own value, in the seeds' order


@dataclass(frozen=True)
class Line:
    """One model's numbers, or one choice of the other swept keys, along the x axis."""

    name: str
    colour: str
    style: str
    places: tuple[Place, ...]

    @property
    def flat(self) -> bool:
        """Whether what was swept says nothing of it: each seed's value is the same all along, but for rounding."""
        first = self.places[0].seeds
        same = (len(place.seeds) == len(first) and all(map(close, place.seeds, first)) for place in self.places)
        return len(self.places) > 1 and all(same)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Write `sweep.png`, `sweep.svg` and their numbers, `sweep.json`, into the order's folder.

    Args:
        order: name (of the recipe), target, folder, points: [{values: {key: value}, folder: of the target's artifact}].
    """
    folder, points = Path(order["folder"]), order["points"]
    x, others = axes_of(points)
    panels = panels_of(order["target"], points, x, others)
    seeds = len({point["values"].get(SEED, 0) for point in points})
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        title: {line.name: [vars(place) for place in line.places] for line in lines} for title, lines in panels.items()
    }
    told = {"recipe": order["name"], "target": order["target"], "x": x, "points": points, "panels": numbers}
    write_atomically(folder / "sweep.json", json.dumps(told, indent=2) + "\n")
    draw(folder, f"{order['name']}: {x}", x, panels, seeds)
    return {"panels": list(panels)}


def close(one: float, other: float) -> bool:
    """Whether two numbers are equal but for the rounding of differently padded batches."""
    return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)


def axes_of(points: Sequence[dict]) -> tuple[str, list[str]]:
    """The key on the x axis, which is the numeric one with most values, or the first; and the others but for the seed.
    Where only seeds were swept the models stand there."""
    keys = [key for key in points[0]["values"] if key != SEED]
    if not keys:
        return MODEL, []
    many = {key: len({repr(point["values"][key]) for point in points}) for key in keys}
    numeric = [key for key in keys if all(is_number(point["values"][key]) for point in points)]
    x = max(numeric, key=many.__getitem__) if numeric else keys[0]
    return x, [key for key in keys if key != x]


def panels_of(target: str, points: Sequence[dict], x: str, others: Sequence[str]) -> dict[str, list[Line]]:
    """Each panel's lines."""
    if target == "eval":
        found = [read_json(Path(point["folder"]) / "metrics.json").get("models", {}) for point in points]
        panels = {}
        for name, (title, models) in PANELS.items():
            values = {
                model: [one.get(model, {}).get(name) for one in found]
                for model in models
                if all(one.get(model, {}).get(name) for one in found)
            }
            if values:
                panels[title] = list(lines(points, values, x, others, MODELS))
        return panels
    metrics = [read_json(Path(point["folder"]) / MANIFEST).get("metrics", {}) for point in points]
    panels = {}
    for name in metrics[0]:
        given = [interval(one, name) for one in metrics]
        if name.endswith(("_low", "_high")) or not all(given):
            continue
        drawn = list(lines(points, {target: given}, x, others, {}))
        if x == MODEL or not alike(drawn):
            panels[name.replace("_", " ")] = drawn
    return dict(list(panels.items())[:MOST_PANELS])


def alike(drawn: Sequence[Line]) -> bool:
    """Whether all lines are one flat line: nothing that was swept changes the number."""
    joined = Line("", "", "", tuple(place for line in drawn for place in line.places))
    return joined.flat


def interval(metrics: dict[str, Any], name: str) -> Interval | None:
    """A number with the interval that stands beside it, if one does; None if it is no number."""
    value = metrics.get(name)
    if not is_number(value):
        return None
    low, high = (metrics.get(f"{name}_{end}") for end in ("low", "high"))
    return (value, low, high) if is_number(low) and is_number(high) else (value, value, value)


def lines(
    points: Sequence[dict],
    values: dict[str, list[Interval]],
    x: str,
    others: Sequence[str],
    known: dict[str, tuple[str, str]],
) -> Iterator[Line]:
    """A line for each series and each choice of the other keys.

    Args:
        values: series -> its number in each point.
        known: series -> what it is called, and its colour.
    """
    if x == MODEL:
        told = [place(known.get(name, (name, ""))[0], list(given)) for name, given in values.items()]
        yield Line("", COLOURS[0], "", tuple(told))
        return
    choices = list(dict.fromkeys(tuple(point["values"][key] for key in others) for point in points))
    for series, given in values.items():
        name, colour = known.get(series, ("", ""))
        for number, choice in enumerate(choices):
            told = ", ".join(f"{key.rpartition('.')[2]}={shown(one)}" for key, one in zip(others, choice, strict=True))
            at: dict[Any, list[Interval]] = {}
            for point, one in zip(points, given, strict=True):
                if tuple(point["values"][key] for key in others) == choice:
                    at.setdefault(point["values"][x], []).append(one)
            line = Line(
                ", ".join(part for part in (name, told) if part) or series,
                colour or COLOURS[number % len(COLOURS)],
                ("-", "--", ":", "-.")[number % 4] if colour else "-",
                tuple(place(one, found) for one, found in sorted_places(at)),
            )
            yield line


def sorted_places(at: dict[Any, list[Interval]]) -> list[tuple[Any, list[Interval]]]:
    """Numbers in their order, anything else as it was swept."""
    return sorted(at.items()) if all(map(is_number, at)) else list(at.items())


def place(x: Any, found: Sequence[Interval]) -> Place:
    """Of three seeds and more their mean and its 95 % interval by Student's t. Of two the interval would be 9 times as
    long as they are apart: here it is from one to the other. Of one it is its own, over prompts."""
    means = [one[0] for one in found]
    if len(means) == 1:
        return Place(x, *found[0], (means[0],))
    if len(means) == 2:
        return Place(x, fmean(means), min(means), max(means), tuple(means))
    freedom = len(means) - 1
    student = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96
    half = student * stdev(means) / math.sqrt(len(means))
    mean = fmean(means)
    return Place(x, mean, mean - half, mean + half, tuple(means))


def shown(value: Any) -> str:
    """A value at a tick or in the legend."""
    return f"{value:g}" if is_number(value) else label(str(value), 24)


def draw(folder: Path, title: str, x: str, panels: dict[str, list[Line]], seeds: int) -> None:
    """The panels, three a row, as PNG and SVG. The same numbers give the same bytes."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": "instructrl", "savefig.dpi": 100})
        figure = Figure(figsize=(3.3 * columns + 0.4, 2.6 * rows + 1.0), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (name, drawn) in zip(grid.flat, panels.items(), strict=False):
            panel(axes, name, x, drawn, seeds)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        handles: dict[str, Any] = {}
        for axes in grid.flat:
            handles |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
        if handles:
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False)
        bars = "95 % interval" if seeds > 2 else "range"
        over = f"mean and {bars} over {seeds} seeds (dots)" if seeds > 1 else "95 % intervals, where known"
        figure.suptitle(f"{title}; {over}", fontsize=11, x=0.01, ha="left")
        figure.savefig(folder / "sweep.png", format="png", metadata={"Software": None})
        figure.savefig(folder / "sweep.svg", format="svg", metadata={"Date": None})


def panel(axes: "Axes", name: str, x: str, drawn: Sequence[Line], seeds: int) -> None:
    """One number of all lines."""
    where = positions([place.x for line in drawn for place in line.places])
    for number, line in enumerate(drawn):
        at = [where[place.x] for place in line.places]
        means = [place.mean for place in line.places]
        if line.flat and x != MODEL:
            axes.axhline(means[0], color=line.colour, linestyle=(0, (5, 3)), linewidth=1.2, label=line.name, zorder=1)
            continue
        low = [place.mean - place.low for place in line.places]
        high = [place.high - place.mean for place in line.places]
        style = {"color": line.colour, "linestyle": line.style or "none", "marker": "o", "markersize": 4}
        axes.errorbar(at, means, [low, high], capsize=3, linewidth=1.6, label=line.name, zorder=3 + number, **style)
        if seeds > 1:
            dots = [(a, seed) for a, place in zip(at, line.places, strict=True) for seed in place.seeds]
            axes.scatter(*zip(*dots, strict=True), s=14, color=line.colour, alpha=0.45, linewidths=0, zorder=2)
    every = sorted(where.items(), key=lambda one: one[1])
    step = -(-len(every) // 9)
    axes.set_xticks([at for _, at in every[::step]], [shown(value) for value, _ in every[::step]])
    axes.set_title(name)
    axes.set_xlabel("" if x == MODEL else x)
    axes.margins(x=0.08)
    axes.grid(axis="y")
    axes.tick_params(length=0)


def positions(values: Sequence[Any]) -> dict[Any, float]:
    """Where each value stands: numbers by their size, or by their logarithm if the largest is ten times the smallest or
    more (0 a step before that), anything else side by side."""
    known = list(dict.fromkeys(values))
    if not all(map(is_number, known)):
        return {value: float(number) for number, value in enumerate(known)}
    above = sorted(value for value in known if value > 0)
    if min(known) < 0 or len(above) < 2 or above[-1] < 10 * above[0]:
        return {value: float(value) for value in known}
    step = max(0.3, math.log10(above[-1] / above[0]) / (len(above) - 1))
    return {value: math.log10(value) if value else math.log10(above[0]) - step for value in known}
