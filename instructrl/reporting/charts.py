"""The charts of an evaluation, from `metrics.json`. A chart whose numbers were not measured is None."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from instructrl.reporting.drawing import Chart, drawing, ink, label, legend, marker, whiskers
from instructrl.reporting.logs import is_number
from instructrl.stages.names import NAMES

ROW = 0.34  # inches a row of whiskers
POLICIES = ("ppo", "ppo_ptx")
MOST = 16  # rows of a chart; tables show the rest


def every(metrics: Mapping[str, Any]) -> list[Chart]:
    """All that can be drawn, in the order of the report."""
    drawn = (win_rates, use_cases, tasks, held_out_text, harness, overoptimisation)
    return [chart for draw in drawn if (chart := draw(metrics)) is not None]


def win_rates(metrics: Mapping[str, Any]) -> Chart | None:
    """The paper's Figure 1 for one size of model: win rate against SFT, with its interval."""
    models = {name: found for name, found in metrics.get("models", {}).items() if found.get("win_rate")}
    if not models:
        return None
    chart = Chart("win_rates", f"Win rate against SFT of {len(models)} models, with 95 % intervals")
    with drawing(chart, 0.9 + ROW * 1.15 * len(models)) as (figure, axes):
        axes.axvline(0.5, color=ink("muted"), linewidth=1, linestyle=(0, (4, 3)))
        sampled = f"temperature {metrics.get('temperature', 1):g}"
        for row, (name, found) in enumerate(models.items()):
            greedy = found.get("win_rate_greedy")
            whiskers(axes, row - 0.14 * bool(greedy), found["win_rate"], name)
            if greedy:
                whiskers(axes, row + 0.2, greedy, name, hollow=True)
        if any(found.get("win_rate_greedy") for found in models.values()):
            for title, face in ((sampled, ink("muted")), ("greedy", ink("paper"))):
                axes.plot([], [], "o", color=ink("muted"), markerfacecolor=face, label=title)
            legend(figure, axes)
        rows(axes, [found["name"] for found in models.values()])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("win rate against SFT")
    return chart


def two_runs(runs: Sequence[tuple[str, str, Mapping[str, Any]]]) -> Chart | None:
    """The win rates of two runs' models. A run is (what it is called, its colour, its metrics)."""
    found = {name: model["name"] for _, _, metrics in runs for name, model in metrics.get("models", {}).items()}
    rates = [(name, ink_, metrics.get("models", {})) for name, ink_, metrics in runs]
    there = [name for name in found if any(models.get(name, {}).get("win_rate") for _, _, models in rates)]
    if not there:
        return None
    chart = Chart("two_runs", "Win rates against SFT, with 95 % intervals")
    with drawing(chart, 1.0 + ROW * 1.15 * len(there)) as (figure, axes):
        axes.axvline(0.5, color=ink("muted"), linewidth=1, linestyle=(0, (4, 3)))
        for row, model in enumerate(there):
            for shift, (called, colour, models) in zip((-0.15, 0.15), rates, strict=True):
                rate = models.get(model, {}).get("win_rate")
                if rate:
                    whiskers(axes, row + shift, rate, colour, label(called))
        rows(axes, [found[name] for name in there])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("win rate against the run's own SFT")
        legend(figure, axes, 2)
    return chart


def use_cases(metrics: Mapping[str, Any]) -> Chart | None:
    """PPO's and PPO-ptx's win rates within each use case."""
    cases = {
        case: found for case, found in metrics.get("use_cases", {}).items() if found["win_rate"].keys() & {*POLICIES}
    }
    if not cases:
        return None
    chart = Chart("use_cases", "Win rate against SFT by use case")
    shown = dict(list(cases.items())[:MOST])
    with drawing(chart, 1.0 + ROW * len(shown)) as (figure, axes):
        axes.axvline(0.5, color=ink("muted"), linewidth=1, linestyle=(0, (4, 3)))
        for row, found in enumerate(shown.values()):
            for shift, name in ((-0.15, "ppo"), (0.15, "ppo_ptx")):
                if name in found["win_rate"]:
                    whiskers(axes, row + shift, found["win_rate"][name], name, NAMES[name])
        rows(axes, [f"{label(case, 22)} ({found['prompts']})" for case, found in shown.items()])
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("win rate against SFT")
        legend(figure, axes)
    return chart


def tasks(metrics: Mapping[str, Any]) -> Chart | None:
    """Accuracy on public tasks: the base model, SFT, PPO and PPO-ptx."""
    return knowledge(metrics, "tasks", "Accuracy on public tasks", "accuracy")


def held_out_text(metrics: Mapping[str, Any]) -> Chart | None:
    """Loss on held-out text: the same models."""
    return knowledge(metrics, "text_loss", "Loss on held-out text; lower is better", "nats a token")


def knowledge(metrics: Mapping[str, Any], key: str, caption: str, unit: str) -> Chart | None:
    """What each model knows, a row a task or kind of text. Models that share weights with another are left out."""
    models = {name: metrics.get("models", {}).get(name) for name in ("gpt", "sft", *POLICIES)}
    found = {name: model[key] for name, model in models.items() if model and model.get(key)}
    if not found:
        return None
    names = list(next(iter(found.values())))[:MOST]
    chart = Chart(f"tax_{key}", f"The alignment tax. {caption}")
    with drawing(chart, 1.0 + 0.46 * len(names)) as (figure, axes):
        for row, task in enumerate(names):
            for place, (name, values) in enumerate(found.items()):
                if values.get(task):
                    whiskers(axes, row + 0.18 * (place - (len(found) - 1) / 2), values[task], name, NAMES[name])
        rows(axes, [label(task) for task in names])
        axes.set_xlabel(unit)
        legend(figure, axes, 4)
    return chart


def harness(metrics: Mapping[str, Any]) -> Chart | None:
    """Changes from the base model on the harness's tasks, turned so that the right is better."""
    found = [one for one in metrics.get("harness") or [] if one.get("deltas")][: 2 * MOST]
    if not found:
        return None
    models = [name for name in NAMES if any(name in one["deltas"] for one in found)]
    chart = Chart("harness", "The alignment tax on public NLP tasks: change from the base model; right is better")
    with drawing(chart, 1.0 + 0.42 * len(found)) as (figure, axes):
        axes.axvline(0, color=ink("muted"), linewidth=1, linestyle=(0, (4, 3)))
        for row, one in enumerate(found):
            sign = 1 if one.get("higher_is_better", True) else -1
            for place, name in enumerate(models):
                if one["deltas"].get(name):
                    mean, *ends = (sign * value for value in one["deltas"][name])
                    shift = 0.16 * (place - (len(models) - 1) / 2)
                    whiskers(axes, row + shift, [mean, *sorted(ends)], name, NAMES[name])
        rows(axes, [label(task_name(one)) for one in found])
        axes.set_xlabel("change from GPT, in the task's metric")
        legend(figure, axes, 4)
    return chart


def task_name(one: Mapping[str, Any]) -> str:
    """`rte f1, 15-shot, respectful`"""
    shots = f"{one['shots']}-shot" if one.get("shots") is not None else ""
    return ", ".join(filter(None, [f"{one['task']} {one.get('metric', '')}".strip(), shots, one.get("prompt")]))


def overoptimisation(metrics: Mapping[str, Any]) -> Chart | None:
    """The proxy reward and the judge's verdict over the square root of KL (Gao et al. 2022, Fig. 1)."""
    found = metrics.get("overoptimisation") or {}
    policies = {name: points for name, points in (found.get("policies") or {}).items() if points}
    if not policies:
        return None
    chart = Chart("overoptimisation", "Over-optimisation: proxy reward (dashed) and judge (solid) over the root of KL")
    with drawing(chart, 3.2) as (figure, axes):
        proxy = axes.twinx()
        for name, points in policies.items():
            drawn_over_kl(axes, points, "judge", name, f"{NAMES.get(name, name)}, judge", "-")
            drawn_over_kl(proxy, points, "proxy", name, f"{NAMES.get(name, name)}, proxy", "--")
        best = [{"kl": one["kl_bound"]} | one for one in found.get("best_of_n") or []]
        if best:
            drawn_over_kl(axes, best, "judge", "best_of_n", "best of n, judge", "-")
            drawn_over_kl(proxy, best, "proxy", "best_of_n", "best of n, proxy", "--")
        axes.set_xlabel("sqrt(KL from SFT), nats")
        axes.set_ylabel("judge")
        proxy.set_ylabel("proxy reward")
        proxy.grid(visible=False)
        proxy.tick_params(length=0)
        (lines, names), (others, theirs) = (axis.get_legend_handles_labels() for axis in (axes, proxy))
        figure.legend(lines + others, names + theirs, loc="outside lower left", ncols=2)
    return chart


def drawn_over_kl(axes: Any, points: Sequence[Mapping], key: str, model: str, name: str, style: str) -> None:
    """A line with its band; points without a number are left out."""
    there = [
        (math.sqrt(max(point["kl"], 0.0)), as_interval(point[key]))
        for point in points
        if is_number(point.get("kl")) and as_interval(point.get(key))
    ]
    if not there:
        return
    there.sort()
    places, values = [place for place, _ in there], [value for _, value in there]
    means, lows, highs = zip(*values, strict=True)
    axes.plot(places, means, style, color=ink(model), marker=marker(model), markersize=4.5, label=name)
    if key == "judge":
        axes.fill_between(places, lows, highs, color=ink(model), alpha=0.15, linewidth=0)


def as_interval(value: Any) -> tuple[float, float, float] | None:
    """[mean, low, high], or a mean alone, as three numbers."""
    if is_number(value):
        return (value, value, value)
    if isinstance(value, list | tuple) and value and all(is_number(part) for part in value):
        return (value[0], value[1], value[2]) if len(value) > 2 else (value[0],) * 3
    return None


def rows(axes: Any, names: Sequence[str]) -> None:
    """Names from the top down on the left, and lines that lead to them."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", labelcolor=ink("ink"))
    axes.grid(axis="y", visible=False)
