"""What is said of the models' answers: rewards, KL from SFT, judgements, and who wins."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
from transformers import PreTrainedModel

from instructrl.stages import judging
from instructrl.stages.answers import Answer
from instructrl.stages.judging import BASELINE, Scorer
from instructrl.stages.study import GREEDY, Study
from instructrl.stages.winrate import outcomes
from instructrl.trainers.rollout import score_logprobs

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

    def __init__(self, study: Study) -> None:
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
        self.outcomes = {
            (name, t): outcomes(score, self.judged[BASELINE, t]) for (name, t), score in self.judged.items()
        }

    def _score(self, folder: Path, keys: list[tuple[str, float]]) -> dict[tuple[str, float], np.ndarray]:
        """One pass over all answers, so that equal ones are read once."""
        study = self.study
        scorer = Scorer(folder, study.recipe)
        together = [answer for name, t in keys for answer in study.answers[name][t]]
        found = scorer.scores(study.prompts * len(keys), together, study.pad)
        return dict(zip(keys, np.split(found, len(keys)), strict=True))

    def compared(self, one: str, other: str) -> np.ndarray:
        """The outcomes of one model against another at the recipe's temperature. [prompts]"""
        t = self.study.recipe.eval.temperature
        return outcomes(self.judged[one, t], self.judged[other, t])

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
                        row[column] = float(values[name, t][number]) if (name, t) in values else None
                    gold = self.gold.get((name, t))
                    rows.append(row | {"gold": json.dumps(gold[number]) if gold else None})
        return rows


def log_ratios(study: Study, reference: PreTrainedModel, given: Sequence[Answer]) -> np.ndarray:
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
