"""The tables of the page, from `metrics.json`: all text. One whose numbers were not measured is None."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from instructrl.reporting.charts import as_interval, task_name
from instructrl.stages import ratings as labelled
from instructrl.stages import scorecard as scores
from instructrl.stages import tax as taxes
from instructrl.stages.claims import FAILS, HOLDS
from instructrl.stages.names import NAMES
from instructrl.stages.report import WHAT_CHANGES, number, shares, signed

Metrics = Mapping[str, Any]
COLOURS = {  # a verdict -> the class of its cell
    HOLDS: "good",
    FAILS: "bad",
    "reproduced": "good",
    "recovered": "good",
    "improved": "good",
    "not": "bad",
    "taxed": "bad",
}


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Args:
        words: so many columns, from the left, are words and not numbers; `others` are numbers of more such columns.
        shades: (row, column) -> a win rate, for the colour of the cell.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    title: str = ""
    words: int = 1
    shades: Mapping[tuple[int, int], float] = field(default_factory=dict)
    others: Sequence[int] = ()

    def is_words(self, column: int) -> bool:
        """Whether a column, from 0, is words and not numbers."""
        return column < self.words or column in self.others

    def colour(self, text: str) -> str:
        """The CSS class of a cell that is, or ends with, a verdict."""
        return COLOURS.get(text) or COLOURS.get(text.rpartition("] ")[2], "")


def made(found: Mapping[str, Any] | None, title: str = "", words: int = 1) -> Table | None:
    """A table that metrics.json holds as text already: {columns, rows, notes}."""
    if not found or not found.get("rows"):
        return None
    rows = [[str(cell) for cell in row] for row in found["rows"]]
    return Table(found["columns"], rows, found.get("notes", ()), title, words)


def claims(metrics: Metrics) -> Table | None:
    """The paper's claims on this run."""
    checked = metrics.get("claims")
    if not checked:
        return None
    rows = [[c["claim"], bracketed(c["number"]), f"{c['border']:g}", c["verdict"]] for c in checked]
    note = (
        "A claim holds if its 95 % interval is on the claimed side of the border. Nothing is corrected for many claims."
    )
    return Table(["claim", "number [95 %]", "border", "on this run"], rows, [note], "Claims on this run", others=(3,))


def scorecard(metrics: Metrics) -> Table | None:
    """The paper's claims and numbers beside this run's; what is to be said of scale is below."""
    found = metrics.get("scorecard")
    if not found:
        return None
    rows = []
    for one in found:
        about = f" ({one['yours']['note']})" if one["yours"].get("note") else ""
        paper, yours = one["paper"], one["yours"]
        numbers = [text(paper["number"]), text(paper["where"]), bracketed(yours["number"]), text(yours["n"])]
        rows.append([one["claim"], one["text"] + about, *numbers, one["verdict"]])
    notes = [f"{scores.tally(found)}."]
    notes += [f"{', '.join(names)}: {said}" for said, names in scores.scales(found).items()]
    columns = ["claim", "what the paper says", "its number", "where", "yours [95 %]", "n", "verdict"]
    return Table(columns, rows, notes, "Paper versus this run", words=2, others=(2, 3, 6))


def matrix(metrics: Metrics) -> Table | None:
    """Each model's win rate against each other one."""
    found = metrics.get("matrix")
    if not found:
        return None
    names = {name: metrics["models"].get(name, {}).get("name", name) for name in found}
    rows, shades = [], {}
    for row, name in enumerate(names):
        cells = [as_interval(found[name].get(other)) for other in names]
        rows.append([names[name], *(shares(one) for one in cells)])
        shades |= {(row, column): one[0] for column, one in enumerate(cells, 1) if one}
    notes = ["Win rate of the row's model against the column's, ties half; brackets are 95 % intervals over prompts."]
    return Table(["", *names.values()], rows, notes, "Any against any", shades=shades)


def length_controlled(metrics: Metrics) -> Table | None:
    """The win rate beside the one at equal length."""
    models = [found for found in metrics.get("models", {}).values() if found.get("win_rate_length_controlled")]
    if not models:
        return None
    rows = [
        [m["name"], shares(m["win_rate"]), shares(m["win_rate_length_controlled"]), number(m.get("length"), 1)]
        for m in models
    ]
    return Table(["model", "win rate", "length-controlled", "tokens"], rows, title="What length explains")


def judge_card(metrics: Metrics) -> Table | None:
    """The judge's own numbers."""
    card = metrics.get("judge_card")
    if not card:
        return None
    rows = [
        [name.replace("_", " "), text(value)] for name, value in card.items() if name != "notes" and value is not None
    ]
    return Table(["", ""], rows, title="The judge in numbers", words=2)


def ratings(metrics: Metrics) -> Table | None:
    """What labelers say of single answers: overall quality and the paper's metadata, a row a field."""
    likert, metadata = metrics.get(labelled.LIKERT), metrics.get("metadata") or {}
    said = {"overall quality, 1 to 7": likert} if likert else {}
    said |= {labelled.METADATA.get(field, field): found for field, found in metadata.items()}
    if not said:
        return None
    models = [name for name in metrics["models"] if any(name in found for found in said.values())]
    rows = [[what, *(labelled.shown(found.get(name)) for name in models)] for what, found in said.items()]
    columns = ["", *(metrics["models"][name]["name"] for name in models)]
    return Table(columns, rows, ["Means over prompts; all but the quality are shares of answers."], "Ratings (Table 3)")


def tax(metrics: Metrics, key: str, whole: str, title: str) -> list[Table]:
    """What each model knows, and the paired differences."""
    changes = metrics.get("tax", {}).get(key)
    if not changes:
        return []
    models = {name: metrics["models"][name] for name in NAMES if name != "gpt_prompted" and name in metrics["models"]}
    names = [name for name in changes if name != "all"]
    rows = [[name, *(number(model[key].get(name), 3) for model in models.values())] for name in names]
    rows.append(["average" if key == "tasks" else "all", *(number(model[whole], 3) for model in models.values())])
    deltas = [
        [name, *(signed(found[pair]) for pair in WHAT_CHANGES if pair in found)] for name, found in changes.items()
    ]
    pairs = [title for pair, title in WHAT_CHANGES.items() if all(pair in found for found in changes.values())]
    return [
        Table(["", *(model["name"] for model in models.values())], rows, title=title),
        Table(["", *pairs], deltas, ["Paired differences with their 95 % intervals."]),
    ]


def harness(metrics: Metrics) -> list[Table]:
    """Every model on every task, and its change from the base model with the verdict on it."""
    found = metrics.get("harness")
    if not found:
        return []
    names = [name for name in NAMES if any(name in one["models"] for one in found)]
    values, changes = [], []
    for one in found:
        better = "\u2191" if one["higher_is_better"] else "\u2193"
        labels = [task_name(one), text(one.get("n")), better]
        values.append([*labels, *(taxes.shown(one, one["models"][m]) if m in one["models"] else "-" for m in names)])
        changes.append([labels[0], *(changed(one, m) for m in names if m != taxes.BASE)])
        changes[-1] += [taxes.signed(one, one["recovery"]) if one.get("recovery") else "-"]
    notes = [
        "Taxed: the whole interval is on the worse side. Recovered: PPO is taxed, PPO-ptx is not, and clearly better."
    ]
    titles = [NAMES[name] for name in names]
    others = [NAMES[name] for name in names if name != taxes.BASE]
    return [
        Table(["task", "n", "better", *titles], values, title="Public NLP tasks"),
        Table(["task", *others, "PPO-ptx - PPO"], changes, notes, "Change from GPT, paired"),
    ]


def changed(row: Metrics, model: str) -> str:
    """`-0.100 [-0.130, -0.070] taxed`"""
    if not row["deltas"].get(model):
        return "-"
    return f"{taxes.signed(dict(row), row['deltas'][model])} {(row.get('verdict') or {}).get(model, '')}".rstrip()


def overoptimisation(metrics: Metrics) -> list[Table]:
    """Each policy's snapshots, best-of-n, and reward gain among answers of like length."""
    found, tables = metrics.get("overoptimisation") or {}, []
    titles = {name: model["name"] for name, model in metrics.get("models", {}).items()} | {"best_of_n": "Best of n"}
    intervals = {"proxy": "reward", "judge": "judge", "win_rate": "win rate"}
    for policy, points in (found.get("policies") or {}).items():
        best = {who: (found.get(f"best_by_{key}") or {}).get(policy) for key, who in BEST_BY.items()}
        rows = []
        for point in points:
            cells = [text(point.get("step")), text(point.get("episodes")), rounded(point.get("kl"), 2)]
            cells += [*(bracketed(point.get(key)) for key in intervals), rounded(point.get("length"), 1)]
            rows.append(
                [*cells, " and ".join(f"best by {who}" for who, step in best.items() if step == point.get("step"))]
            )
        columns = ["iterations", "episodes", "KL", *intervals.values(), "length", ""]
        tables.append(Table(columns, rows, title=f"{titles.get(policy, policy)} along its run", others=(7,)))
    several = found.get("best_of_n") or []
    if several:
        rows = [
            [text(row["n"]), rounded(row["kl_bound"], 2), *(bracketed(row[key]) for key in BEST_BY)] for row in several
        ]
        tables.append(Table(["n", "KL at most", "reward", "judge"], rows, title="Best of n beside it"))
    buckets = found.get("by_length") or []
    if buckets:
        counted, gained = ([*dict.fromkeys(name for row in buckets for name in row[key])] for key in ("n", "gain"))
        rows = [
            [row["bucket"], *(text(row["n"].get(m)) for m in counted), *(bracketed(row["gain"].get(m)) for m in gained)]
            for row in buckets
        ]
        heads = [f"{titles.get(m, m)}, answers" for m in counted] + [f"{titles.get(m, m)} - SFT" for m in gained]
        tables.append(Table(["length", *heads], rows, title="Reward gained among answers of like length"))
    return tables


BEST_BY = {"proxy": "the reward", "judge": "the judge"}


def rounded(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def gold(metrics: Metrics) -> Table | None:
    """What the gold preference is made of."""
    models = metrics.get("models", {}).values()
    if not models or not all("gold" in found for found in models):
        return None
    parts, rows = ("utility", "correct", "constraint", "hallucination", "toxic"), []
    for found in models:
        for decoding, place in ((f"temperature {metrics['temperature']:g}", found), ("greedy", found.get("greedy"))):
            if place:
                rows.append([found["name"], decoding, *(number(place["gold"][part], 3) for part in parts)])
    return Table(["model", "decoding", *parts], rows, title="What the gold preference sees", words=2)


def reward_model(metrics: Metrics) -> Table | None:
    """How often the reward model, and the judge, order held-out pairs as labelers did."""
    rows = []
    for title, found in (("reward model", metrics.get("reward_model")), ("judge", metrics.get("judge_model"))):
        for row in found or []:
            plain = [
                number([row[name]], 2) if row[name] is not None else "-" for name in ("longer_wins", "bag_of_words")
            ]
            agree = [shares(row[name]) for name in ("agreement", "held_out_agreement")]
            rows.append([title, row["on"], shares(row["accuracy"]), *plain, *agree, str(row["pairs"])])
    if not rows:
        return None
    columns = [
        "",
        "rankings",
        "accuracy",
        "longer wins",
        "bag of words",
        "labelers agree",
        "held-out labelers",
        "pairs",
    ]
    return Table(columns, rows, ["Share of the pairs of held-out rankings, ties left out."], words=2)


def bracketed(value: Any) -> str:
    """`0.621 [0.590, 0.650]`; a mean alone without brackets."""
    found = as_interval(value)
    if found is None:
        return "-"
    mean, low, high = found
    return f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if (low, high) != (mean, mean) else "")


def text(value: Any) -> str:
    """Anything JSON holds, for a person."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return bracketed(value) if as_interval(value) else ", ".join(text(part) for part in value)
    return str(value)


def kept(tables: Iterable[Table | None]) -> list[Table]:
    """Those that there are."""
    return [table for table in tables if table is not None]
