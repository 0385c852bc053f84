"""What a run measured of the paper's claims, from `metrics.json`: a number, its interval and how many it is of.

Each function takes the metrics and returns None where they do not have it.
"""

from collections.abc import Callable, Sequence
from math import sqrt
from typing import NamedTuple

from instructrl.stages.winrate import Interval

Measure = Callable[[dict], "Yours | None"]


class Yours(NamedTuple):
    """What a run measured, from n prompts (or questions, or pairs)."""

    number: Interval
    n: int
    note: str = ""


def apart(one: Sequence[float], other: Sequence[float]) -> Interval:
    """One less other, of two intervals that are not paired: at least as wide as a paired one would be."""
    return Interval(one[0] - other[0], one[1] - other[2], one[2] - other[1])


def win_rate(name: str) -> Measure:
    """Against SFT."""

    def measure(metrics: dict) -> Yours | None:
        found = metrics["models"].get(name, {}).get("win_rate")
        return Yours(Interval(*found), compared(metrics, name)) if found else None

    return measure


def head_to_head(name: str, other: str) -> Measure:
    """From the matrix of win rates."""

    def measure(metrics: dict) -> Yours | None:
        found = metrics.get("matrix", {}).get(name, {}).get(other)
        n = min(compared(metrics, one) for one in (name, other))
        return Yours(Interval(*found), n) if found else None

    return measure


def compared(metrics: dict, name: str) -> int:
    """Prompts on which the model was compared with SFT: those labelled, or those on which a judge decided."""
    if metrics.get("labels"):
        return metrics["labels"]["by_model"].get(name, 0)
    return metrics["models"].get(name, {}).get("verdicts", metrics["prompts"])


def order(metrics: dict) -> Yours | None:
    """The narrowest of the gaps GPT < GPT (prompted) < SFT < PPO and SFT < PPO-ptx."""
    rates = {
        name: metrics["models"].get(name, {}).get("win_rate") for name in ("gpt", "gpt_prompted", "ppo", "ppo_ptx")
    }
    if not all(rates.values()):
        return None
    sft = (0.5, 0.5, 0.5)
    gaps = {
        "GPT to GPT (prompted)": apart(rates["gpt_prompted"], rates["gpt"]),
        "GPT (prompted) to SFT": apart(sft, rates["gpt_prompted"]),
        "SFT to PPO": apart(rates["ppo"], sft),
        "SFT to PPO-ptx": apart(rates["ppo_ptx"], sft),
    }
    narrowest = min(gaps, key=lambda name: gaps[name].low)
    return Yours(gaps[narrowest], min(compared(metrics, name) for name in rates), f"the narrowest step, {narrowest}")


def no_difference(metrics: dict) -> Yours | None:
    """How far PPO-ptx's win rate against PPO may be from a half."""
    found = head_to_head("ppo_ptx", "ppo")(metrics)
    if found is None:
        return None
    mean, low, high = (value - 0.5 for value in found.number)
    nearest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return Yours(Interval(abs(mean), nearest, max(abs(low), abs(high))), found.n)


def hallucinations(metrics: dict) -> Yours | None:
    """How much less often PPO-ptx makes something up than GPT."""
    shares = metrics.get("metadata", {}).get("hallucination") or {
        name: found["gold"]["hallucination"] for name, found in metrics["models"].items() if found.get("gold")
    }
    gpt, ours = shares.get("gpt"), shares.get("ppo_ptx")
    if not gpt or not ours:
        return None
    return Yours(apart(gpt, ours), metrics["prompts"], f"GPT {gpt[0]:.2f}, PPO-ptx {ours[0]:.2f}")


def likert(metrics: dict) -> Yours | None:
    found = metrics.get("likert") or {}
    if not found.get("ppo_ptx") or not found.get("sft"):
        return None
    return Yours(apart(found["ppo_ptx"], found["sft"]), metrics["prompts"])


def quality(key: str) -> Measure:
    """Of the reward model, or of the labelers, on all held-out rankings."""

    def measure(metrics: dict) -> Yours | None:
        found = next((row for row in metrics["reward_model"] if row.get(key)), None)
        return Yours(Interval(*found[key]), found["pairs"]) if found else None

    return measure


def labeler_gap(metrics: dict) -> Yours | None:
    """Accuracy on labelers trained on, less that on the others. The stage measures the latter without an interval, on
    the same rankings: the difference's is at most sqrt(2) times as wide as the accuracy's."""
    found = next((row for row in metrics["reward_model"] if row.get("held_out_accuracy")), None)
    if not found:
        return None
    mean, low, high = found["accuracy"]
    gap, half = mean - found["held_out_accuracy"], sqrt(2) * (high - low) / 2
    note = f"{mean:.3f} and {found['held_out_accuracy']:.3f}"
    return Yours(Interval(gap, gap - half, gap + half), found["pairs"], note)


def taxes(metrics: dict) -> dict[str, tuple[Interval, Interval, int]]:
    """{public task: (PPO - GPT, PPO-ptx - PPO, questions)} in shares, paired; more is better."""
    found = {}
    for task, changes in metrics["tax"]["tasks"].items():
        n = metrics["tax"].get("questions", {}).get(task, 0)
        found[task] = Interval(*changes["ppo - gpt"]), Interval(*changes["ppo_ptx - ppo"]), n
    for row in metrics.get("harness") or ():
        if capability(row):
            unit = 100 if row["metric"] == "bleu" else 1
            lost, back = (Interval(*(part / unit for part in one)) for one in (row["deltas"]["ppo"], row["recovery"]))
            shots = f", {row['shots']} shots" if row["shots"] else ""
            found[f"{row['task']} ({row['metric']}{shots})"] = lost, back, row["n"]
    return found


def capability(row: dict) -> bool:
    """Whether a row of the harness says how well a model does a task, without instructions."""
    names = ("acc", "f1", "em", "exact", "bleu", "rouge")
    return row["higher_is_better"] and row.get("prompt") in (None, "basic") and row["metric"].lower().startswith(names)


def tax(part: int) -> Measure:
    """On the task where PPO loses most clearly: 0 what it lost, 1 what PPO-ptx won back."""

    def measure(metrics: dict) -> Yours | None:
        found = taxes(metrics)
        if not found:
            return None
        task = min(found, key=lambda name: found[name][0].high)
        return Yours(found[task][part], found[task][2], f"on {task}")

    return measure


def harness(task: str, prompt: str | None, metric: str = "") -> Measure:
    """PPO-ptx less GPT on the first of the harness' rows whose task and metric have these words in them."""

    def measure(metrics: dict) -> Yours | None:
        for row in metrics.get("harness") or ():
            same = row.get("prompt") == prompt or prompt is None
            if task in row["task"].lower() and metric in row["metric"].lower() and same and "ppo_ptx" in row["deltas"]:
                return Yours(Interval(*row["deltas"]["ppo_ptx"]), row["n"], f"{row['task']}, {row['metric']}")
        return None

    return measure


def nothing(_: dict) -> None:
    """No single run measures it."""
