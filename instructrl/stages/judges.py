"""Judges: who says which of two answers to a prompt is better. All have one method, `compare`.

One that scores single answers (the gold preference, a reward model) compares the scores; people's labels are looked up.
An endpoint is shown both answers, twice: models that judge prefer one place to the other (Zheng et al. 2023, arXiv
2306.05685), so each pair is asked for in both orders, and the mean of the two verdicts counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from instructrl.config import Recipe
from instructrl.stages import rubric
from instructrl.stages.endpoint import Endpoint, Reply
from instructrl.stages.pool import normalized
from instructrl.stages.winrate import outcomes, share

BIASED = 0.05
"""A judge is said to be position-biased if the whole interval of its wins in the first place is that far from a half.
Our choice."""


class Side(NamedTuple):
    """One model's answers."""

    model: str
    temperature: float
    answers: Sequence[str]


class Judge(Protocol):
    """Who says which of two answers is better."""

    def compare(self, prompts: Sequence[str], one: Side, other: Side) -> NDArray[np.float64]:
        """1 (one's answer is better), .5 (a tie) or 0 for each prompt, or between; nan: no verdict. [N]"""
        ...


@dataclass
class Scored:
    """A judge that gave each answer a number: {(model, temperature): [prompts]}."""

    scores: dict[tuple[str, float], NDArray[np.float64]]

    def compare(self, prompts: Sequence[str], one: Side, other: Side) -> NDArray[np.float64]:
        return outcomes(self.scores[one.model, one.temperature], self.scores[other.model, other.temperature])


@dataclass
class Labelled:
    """People, who labelled answers of an earlier run: {(model, other): {normalized prompt: outcome}}."""

    pairs: dict[tuple[str, str], dict[str, float]]

    def compare(self, prompts: Sequence[str], one: Side, other: Side) -> NDArray[np.float64]:
        there = self.pairs.get((one.model, other.model))
        back = self.pairs.get((other.model, one.model), {})
        asked = [normalized(prompt) for prompt in prompts]
        if there is not None:
            return np.array([there.get(prompt, np.nan) for prompt in asked])
        return 1 - np.array([back.get(prompt, np.nan) for prompt in asked])


class EndpointJudge:
    """A judge behind an endpoint, told the paper's rubric. It keeps account of what it was asked."""

    def __init__(self, endpoint: Endpoint, recipe: Recipe) -> None:
        self.endpoint, self.settings, self.prices = endpoint, recipe.eval.endpoint, recipe.runtime.endpoint
        self.read: list[tuple[rubric.Reading, rubric.Reading]] = []
        self.replies: list[Reply] = []
        self.same = 0

    def compare(self, prompts: Sequence[str], one: Side, other: Side) -> NDArray[np.float64]:
        """Equal answers tie and are not asked about. No verdict where either order got none."""
        found = np.full(len(prompts), 0.5)
        rows = zip(prompts, one.answers, other.answers, strict=True)
        asked = [(number, row) for number, row in enumerate(rows) if row[1] != row[2]]
        self.same += len(prompts) - len(asked)
        bodies = []
        for _, (prompt, ours, theirs) in asked:
            bodies += [self.body(prompt, ours, theirs), self.body(prompt, theirs, ours)]
        replies = list(self.endpoint.ask(bodies))
        self.replies += replies
        for (number, _), there, back in zip(asked, replies[::2], replies[1::2], strict=True):
            pair = rubric.read(there.choice), rubric.read(back.choice)
            self.read.append(pair)
            found[number] = both_orders(*pair)
        return found

    def body(self, prompt: str, first: str, second: str) -> dict:
        """One request."""
        return self.settings.options | {
            "model": self.settings.model,
            "messages": rubric.messages(prompt, first, second),
        }

    def card(self, samples: int) -> dict:
        """`judge_card` of `metrics.json`: what was asked, what it cost, and whether the judge can be believed."""
        each = [reading for pair in self.read for reading in pair]
        decided = [pair for pair in self.read if None not in (pair[0].outcome, pair[1].outcome)]
        first = share([(a.outcome + b.outcome) / 2 for a, b in decided], samples) if decided else None
        agree = share([float(a.outcome == 1 - b.outcome) for a, b in decided], samples) if decided else None
        ties = sum(both_orders(*pair) == 0.5 for pair in decided)
        tokens = [sum(reply.prompt_tokens for reply in self.replies)]
        tokens.append(sum(reply.completion_tokens for reply in self.replies))
        prices = (self.prices.price_in, self.prices.price_out)
        cost = None if None in prices else sum(n * price for n, price in zip(tokens, prices, strict=True)) / 1e6
        return {
            "name": self.settings.model,
            "prompts": len(self.read) + self.same,
            "same_answers": self.same,
            "ties": ties + self.same,
            "no_verdict": len(self.read) - len(decided),
            "first_position_wins": list(first) if first else None,
            "order_agreement": list(agree) if agree else None,
            "position_biased": bool(first and (first.low > 0.5 + BIASED or first.high < 0.5 - BIASED)),
            "refusals": sum(reading.refused for reading in each),
            "unparsable": sum(reading.outcome is None and not reading.refused for reading in each),
            "calls": len(self.replies),
            "cached": sum(reply.cached for reply in self.replies),
            "retried": self.endpoint.retried,
            "tokens": dict(zip(("prompt", "completion"), tokens, strict=True)),
            "cost": cost,
            "notes": [],
        }


def both_orders(there: rubric.Reading, back: rubric.Reading) -> float:
    """The outcome for the answer that was first in `there` and second in `back`; nan where either has none."""
    if there.outcome is None or back.outcome is None:
        return np.nan
    return (there.outcome + 1 - back.outcome) / 2


# ---- the report


def section(metrics: dict) -> list[str]:
    """What the report says of an endpoint that judged."""
    card = metrics.get("judge_card")
    if not card:
        return []
    said = [
        f"The judge was asked about {card['prompts'] - card['same_answers']} pairs of answers, each in both orders; "
        f"the mean of the two verdicts counts. {card['same_answers']} pairs are of equal answers, and tie unasked. "
        f"{card['ties']} pairs tie, and {card['no_verdict']} are left out for want of a verdict: refused replies: "
        f"{card['refusals']}, replies without a verdict that can be read: {card['unparsable']}."
    ]
    if card["first_position_wins"]:
        first, agree = card["first_position_wins"], card["order_agreement"]
        said.append(
            f"{'**The judge is position-biased**' if card['position_biased'] else 'Position'}: the answer shown first "
            f"wins {percent(first)} of the time, ties half; without a bias that is 50 %. The verdict is the same in "
            f"both orders for {percent(agree)} of the pairs."
        )
    cost = "" if card["cost"] is None else f", at the prices of `runtime.endpoint` {card['cost']:.4g}"
    said.append(
        f"Replies: {card['calls']}, of which {card['cached']} were on the disk already; calls repeated: "
        f"{card['retried']}. Tokens: {card['tokens']['prompt']} asked, {card['tokens']['completion']} replied{cost}."
    )
    return ["## The judge", *said, *card["notes"]]


def percent(interval: Sequence[float]) -> str:
    """`62 % (59 to 65)`"""
    mean, low, high = (f"{100 * part:.0f}" for part in interval)
    return f"{mean} % ({low} to {high})"
