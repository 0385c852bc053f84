"""The numbers of `metrics.json`, with 95 % intervals where they are means over prompts, questions or documents."""

import json
from collections import Counter
from collections.abc import Callable

import numpy as np

from instructrl.stages import claims, judging, matrix, preferences, ratings, report, scorecard, trajectory, use_cases
from instructrl.stages.judges import Labelled, Side
from instructrl.stages.judging import BASELINE, BEST, NAMES
from instructrl.stages.length_control import length_controlled
from instructrl.stages.names import GREEDY
from instructrl.stages.scores import Scores
from instructrl.stages.study import Study
from instructrl.stages.tables import read_table
from instructrl.stages.winrate import (
    Interval,
    average_of_means,
    decided,
    interval,
    ratio,
    ratio_difference,
    share,
    share_difference,
)
from instructrl.trainers.selection import kl_bound

FEWEST = 10
"""Prompts, or documents of a kind, below which no interval is worth printing and no claim is decided."""


def measure(study: Study, scores: Scores) -> dict:
    """Everything that `metrics.json` holds."""
    recipe, t = study.recipe, study.recipe.eval.temperature
    samples = recipe.eval.bootstrap_samples

    def mean(values) -> list[float]:
        return list(interval(values, samples))

    def shared(values) -> list[float]:
        return list(share(values, samples))

    evaluated = [row["prompt"] for row in study.prompts]
    labels = judging.read_labels(recipe, evaluated) if recipe.eval.judge == "labels" else None
    labelled = labels.outcomes if labels else {}
    models = {}
    for name, title in study.names.items():
        given = study.answers[name][t]
        found = {
            "name": title,
            "win_rate": None,
            "length": mean([answer.length for answer in given]),
            "ended": shared([answer.ended for answer in given]),
            "reward": mean(scores.rewards[name, t]),
            "kl": mean(scores.kl[name, t]) if (name, t) in scores.kl else None,
            "kl_bound": kl_bound(recipe.eval.best_of_n) if name == BEST else None,
        }
        if name == BASELINE and (scores.outcomes or labelled):
            found["win_rate"] = [0.5] * 3  # against itself: known, not measured
            found |= {"win_rate_greedy": [0.5] * 3} if (name, GREEDY) in scores.outcomes else {}
        elif (name, t) in scores.outcomes:
            [verdicts] = decided(scores.outcomes[name, t])
            found["win_rate"] = shared(verdicts) if len(verdicts) else None
            found["verdicts"] = len(verdicts)
            found["win_rate_length_controlled"] = at_equal_length(study, scores, name, samples)
            if (name, GREEDY) in scores.outcomes:
                found["win_rate_greedy"] = shared(scores.outcomes[name, GREEDY])
        elif labelled.get(name):
            found["win_rate"] = shared(list(labelled[name].values()))
        if GREEDY in study.answers[name]:
            found["greedy"] = {"length": mean([answer.length for answer in study.answers[name][GREEDY]])}
        for temperature, place in ((t, found), (GREEDY, found.get("greedy"))):
            if place is not None and (name, temperature) in scores.gold:
                place["gold"] = gold_breakdown(scores.gold[name, temperature], mean, shared)
        models[name] = found | knowledge(study, name, samples)
    metrics = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "model": recipe.model.path or "made by pretrain",
        "judge": recipe.eval.judge,
        "judge_description": judging.describe(recipe),
        "judge_held_out": recipe.eval.judge != "labels",
        "labels": labels.card() if labels else None,
        "prompts": len(study.prompts),
        "temperature": t,
        "weights": recipe.eval.weights,
        "references": {name: getattr(recipe, name).init for name in ("ppo", "ppo_ptx")},
        "prefix": study.prefix,
        "models": models,
        "tax": tax_changes(study, samples),
        "reward_model": reward_model_quality(study, "reward_model", "train"),
        "judge_model": reward_model_quality(study, "judge", "judge") if "judge" in study.inputs else None,
        "versions": report.versions(),
    }
    metrics["matrix"] = matrix.pairs(list(study.names), by_labels(labels) if labels else scores.compared, samples)
    if labels:
        metrics |= ratings.measured(labels.rated, samples)
    if scores.judge_card:
        metrics["judge_card"] = scores.judge_card
    metrics["claims"] = check_claims(study, scores, labelled, metrics)
    metrics["table"] = report.table(metrics)
    won = labelled if labels else {name: scores.outcomes[name, t] for name in study.names}
    metrics["use_cases"] = use_cases.by_use_case(study.prompts, won, samples, FEWEST)
    metrics["use_case_table"] = use_cases.table(metrics["use_cases"], study.names, FEWEST)
    metrics["overoptimisation"] = trajectory.measure(study, scores)
    metrics["scorecard"] = scorecard.scorecard(metrics)
    return metrics


def by_labels(labels: judging.Labels) -> matrix.Compared:
    """The outcomes of one model against another on the prompts that have labels of both."""
    judge, prompts = Labelled(labels.pairs), sorted({prompt for found in labels.pairs.values() for prompt in found})

    def compared(one: str, other: str) -> np.ndarray:
        return decided(judge.compare(prompts, Side(one, 0.0, ()), Side(other, 0.0, ())))[0]

    return compared


def gold_breakdown(judged: list[dict], mean: Callable, shared: Callable) -> dict:
    """Mean utility and the shares of answers that are correct, meet their constraint, make something up, are rude."""
    found = {}
    for name in ("utility", "correct", "constraint", "hallucination", "toxic"):
        values = [float(one[name]) for one in judged if one[name] is not None]
        found[name] = (mean if name == "utility" else shared)(values) if values else None
    return found


def at_equal_length(study: Study, scores: Scores, name: str, samples: int) -> list[float] | None:
    """The length-controlled win rate against SFT; None with too few prompts for a regression."""
    t = study.recipe.eval.temperature
    lengths = [[answer.length for answer in study.answers[model][t]] for model in (name, BASELINE)]
    outcomes, ours, theirs = decided(scores.outcomes[name, t], *lengths)
    return list(length_controlled(outcomes, ours, theirs, samples)) if len(outcomes) >= FEWEST else None


def knowledge(study: Study, name: str, samples: int) -> dict:
    """Accuracy on each public task and loss per token on held-out text, of each kind and of all."""
    knows = study.knows[name]
    tasks = {task: list(share(right, samples)) for task, right in knows["tasks"].items()}
    losses = {}
    for kind in measured_kinds(study):
        losses[kind] = list(ratio(*text_terms(study, name, kind), samples))
    return {
        "tasks": tasks,
        "tasks_average": list(average_of_means(list(knows["tasks"].values()), samples)) if tasks else None,
        "text_loss": losses,
        "text_loss_all": list(ratio(*text_terms(study, name), samples)) if study.text else None,
    }


def measured_kinds(study: Study) -> list[str]:
    """The kinds of held-out text with documents enough for an interval; the others only count in `all`."""
    counts = Counter(row["kind"] for row in study.text)
    return sorted(kind for kind, count in counts.items() if count >= FEWEST)


def text_terms(study: Study, name: str, kind: str | None = None) -> tuple[list[float], list[int]]:
    """(losses, tokens) of the held-out documents of a kind, or of all."""
    both = zip(study.text, study.knows[name]["text"], strict=True)
    chosen = [measured for row, measured in both if kind is None or row["kind"] == kind]
    return [loss for loss, _ in chosen], [tokens for _, tokens in chosen]


def tax_changes(study: Study, samples: int) -> dict:
    """For each public task and kind of text: PPO - GPT, PPO - SFT, PPO-ptx - PPO and so on, paired by question.

    Accuracies in shares, losses in nats per token; for losses more is worse. `questions`: how many each task has.
    """
    pairs = {"sft - gpt": ("sft", "gpt"), "ppo - gpt": ("ppo", "gpt"), "ppo - sft": ("ppo", "sft")}
    pairs |= {"ppo_ptx - ppo": ("ppo_ptx", "ppo"), "ppo_ptx - gpt": ("ppo_ptx", "gpt")}
    tasks, text = {}, {}
    for task in study.knows["gpt"]["tasks"]:
        right = {name: study.knows[name]["tasks"][task] for name in NAMES}
        tasks[task] = {key: list(share_difference(right[a], right[b], samples)) for key, (a, b) in pairs.items()}
    for kind in measured_kinds(study):
        terms = {name: text_terms(study, name, kind) for name in NAMES}
        text[kind] = {key: list(ratio_difference([terms[a], terms[b]], samples)) for key, (a, b) in pairs.items()}
    if study.text:
        terms = {name: text_terms(study, name) for name in NAMES}
        text["all"] = {key: list(ratio_difference([terms[a], terms[b]], samples)) for key, (a, b) in pairs.items()}
    questions = {task: len(right) for task, right in study.knows["gpt"]["tasks"].items()}
    return {"tasks": tasks, "text_loss": text, "questions": questions}


def check_claims(study: Study, scores: Scores, labelled: dict, metrics: dict) -> list[dict]:
    """The paper's claims on this run. With a handful of prompts an interval says nothing, so nothing is checked."""
    if len(study.prompts) < FEWEST:
        return []
    t, samples = study.recipe.eval.temperature, study.recipe.eval.bootstrap_samples
    rates = {name: Interval(*found["win_rate"]) for name, found in metrics["models"].items() if found["win_rate"]}
    if metrics["labels"]:
        rates = {name: rate for name, rate in rates.items() if len(labelled[name]) >= FEWEST}
    if scores.outcomes:
        gap, *_ = decided(scores.outcomes["gpt_prompted", t] - scores.outcomes["gpt", t])
        prompted = share(gap, samples, -1.0, 1.0) if len(gap) >= FEWEST else None
    else:
        prompted = paired_labels(labelled, samples)
    checked = claims.order(rates, prompted)
    checked += reward_model_claims(metrics["reward_model"])
    for key, what, sign in (
        ("tasks", "PPO loses on a public task and PPO-ptx wins part of it back", 1.0),
        ("text_loss", "PPO loses on held-out text and PPO-ptx wins part of it back (loss, sign turned)", -1.0),
    ):
        changes = [
            (name, *(turned(found[pair], sign) for pair in ("ppo - gpt", "ppo - sft", "ppo_ptx - ppo")))
            for name, found in metrics["tax"][key].items()
        ]
        if changes:
            checked.append(claims.tax(what, changes))
    return checked


def paired_labels(labelled: dict[str, dict[str, float]], samples: int) -> Interval | None:
    """GPT (prompted) - GPT on the prompts that have labels of both; None where they are too few."""
    one, other = labelled.get("gpt_prompted", {}), labelled.get("gpt", {})
    shared = sorted(one.keys() & other.keys())
    if len(shared) < FEWEST:
        return None
    return share_difference([one[key] for key in shared], [other[key] for key in shared], samples)


def turned(values: list[float], sign: float) -> Interval:
    """An interval, or with sign -1 its mirror image."""
    mean, low, high = values
    return Interval(mean, low, high) if sign > 0 else Interval(-mean, -high, -low)


# ---- the reward model, as its stage measured it


def reward_model_quality(study: Study, stage: str, table: str) -> list[dict]:
    """Accuracy on held-out rankings, over all and by source, beside what people, length and words reach on the same.

    A row is {on, accuracy, longer_wins, bag_of_words, agreement, held_out_agreement, pairs, prompts}; empty where the
    stage left no manifest (it was called by hand).
    """
    manifest = study.inputs[stage] / "manifest.json"
    if not manifest.exists():
        return []
    found = json.loads(manifest.read_text())["metrics"]
    folder = study.inputs.get("label", study.inputs["data"])
    held_out = read_table(folder / "rankings.valid.parquet")
    trained = read_table(folder / f"rankings.{table}.parquet")
    sources = list(found.get("by_source", {}))
    rows = [quality_row("all", found, trained, held_out)]
    if len(sources) > 1:
        for source in sources:
            same = [[row for row in table_ if row["source"] == source] for table_ in (trained, held_out)]
            rows.append(quality_row(source, found["by_source"][source], *same))
    return rows


def quality_row(on: str, found: dict, trained: list[dict], held_out: list[dict]) -> dict:
    """One row of `reward_model_quality`. Agreement only where all rankings have several annotators."""
    everyone = all(len(row["annotators"]) > 1 for row in held_out)
    strangers = everyone and all(row["held_out"] for row in held_out)
    words = found.get("bag_of_words", as_list(preferences.bag_of_words(trained, held_out)))
    return {
        "on": on,
        "accuracy": [found[name] for name in ("accuracy", "accuracy_low", "accuracy_high")],
        "longer_wins": found["longer_wins"],
        "bag_of_words": words[0] if isinstance(words, list) else words,
        "agreement": as_list(preferences.agreement(held_out)) if everyone else None,
        "held_out_agreement": as_list(preferences.held_out_agreement(held_out)) if strangers else None,
        "held_out_accuracy": found.get("held_out_accuracy"),
        "gold_accuracy": found.get("gold_accuracy"),
        "pairs": found["pairs"],
        "prompts": found["prompts"],
    }


def as_list(found: Interval | None) -> list[float] | None:
    return list(found) if found else None


def reward_model_claims(quality: list[dict]) -> list[dict]:
    """On all rankings; the agreement of labelers on the first row that has one."""
    if not quality:
        return []
    accuracy = Interval(*quality[0]["accuracy"])
    measured = next((row for row in quality if row["agreement"]), None)
    if not measured:
        return claims.reward_model(accuracy, None, None)
    return claims.reward_model(accuracy, Interval(*measured["accuracy"]), Interval(*measured["agreement"]))
