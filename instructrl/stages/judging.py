"""Who compares the models' answers: the world's gold preference, a reward model learnt from held-out labels, or people.

A judge that scores gives a number for each answer; whose is higher wins the prompt. Labels may also name winners.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import records, sources
from instructrl.stages.answers import Answer, world_of
from instructrl.stages.models import load_reward_model
from instructrl.stages.winrate import outcomes
from instructrl.trainers.rollout import score_rewards
from instructrl.world import Prompt

NAMES = {
    "gpt": "GPT",
    "gpt_prompted": "GPT (prompted)",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
}
"""The five models, in the paper's order, and how a reader knows them."""

BASELINE = "sft"

DESCRIPTIONS = {
    "gold": "the built-in world's gold preference: the truth, which no model was trained on",
    "reward_model": "a second reward model, trained on rankings of prompts that trained nothing else (held out). "
    "It is a learnt judge with the errors of one, not a person",
    "labels": "labels from {path}",
}


def describe(recipe: Recipe) -> str:
    """One phrase for the report."""
    return DESCRIPTIONS[recipe.eval.judge].format(path=recipe.eval.labels.path if recipe.eval.labels else "")


def gold_judgements(recipe: Recipe, prompts: Sequence[dict], answers: Sequence[Answer]) -> list[dict]:
    """The gold preference's judgement of each answer: utility, correct, constraint, hallucination, toxic, ..."""
    world = world_of(recipe)
    return [
        asdict(world.judge(Prompt.from_json(row["spec"]), answer.text, answer.ended))
        for row, answer in zip(prompts, answers, strict=True)
    ]


class Scorer:
    """A reward model that scores answers, the demonstrations' mean subtracted. Equal answers are read once."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.model: PreTrainedModel
        self.model, self.bias = load_reward_model(folder, recipe)
        self.max_tokens = recipe.runtime.max_tokens

    def scores(self, prompts: Sequence[dict], answers: Sequence[Answer], pad_token_id: int) -> NDArray[np.float64]:
        """[N], [N] -> [N]. `prompts` are rows with their `ids`."""
        both = [(*row["ids"], *answer.ids) for row, answer in zip(prompts, answers, strict=True)]
        distinct = list(dict.fromkeys(both))
        rewards = score_rewards(self.model, distinct, pad_token_id=pad_token_id, max_tokens=self.max_tokens)
        found = dict(zip(distinct, (rewards.double() - self.bias).tolist(), strict=True))
        return np.array([found[sequence] for sequence in both])


# ---- labels


def label_outcomes(recipe: Recipe) -> dict[str, list[tuple[str, float]]]:
    """From `eval.labels`: for each model (prompt, outcome against SFT): 1 it wins, .5 a tie, 0 it loses.

    Raises:
        UserError: a row is wrong, or no row compares anything with SFT.
    """
    source = recipe.eval.labels
    scores: dict[tuple[str, str], list[float]] = {}
    found: dict[str, list[tuple[str, float]]] = {name: [] for name in NAMES}
    for row in sources.rows(source, "eval.labels"):
        try:
            label = records.record(row, "labels", source, "eval.labels")
            if "score" in label:
                scores.setdefault((label["prompt"], _model(label["model"])), []).append(label["score"])
                continue
            one, other = _model(label["model_a"]), _model(label["model_b"])
            outcome = _outcome(label["winner"], one, other)
        except records.Invalid as problem:
            raise records.invalid(row, problem, "eval.labels") from None
        if BASELINE in (one, other) and one != other:
            name, outcome = (one, outcome) if other == BASELINE else (other, 1 - outcome)
            found[name].append((label["prompt"], outcome))
    for (prompt, name), values in scores.items():
        baseline = scores.get((prompt, BASELINE))
        if baseline and name != BASELINE:
            outcome = outcomes([np.mean(values)], [np.mean(baseline)])[0]
            found[name].append((prompt, float(outcome)))
    if not any(found.values()):
        raise UserError(f"eval.labels: no label in {source.path} compares a model with SFT on the same prompt")
    return found


def _model(said: str) -> str:
    """Which of the five models a label means: `ppo_ptx`, `PPO-ptx` and `ppo ptx` are one."""
    plain = {_letters(text): name for name, title in NAMES.items() for text in (name, title)}
    if _letters(said) not in plain:
        raise records.Invalid(f"there is no model {said!r}; the models are {', '.join(NAMES)}")
    return plain[_letters(said)]


def _outcome(winner: str, one: str, other: str) -> float:
    said = _letters(winner)
    if said in ("tie", "both", "equal", "none"):
        return 0.5
    if said in ("a", "modela"):
        return 1.0
    if said in ("b", "modelb"):
        return 0.0
    name = _model(winner)
    if name not in (one, other):
        raise records.Invalid(f"the winner {winner!r} is neither of {one} and {other}")
    return float(name == one)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())
