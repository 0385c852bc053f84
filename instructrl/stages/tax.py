"""The alignment tax on the public tasks of `eval.tasks`: what each model gained or lost against the base model.

A verdict goes by the 95 % interval of the difference over the same questions (paired bootstrap). Nothing is corrected
for the number of tasks.
"""

from collections.abc import Sequence

import numpy as np

from instructrl.stages.markup import cell, grid
from instructrl.stages.names import NAMES

BASE = "gpt"
TAXED, RECOVERED, UNCHANGED, IMPROVED = "taxed", "recovered", "unchanged", "improved"


def measured(found: Sequence[dict[str, dict]]) -> list[dict]:
    """The `harness` of `metrics.json`: a row a task, prompt and metric.

    {task, metric, higher_is_better, shots, prompt, n, cut, models: {model: [mean, low, high]}, deltas: {model: ...}
    against the base model, recovery: PPO-ptx - PPO, verdict: {model: ...}}.

    Args:
        found: rows of `harness.run` by model, from `Harness.read`.
    """
    rows = []
    for of in found:
        row = {key: of[BASE][key] for key in ("task", "metric", "higher_is_better", "shots", "prompt", "n")}
        row["cut"] = {name: one["cut"] for name, one in of.items()}
        row["models"] = {name: interval(one["value"], one["draws"]) for name, one in of.items()}
        row["deltas"] = {name: difference(one, of[BASE]) for name, one in of.items() if name != BASE}
        row["recovery"] = difference(of["ppo_ptx"], of["ppo"])
        row["verdict"] = verdicts(row)
        rows.append(row)
    return rows


def interval(value: float, draws: Sequence[float]) -> list[float]:
    """[value, low, high]"""
    low, high = np.percentile(draws, [2.5, 97.5])
    return [value, float(low), float(high)]


def difference(one: dict, other: dict) -> list[float]:
    """One less the other on the same questions."""
    return interval(one["value"] - other["value"], np.subtract(one["draws"], other["draws"]))


def verdicts(row: dict) -> dict[str, str]:
    """By model: taxed, if it is clearly worse than the base model; improved, if it is clearly better; else unchanged.

    PPO-ptx has recovered what PPO lost if PPO is taxed, PPO-ptx is not, and PPO-ptx is clearly better than PPO.
    """
    sign = 1 if row["higher_is_better"] else -1
    found = {name: verdict(delta, sign) for name, delta in row["deltas"].items()}
    regained = verdict(row["recovery"], sign) == IMPROVED
    if found["ppo"] == TAXED and found["ppo_ptx"] == UNCHANGED and regained:
        found["ppo_ptx"] = RECOVERED
    return found


def verdict(delta: Sequence[float], sign: int) -> str:
    _, low, high = sorted_by_sign(delta, sign)
    return IMPROVED if low > 0 else TAXED if high < 0 else UNCHANGED


def sorted_by_sign(delta: Sequence[float], sign: int) -> tuple[float, float, float]:
    """The interval so that more is better."""
    mean, low, high = delta
    return (mean, low, high) if sign > 0 else (-mean, -high, -low)


# ---- Markdown


def section(rows: Sequence[dict]) -> list[str]:
    """The part of the report that shows them; nothing without tasks."""
    if not rows:
        return []
    models = [name for name in NAMES if name in rows[0]["models"]]
    titles = ("task", "n", "metric")
    values = [[*labels(row), *(shown(row, row["models"][name]) for name in models)] for row in rows]
    changes = [
        [*labels(row), *(changed(row, name) for name in models if name != BASE), signed(row, row["recovery"])]
        for row in rows
    ]
    cut = sum(max(row["cut"].values()) > 0 for row in rows)
    return [
        "## The alignment tax: lm-evaluation-harness",
        "Each model on the same questions, behind the same prompts (App. D), without a template; in brackets 95 % "
        "bootstrap intervals over questions. GPT (prompted) reads them behind its prefix. An arrow says where better "
        "is: entropy in bits, BLEU from 0 to 100, all else from 0 to 1.",
        grid([*titles, *(NAMES[name] for name in models)], values, escaped=True),
        "Differences from GPT, paired. Taxed: the whole interval is on the worse side. Recovered: PPO is taxed, "
        "PPO-ptx is not, and is clearly better than PPO. Nothing is corrected for the number of tasks.",
        grid([*titles, *(NAMES[name] for name in models if name != BASE), "PPO-ptx - PPO"], changes, escaped=True),
        *(
            [f"On {cut} of these rows some questions were longer than a model reads, and lost their beginning."]
            if cut
            else []
        ),
    ]


def labels(row: dict) -> list[str]:
    details = [row["prompt"] or "", f"{row['shots']}-shot" if row["shots"] else ""]
    told = ", ".join(filter(None, details))
    arrow = "↑" if row["higher_is_better"] else "↓"
    return [cell(row["task"] + (f" ({told})" if told else "")), str(row["n"]), cell(f"{row['metric']} {arrow}")]


def shown(row: dict, values: Sequence[float]) -> str:
    mean, low, high = (f"{value:.{digits(row)}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def signed(row: dict, values: Sequence[float]) -> str:
    mean, low, high = (f"{value:+.{digits(row)}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def changed(row: dict, name: str) -> str:
    verdict = row["verdict"][name]
    marked = verdict if verdict == UNCHANGED else f"**{verdict}**"
    return f"{signed(row, row['deltas'][name])} {marked}"


def digits(row: dict) -> int:
    """Of what goes up to 100 fewer."""
    return 1 if max(abs(values[0]) for values in row["models"].values()) > 2 else 3
