"""`report.md` and the five-model table, from the numbers of `metrics.json`. Nothing is computed here."""

import re
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from instructrl.display import printable
from instructrl.stages import judges, matrix, overoptimisation, ratings, scorecard, tax
from instructrl.stages.claims import FAILS, HOLDS, UNDECIDED
from instructrl.stages.markup import cell, code, fenced, grid
from instructrl.stages.names import BASELINE, BEST, NAMES

if TYPE_CHECKING:
    from instructrl.stages.scores import Scores
    from instructrl.stages.study import Study

PACKAGES = ("instructrl", "torch", "transformers", "trl", "datasets")
LONGEST_SHOWN = 600  # characters of a prompt or answer
WHAT_CHANGES = {
    "sft - gpt": "SFT - GPT",
    "ppo - gpt": "PPO - GPT",
    "ppo - sft": "PPO - SFT",
    "ppo_ptx - ppo": "PPO-ptx - PPO",
    "ppo_ptx - gpt": "PPO-ptx - GPT",
}


def versions() -> dict[str, str]:
    """The versions of what made the numbers."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:  # run from a checkout that is not installed
            found[package] = "not installed"
    return found


def headline(metrics: dict) -> dict:
    """The numbers for the manifest and `show eval`: win rates and verdicts first, intervals after."""
    models = metrics["models"]
    rates = {f"{name}_win_rate": found["win_rate"] for name, found in models.items() if name != BASELINE}
    found = [checked["verdict"] for checked in metrics["claims"]]
    numbers: dict = {name: round(rate[0], 4) for name, rate in reversed(rates.items()) if rate}
    numbers |= {f"claims_{name}": found.count(verdict) for name, verdict in (("hold", HOLDS), ("fail", FAILS))}
    numbers["claims_undecided"] = found.count(UNDECIDED)
    for key in ("win_rate", "kl", "length", "reward", "tasks_average", "text_loss_all"):
        numbers[key] = {name: [round(x, 4) for x in model[key]] for name, model in models.items() if model[key]}
    return numbers


def table(metrics: dict) -> dict:
    """The five-model table: {"columns": [...], "rows": [[...]], "notes": [...]}, all text."""
    models = metrics["models"].values()
    columns = {
        "model": lambda m: m["name"],
        "win rate vs SFT": lambda m: shares(m["win_rate"]),
        "greedy": lambda m: shares(m.get("win_rate_greedy")),
        "KL from SFT": kl,
        "length": lambda m: number(m["length"], 1),
        "reward": lambda m: number(m["reward"], 2),
        "public tasks": lambda m: number(m["tasks_average"], 3),
        "held-out loss": lambda m: number(m["text_loss_all"], 3),
    }
    rows = [[cell(model) for cell in columns.values()] for model in models]
    used = [index for index in range(len(columns)) if any(row[index] != "-" for row in rows)]
    names = list(columns)
    kept = "" if metrics["judge_held_out"] else " No reward model judged."
    notes = [
        f"Judge: {metrics['judge_description']}.{kept} {metrics['prompts']} held-out prompts, temperature "
        f"{metrics['temperature']:g}; brackets are 95 % intervals over prompts.",
    ]
    if metrics["labels"]:
        notes.append(labels_note(metrics))
    notes.append(verdicts(metrics["claims"]))
    return {
        "columns": [names[index] for index in used],
        "rows": [[row[index] for index in used] for row in rows],
        "notes": notes,
    }


def labels_note(metrics: dict) -> str:
    """Whose answers were labelled, on how many prompts, and what was left out."""
    labels, models = metrics["labels"], metrics["models"]
    by_model = ", ".join(f"{models[name]['name']} {count}" for name, count in labels["by_model"].items() if count)
    among = "among the held-out prompts" if labels["evaluated"] else "none of them among the held-out prompts"
    left_out = [
        f"{labels[key]} {what}"
        for key, what in (("other_prompts", "labelled prompts that are not evaluated"), ("invalid", "wrong rows"))
        if labels[key]
    ]
    return (
        "The win rates are those of the labels, of answers that an earlier run sampled, and not of this run's answers: "
        f"prompts labelled against SFT: {labels['prompts']} ({by_model}), {among}."
        + (f" Left out: {', '.join(left_out)}." if left_out else "")
    )


def verdicts(checked: list[dict]) -> str:
    """How many of the paper's claims hold, in a sentence."""
    failed = sum(one["verdict"] != HOLDS for one in checked)
    if not checked:
        return "Too few prompts to check the paper's claims."
    if not failed:
        return f"All {len(checked)} of the paper's claims that were checked hold."
    return f"{failed} of {len(checked)} claims do not hold or are undecided; the report lists them."


def number(interval: Sequence[float] | None, digits: int) -> str:
    """The mean alone."""
    return "-" if interval is None else f"{interval[0]:.{digits}f}"


def kl(model: dict) -> str:
    """The mean, or for best-of-n, whose probabilities are not known, an upper bound: `<= 1.20`"""
    bound = model["kl_bound"]
    return number(model["kl"], 2) if bound is None else f"<= {bound:.2f}"


def shares(interval: Sequence[float] | None) -> str:
    """`.62 [.59, .65]`"""
    if interval is None:
        return "-"
    mean, low, high = (f"{part:.3f}".removeprefix("0") for part in interval)
    return f"{mean} [{low}, {high}]"


def signed(interval: Sequence[float]) -> str:
    """`-.021 [-.040, -.002]`"""
    mean, low, high = (re.sub(r"^([+-])0\.", r"\1.", f"{part:+.3f}") for part in interval)
    return f"{mean} [{low}, {high}]"


# ---- Markdown


def markdown(metrics: dict, shown: list[dict]) -> str:
    """The whole report. `shown`: {prompt, category, answers: {model's name: text}} of a handful of prompts."""
    parts = [
        f"# {cell(metrics['recipe'])}: five models",
        introduction(metrics),
        "## Win rates",
        grid(metrics["table"]["columns"], metrics["table"]["rows"], escaped=True),
        win_rate_notes(metrics),
        *judges.section(metrics),
        *matrix.sections(metrics),
        *ratings.section(metrics),
        *use_case_section(metrics),
        "## The paper's claims on this run",
        claim_table(metrics["claims"]) if metrics["claims"] else verdicts([]),
        "A claim holds if its 95 % interval is on the claimed side of the border, does not hold if it is on the other, "
        "and is undecided in between. No interval is "
        "corrected for the number of claims or of tasks. One run with one seed: another seed may move what is close.",
        *scorecard.section(metrics),
        *gold_section(metrics),
        *tax_section(metrics),
        *tax.section(metrics.get("harness", [])),
        *reward_model_section(metrics),
        *overoptimisation.section(metrics),
        *sample_section(shown),
        "## How this was made",
        making(metrics),
    ]
    return "\n\n".join(parts) + "\n"


def introduction(metrics: dict) -> str:
    return (
        f"Recipe `{code(metrics['recipe'])}`, seed {metrics['seed']}, base model `{code(str(metrics['model']))}`. "
        f"{metrics['prompts']} held-out prompts, none of which trained any model. "
        f"The judge is {cell(metrics['judge_description'])}."
    )


def win_rate_notes(metrics: dict) -> str:
    notes = [
        f"Win rate: share of prompts on which the model's answer is better than SFT's, ties half, at temperature "
        f"{metrics['temperature']:g} and greedily; in brackets the 95 % bootstrap interval over prompts. KL: nats per "
        "answer from SFT. Length: tokens of an answer. Reward: the reward model that PPO trained against, 0 for the "
        "demonstrations' mean.",
        "A gain at temperature 1 that is gone when decoding greedily is sharpening, not better judgement.",
    ]
    notes += policy_notes(metrics)
    if metrics["judge"] == "reward_model":
        notes.append("The judge is a model: it shares the taste, and some of the errors, of the reward model.")
    if metrics["labels"]:
        notes.append(labels_note(metrics))
    prefix = metrics["prefix"]
    if prefix.get("rewards"):
        notes.append(
            f"GPT (prompted) reads the one of {len(prefix['rewards'])} prefixes with the highest mean reward on "
            f"{prefix['prompts']} validation prompts (App. C.5)."
        )
    ended = ", ".join(f"{found['name']} {found['ended'][0]:.2f}" for found in metrics["models"].values())
    return "\n\n".join([*notes, f"Share of answers that ended by themselves: {ended}."])


def use_case_section(metrics: dict) -> list[str]:
    """The win rates by use case, if the prompts have any."""
    found = metrics["use_case_table"]
    if not found:
        return []
    return ["## Win rates by use case", grid(found["columns"], found["rows"]), *found["notes"]]


def policy_notes(metrics: dict) -> list[str]:
    """What must be known of the policies to read the table: their weights, their reference, best-of-n."""
    notes = []
    if metrics["weights"] == "ema":
        notes.append("PPO and PPO-ptx answer with the moving average of their weights (App. C.4).")
    apart = [name for name, init in metrics["references"].items() if init != BASELINE]
    if apart:
        notes.append(
            f"{' and '.join(NAMES[name] for name in apart)} started from, and paid for KL from, `ppo_init` and not SFT "
            "(App. C.3). The KL above is from SFT for all."
        )
    if BEST in metrics["models"]:
        notes.append(
            f"{metrics['models'][BEST]['name']}: of so many answers of SFT's, the one with the highest reward. Nothing "
            "is trained, so what it knows is SFT's. Its KL is at most log n - (n - 1) / n (Beirami et al. 2024)."
        )
    return notes


def claim_table(checked: list[dict]) -> str:
    marks = {HOLDS: "holds", FAILS: "**does not hold**", UNDECIDED: "*undecided*"}
    rows = [[cell(c["claim"]), plain(c["number"]), f"{c['border']:g}", marks[c["verdict"]]] for c in checked]
    return grid(["claim", "number [95 %]", "border", "on this run"], rows, escaped=True)


def plain(interval: Sequence[float]) -> str:
    mean, low, high = interval
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def gold_section(metrics: dict) -> list[str]:
    """What the gold preference is made of, at both temperatures."""
    if not all("gold" in found for found in metrics["models"].values()):
        return []
    parts = ("utility", "correct", "constraint", "hallucination", "toxic")
    rows = []
    for found in metrics["models"].values():
        for decoding, place in ((f"temperature {metrics['temperature']:g}", found), ("greedy", found.get("greedy"))):
            if place:
                rows.append([found["name"], decoding, *(number(place["gold"][part], 3) for part in parts)])
    return [
        "## What the gold preference sees",
        "Mean utility, and the share of answers that are correct, meet the prompt's constraint (where it has one), "
        "make something up, and are rude.",
        grid(["model", "decoding", *parts], rows),
    ]


def tax_section(metrics: dict) -> list[str]:
    """The alignment tax: public tasks and held-out text."""
    sections = []
    for key, title, unit in (
        ("tasks", "public tasks", "accuracy, multiple choice by mean log-probability per token (App. D)"),
        ("text_loss", "held-out text", "loss in nats per token; lower is better"),
    ):
        changes = metrics["tax"][key]
        if not changes:
            continue
        models = [name for name in NAMES if name != "gpt_prompted"]
        names = [name for name in changes if name != "all"]
        rows = [[cell(name), *(number(metrics["models"][model][key][name], 3) for model in models)] for name in names]
        whole = "tasks_average" if key == "tasks" else "text_loss_all"
        label = "average" if key == "tasks" else "all"
        rows.append([f"**{label}**", *(number(metrics["models"][model][whole], 3) for model in models)])
        deltas = [[cell(name), *(signed(found[pair]) for pair in WHAT_CHANGES)] for name, found in changes.items()]
        sections += [
            f"## The alignment tax: {title}",
            f"In {unit}.",
            grid([title, *(NAMES[model] for model in models)], rows, escaped=True),
            "Differences with their 95 % intervals, paired:",
            grid([title, *WHAT_CHANGES.values()], deltas, escaped=True),
        ]
    return sections


def reward_model_section(metrics: dict) -> list[str]:
    """What the reward model stage (and the judge's) measured."""
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
    rows, notes = [], []
    for title, found in (("reward model", metrics["reward_model"]), ("judge", metrics["judge_model"] or [])):
        for row in found:
            names = ("accuracy", "agreement", "held_out_agreement")
            accuracy, agreement, held_out = (shares(row[name]) for name in names)
            baselines = [
                number([row[name]], 2) if row[name] is not None else "-" for name in ("longer_wins", "bag_of_words")
            ]
            rows.append([title, row["on"], accuracy, *baselines, agreement, held_out, str(row["pairs"])])
        for name, what in (
            ("held_out_accuracy", "rankings by held-out labelers"),
            ("gold_accuracy", "the gold preference"),
        ):
            if found and found[0][name] is not None:
                notes.append(f"The {title}'s accuracy on {what} is {found[0][name]:.3f}.")
    if not rows:
        return []
    return [
        "## Reward model",
        "Share of the pairs of held-out rankings that it orders as the labelers did, ties left out; beside it what the "
        "longer answer, and a linear model of words, get right, and how often two labelers agree.",
        grid(columns, rows),
        *([" ".join(notes)] if notes else []),
    ]


def sample_section(shown: list[dict]) -> list[str]:
    if not shown:
        return []
    parts = ["## Side by side", "The first held-out prompts of each kind, as sampled; nothing is picked."]
    for number_, sample in enumerate(shown, 1):
        lines = ["prompt:", *indented(sample["prompt"])]
        for name, text in sample["answers"].items():
            lines += [f"{name}:", *indented(text)]
        title = f"### {number_}" + (f". {cell(sample['category'])}" if sample["category"] else "")
        parts += [title, fenced("\n".join(lines))]
    return parts


def making(metrics: dict) -> str:
    found = ", ".join(f"{package} {number_}" for package, number_ in metrics["versions"].items())
    return (
        f"{found}. The seed is {metrics['seed']}; all models answered with the same random numbers.\n\n"
        "Scale: the paper's models have 1.3 to 175 billion parameters and people judged them. A run of this size shows "
        "whether the method does what the paper says it does; it says nothing about models of that size."
    )


def indented(text: str) -> list[str]:
    cut = text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} ... ({len(text)} characters)"
    return [f"    {line}" for line in printable(cut).split("\n")]


def shown(study: "Study", scores: "Scores") -> list[dict]:
    """A handful of prompts with every model's answer: one of each category in turn, in the order of the prompts."""
    from instructrl.reporting import samples

    settings = study.recipe.eval
    found = samples.side_by_side(scores.rows(), study.names, settings.temperature, settings.samples_shown)
    return samples.for_markdown(found)
