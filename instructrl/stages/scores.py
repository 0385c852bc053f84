"""What is said of the models' answers: rewards, KL from SFT, judgements, and who wins."""

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
from transformers import PreTrainedModel

from instructrl.stages import judging
from instructrl.stages.answers import Answer
from instructrl.stages.endpoint import Endpoint
from instructrl.stages.judges import EndpointJudge, Judge, Scored, Side
from instructrl.stages.judging import BASELINE, Scorer
from instructrl.stages.names import GREEDY
from instructrl.stages.winrate import decided
from instructrl.trainers.rollout import score_logprobs

if TYPE_CHECKING:
    from instructrl.stages.study import Study

SAMPLES = pyarrow.schema(
    {
        **{name: pyarrow.string() for name in ("prompt", "category", "kind", "source", "model", "response", "gold")},
        "temperature": pyarrow.float64(),
        "ended": pyarrow.bool_(),
        "tokens": pyarrow.int64(),
        "reward": pyarrow.float64(),
        "judge_score": pyarrow.float64(),
        "against_sft": pyarrow.float64(),
        "kl_from_sft": pyarrow.float64(),
    }
)
"""One row an answer. `gold`: the gold preference's judgement as JSON; null where there is none."""


class Scores:
    """What is said of the answers: rewards, KL, judgements and outcomes, each [prompts] for (model, temperature)."""

    def __init__(self, study: "Study") -> None:
        self.study = study
        recipe, inputs = study.recipe, study.inputs
        every = [(name, t) for name, given in study.answers.items() for t in given]
        main = [(name, recipe.eval.temperature) for name in study.names]
        self.rewards = self._score(inputs["reward_model"] / "model", main)
        self.kl = self._kl()
        self.gold: dict[tuple[str, float], list[dict]] = {}
        self.judged: dict[tuple[str, float], np.ndarray] = {}
        if recipe.data.world:
            self.gold = {
                (name, t): judging.gold_judgements(recipe, study.prompts, study.answers[name][t]) for name, t in every
            }
        if recipe.eval.judge == "gold":
            self.judged = {key: np.array([one["utility"] for one in found]) for key, found in self.gold.items()}
        elif recipe.eval.judge == "reward_model":
            self.judged = self._score(inputs["judge"] / "model", every)
        self.judge_card: dict | None = None
        self.pairs: dict[tuple[str, str], np.ndarray] = {}
        self.outcomes: dict[tuple[str, float], np.ndarray] = {}
        if recipe.eval.judge == "endpoint":
            self._ask_endpoint()
        elif self.judged:
            self._compare(Scored(self.judged), sorted(self.judged), list(combinations(study.names, 2)))

    def _score(self, folder: Path, keys: list[tuple[str, float]]) -> dict[tuple[str, float], np.ndarray]:
        """One pass over all answers, so that equal ones are read once."""
        study = self.study
        scorer = Scorer(folder, study.recipe)
        together = [answer for name, t in keys for answer in study.answers[name][t]]
        found = scorer.scores(study.prompts * len(keys), together, study.pad)
        return dict(zip(keys, np.split(found, len(keys)), strict=True))

    def _compare(self, judge: Judge, keys: list[tuple[str, float]], pairs: list[tuple[str, str]]) -> None:
        """Let the judge compare (model, temperature) with SFT, and pairs of models at the recipe's temperature."""
        study, asked = self.study, [row["prompt"] for row in self.study.prompts]

        def side(name: str, t: float) -> Side:
            return Side(name, t, [answer.text for answer in study.answers[name][t]])

        for name, t in keys:
            known = name == BASELINE  # against itself
            self.outcomes[name, t] = (
                np.full(len(asked), 0.5) if known else judge.compare(asked, side(name, t), side(BASELINE, t))
            )
        t = study.recipe.eval.temperature
        for one, other in pairs:
            if BASELINE not in (one, other):
                self.pairs[one, other] = judge.compare(asked, side(one, t), side(other, t))

    def _ask_endpoint(self) -> None:
        """At the recipe's temperature only: each comparison costs."""
        study, recipe = self.study, self.study.recipe
        kept = Path(recipe.runtime.output_dir).expanduser() / "endpoint" / "replies.sqlite"
        pairs = list(combinations(study.names, 2)) if recipe.eval.endpoint.pairs == "all" else []
        with Endpoint(kept, recipe.runtime.endpoint) as endpoint:
            judge = EndpointJudge(endpoint, recipe)
            self._compare(judge, [(name, recipe.eval.temperature) for name in study.names], pairs)
            self.judge_card = judge.card(recipe.eval.bootstrap_samples)

    def compared(self, one: str, other: str) -> np.ndarray | None:
        """The outcomes of one model against another, where there is a verdict; None if they were not compared."""
        t = self.study.recipe.eval.temperature
        found = {(name, BASELINE): values for (name, at), values in self.outcomes.items() if at == t} | self.pairs
        if (one, other) in found:
            return decided(found[one, other])[0]
        return 1 - decided(found[other, one])[0] if (other, one) in found else None

    def _kl(self) -> dict[tuple[str, float], np.ndarray]:
        """log p(answer) - log p_SFT(answer) of each sampled answer: its mean is the KL divergence per response."""
        study, t = self.study, self.study.recipe.eval.temperature
        if t == GREEDY:
            return {}
        reference = study.model(BASELINE)
        found = {(BASELINE, t): np.zeros(len(study.prompts))}
        for name in ("ppo", "ppo_ptx"):
            found[name, t] = log_ratios(study, reference, study.answers[name][t])
        return found

    def rows(self) -> list[dict]:
        """The rows of `samples.parquet`."""
        rows = []
        for name, by_temperature in self.study.answers.items():
            for t, given in by_temperature.items():
                scored = {"reward": self.rewards, "judge_score": self.judged, "against_sft": self.outcomes}
                scored |= {"kl_from_sft": self.kl}
                for number, (prompt, answer) in enumerate(zip(self.study.prompts, given, strict=True)):
                    row = {column: prompt[column] for column in ("prompt", "category", "kind", "source")}
                    row |= {"model": name, "temperature": t, "response": answer.text, "ended": answer.ended}
                    row |= {"tokens": answer.length}
                    for column, values in scored.items():
                        value = float(values[name, t][number]) if (name, t) in values else math.nan
                        row[column] = None if math.isnan(value) else value
                    gold = self.gold.get((name, t))
                    rows.append(row | {"gold": json.dumps(gold[number]) if gold else None})
        return rows


def log_ratios(study: "Study", reference: PreTrainedModel, given: Sequence[Answer]) -> np.ndarray:
    """log p(answer) - log p_reference(answer) of a policy's sampled answers: [prompts]."""
    logprobs = score_logprobs(
        reference,
        [row["ids"] + answer.ids for row, answer in zip(study.prompts, given, strict=True)],
        [len(row["ids"]) for row in study.prompts],
        temperature=study.recipe.eval.temperature,
        pad_token_id=study.pad,
        max_tokens=study.recipe.runtime.max_tokens,
    )
    return np.array([answer.logprob - float(theirs.sum()) for answer, theirs in zip(given, logprobs, strict=True)])
