"""Two runs side by side: what differs in their recipes, and what came out, with intervals."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instructrl.artifacts import write_atomically
from instructrl.errors import UserError
from instructrl.plan import ABSENT, brief, is_content
from instructrl.reporting import charts, page, panels
from instructrl.reporting.runs import Run
from instructrl.reporting.sections import Section
from instructrl.reporting.tables import Table
from instructrl.stages.names import BASELINE
from instructrl.stages.report import shares, signed

QUANTITIES = {  # key of a model in metrics.json -> title, digits after the point (None: a share)
    "win_rate": ("win rate against SFT", None),
    "win_rate_greedy": ("win rate, greedy", None),
    "win_rate_length_controlled": ("win rate, length-controlled", None),
    "kl": ("KL from SFT", 2),
    "length": ("length", 1),
    "reward": ("reward", 2),
    "tasks_average": ("public tasks", None),
    "text_loss_all": ("held-out loss", 3),
}
INKS = ("ppo", "ppo-ptx")  # colours of the two
NOTES = [
    "Brackets are 95 % intervals. That of a difference takes the runs to be independent (the method of variance "
    "estimates recovery, Zou and Donner 2008); where both answered the same prompts it is too wide. One seed each: "
    "another seed moves numbers, too.",
    "A win rate is against the run's own SFT: where the two differ, so do the opponents. Rewards of two reward models "
    "have no common unit.",
]


def check(run: Run) -> None:
    """Refuse a run without an evaluation.

    Raises:
        UserError: with the command that makes it.
    """
    part = run.evaluation
    if part.artifact is None:
        again = f" Make it with: {part.command}" if part.command else ""
        error = UserError(f"eval is not made for {run.name} ({part.why or 'never ran'}).{again}")
        error.exit_code = 1
        raise error


def differences(one: Run, other: Run) -> list[list[str]]:
    """[key, its value, the other's] for each key in which the recipes differ, files by their content."""
    found: list[list[str]] = []
    walk(one.settings(), other.settings(), "", found)
    return found


def walk(before: Any, after: Any, key: str, found: list[list[str]]) -> None:
    """Collect the leaves in which two values differ."""
    if before == after:
        return
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in dict.fromkeys([*before, *after]):
            walk(before.get(name, ABSENT), after.get(name, ABSENT), f"{key}.{name}" if key else str(name), found)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (left, right) in enumerate(zip(before, after, strict=True)):
            walk(left, right, f"{key}[{number}]", found)
    elif is_content(before) and is_content(after):
        found.append([key, *(f"content {str(value).removeprefix('sha256:')[:8]}" for value in (before, after))])
    else:
        found.append([key, *("(not read)" if value is ABSENT else brief(value) for value in (before, after))])


def measured(one: Run, other: Run) -> list[list[str]]:
    """[quantity, model, its number, the other's, the difference] wherever both or one measured it."""
    models = [run.metrics.get("models", {}) for run in (one, other)]
    titles = {name: model["name"] for there in models for name, model in there.items()}
    rows = []
    for key, (title, digits) in QUANTITIES.items():
        for model, name in titles.items():
            values = [there.get(model, {}).get(key) for there in models]
            trivial = model == BASELINE and key.startswith(("win_rate", "kl"))
            if any(values) and not trivial:
                rows.append([title, name, *(written(value, digits) for value in values), gap(values, digits)])
    return rows


def written(value: Sequence[float] | None, digits: int | None) -> str:
    """A mean with its interval."""
    if not value:
        return "-"
    if digits is None and len(value) == 3 and min(value) >= 0 and max(value) <= 1:
        return shares(value)
    mean, *ends = (f"{part:.{digits or 3}f}" for part in value)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def gap(values: Sequence[Sequence[float] | None], digits: int | None) -> str:
    """The second minus the first, if both were measured."""
    first, second = values
    if not (first and second and len(first) == len(second) == 3):
        return "-"
    found = difference(first, second)
    if digits is None:
        return signed(found)
    mean, low, high = (f"{part:+.{digits}f}" for part in found)
    return f"{mean} [{low}, {high}]"


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Second minus first with a 95 % interval, from the intervals of two independent means (Zou and Donner 2008).

    [mean, low, high] each.
    """
    (m1, l1, h1), (m2, l2, h2) = first, second
    mean = m2 - m1
    return mean, mean - math.hypot(m2 - l2, h1 - m1), mean + math.hypot(h2 - m2, m1 - l1)


def names(one: Run, other: Run) -> tuple[str, str]:
    """What the two are called: by their recipes, or by one or two values that differ, or by their fingerprints."""
    if one.name != other.name:
        return one.name, other.name
    changed = differences(one, other)
    if len(changed) not in (1, 2):
        return one.title, other.title
    left, right = (" ".join(f"{row[0]}={row[side]}" for row in changed) for side in (1, 2))
    return left, right


def tables(one: Run, other: Run) -> list[Table]:
    """What differs, and what came out.

    Raises:
        UserError: one of them has no evaluation.
    """
    check(one)
    check(other)
    called = names(one, other)
    changed = differences(one, other)
    said = [] if changed else ["The recipes are the same, but for `runtime`."]
    columns = ["", "model", *called, "difference"]
    return [Table(["key", *called], changed, said, words=3), Table(columns, measured(one, other), NOTES, words=2)]


def write(one: Run, other: Run) -> Path:
    """Write compare.html and return its path."""
    called = names(one, other)
    changed, came_out = tables(one, other)
    pair = [(name, ink, run) for name, ink, run in zip(called, INKS, (one, other), strict=True)]
    chart = charts.two_runs([(name, ink, run.metrics) for name, ink, run in pair])
    found = [
        Section("recipes", "What differs in the recipes", tables=[changed]),
        Section("results", "What came out", charts=[chart] if chart else [], tables=[came_out]),
        Section("training", "Training", charts=panels.of_two(pair), small=True),
    ]
    folder = one.root / "reports" / f"compare-{one.evaluation.fingerprint}-{other.evaluation.fingerprint}"
    folder.mkdir(parents=True, exist_ok=True)
    prints = [run.evaluation.fingerprint for run in (one, other)]
    said = [f"`{called[0]}` beside `{called[1]}`. Fingerprints of eval: {prints[0]} and {prints[1]}."]
    values = {"title": f"{called[0]} and {called[1]}", "introduction": said, "sections": found}
    write_atomically(folder / "compare.html", page.render("compare.html", values))
    return folder / "compare.html"
