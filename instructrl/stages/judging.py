"""Who compares the models' answers: the world's gold preference, a reward model learnt from held-out labels, or people.

A judge that scores gives a number for each answer; whose is higher wins the prompt. Labels may also name winners.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import ratings, records, sources
from instructrl.stages.answers import Answer, world_of
from instructrl.stages.models import load_reward_model
from instructrl.stages.names import BASELINE, BEST, NAMES
from instructrl.stages.pool import normalized
from instructrl.stages.winrate import outcomes
from instructrl.trainers.rollout import score_rewards
from instructrl.world import Prompt

DESCRIPTIONS = {
    "gold": "the built-in world's gold preference: the truth, which no model was trained on",
    "reward_model": "a second reward model, trained on rankings of prompts that trained nothing else (held out). "
    "It is a learnt judge with the errors of one, not a person",
    "labels": "labels from {path}, of an earlier run's samples",
    "endpoint": "the model {model} behind an endpoint, told the rubric of the paper's labelers (Fig. 10) and asked "
    "about each pair of answers in both orders. It is a model with a model's errors, not a person",
}


def names(recipe: Recipe) -> dict[str, str]:
    """The five models and, where the recipe asks for it, the best of several of SFT's answers."""
    n = recipe.eval.best_of_n
    return NAMES | {BEST: f"SFT, best of {n}"} if n else NAMES


def describe(recipe: Recipe) -> str:
    """One phrase for the report."""
    path = recipe.eval.labels.path if recipe.eval.labels else ""
    return DESCRIPTIONS[recipe.eval.judge].format(path=path, model=recipe.eval.endpoint.model)


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


@dataclass
class Labels:
    """What `eval.labels` says."""

    outcomes: dict[str, dict[str, float]]
    """For each model {prompt: mean outcome against SFT}: 1 it wins, .5 a tie, 0 it loses. Prompts are normalized."""
    evaluated: bool
    """Whether the prompts are among those evaluated; if none is, the labels of all prompts are kept."""
    other_prompts: int = 0
    """Prompts left out because they are not among those evaluated."""
    invalid: int = 0
    """Rows dropped by `skip_invalid`."""
    pairs: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)
    """For each pair of models {prompt: mean outcome of the first}."""
    rated: ratings.Rated = field(default_factory=dict)

    def prompts(self) -> int:
        """How many prompts compare some model with SFT."""
        return len({prompt for found in self.outcomes.values() for prompt in found})

    def card(self) -> dict:
        """JSON for `metrics.json`."""
        counts = {"prompts": self.prompts(), "other_prompts": self.other_prompts, "invalid": self.invalid}
        return counts | {"evaluated": self.evaluated, "by_model": {name: len(p) for name, p in self.outcomes.items()}}


def read_labels(recipe: Recipe, prompts: Iterable[str] = ()) -> Labels:
    """From `eval.labels`, all pairs of models. Several labels of one prompt and model count as their mean.

    Prompts are what is drawn anew for an interval, so each may count once. Labels of prompts other than `prompts`
    (those evaluated) are left out, unless that would leave none.

    Raises:
        UserError: a row is wrong, or no row compares anything with SFT.
    """
    source, key, models = recipe.eval.labels, "eval.labels", names(recipe)
    read, invalid = [], 0
    for row in sources.rows(source, key):
        try:
            read += [_read_label(label, models) for label in records.record(row, "labels", source, key)]
        except records.Invalid as problem:
            if not source.skip_invalid:
                raise records.invalid(row, problem, key) from None
            invalid += 1
        if len(read) == source.limit:
            break
    pairs = _pairs(read, list(models))
    if not any(found for (_, other), found in pairs.items() if other == BASELINE):
        raise UserError(f"{key}: no label in {source.path} compares a model with SFT on the same prompt")
    labelled = {prompt for found in pairs.values() for prompt in found}
    wanted = labelled & {normalized(prompt) for prompt in prompts}
    kept = wanted or labelled
    pairs = {both: {prompt: found[prompt] for prompt in found if prompt in kept} for both, found in pairs.items()}
    outcomes_ = {name: pairs.get((name, BASELINE), {}) for name in models}
    rated = ratings.by_model((prompt, model, said) for prompt, model, _, _, said in read if prompt in kept)
    return Labels(outcomes_, bool(wanted), len(labelled) - len(kept), invalid, pairs, rated)


Label = tuple[str, str, str | None, float, dict[str, float]]
"""(prompt, model, its opponent, its outcome, {}), or (prompt, model, None, its score, its ratings)."""


def _read_label(label: dict, models: dict[str, str]) -> Label:
    prompt = normalized(label["prompt"])
    if "score" in label:
        return prompt, _model(label["model"], models), None, label["score"], label["ratings"]
    one, other = _model(label["model_a"], models), _model(label["model_b"], models)
    return prompt, one, other, _outcome(label["winner"], one, other, models), {}


def _pairs(read: list[Label], models: Sequence[str]) -> dict[tuple[str, str], dict[str, float]]:
    """{(model, other): {prompt: mean outcome}}, SFT the other of all; the mean scores of a prompt make one more
    outcome."""
    scores: dict[str, dict[str, list[float]]] = {}
    every = list(combinations(sorted(models, key=lambda name: name == BASELINE), 2))
    found: dict[tuple[str, str], dict[str, list[float]]] = {both: {} for both in every}
    for prompt, one, other, value, _ in read:
        if other is None:
            scores.setdefault(prompt, {}).setdefault(one, []).append(value)
        elif one != other:
            both, outcome = ((one, other), value) if (one, other) in found else ((other, one), 1 - value)
            found[both].setdefault(prompt, []).append(outcome)
    for prompt, given in scores.items():
        for one, other in every:
            if one in given and other in given:
                outcome = outcomes([np.mean(given[one])], [np.mean(given[other])])[0]
                found[one, other].setdefault(prompt, []).append(float(outcome))
    return {
        both: {prompt: float(np.mean(values)) for prompt, values in labelled.items()}
        for both, labelled in found.items()
    }


def _model(said: str, models: dict[str, str]) -> str:
    """Which of the models a label means: `ppo_ptx`, `PPO-ptx` and `ppo ptx` are one."""
    plain = {_letters(text): name for name, title in models.items() for text in (name, title)}
    if _letters(said) not in plain:
        raise records.Invalid(f"there is no model {said!r}; the models are {', '.join(models)}")
    return plain[_letters(said)]


def _outcome(winner: str, one: str, other: str, models: dict[str, str]) -> float:
    said = _letters(winner)
    if said in ("tie", "both", "equal", "none"):
        return 0.5
    if said in ("a", "modela"):
        return 1.0
    if said in ("b", "modelb"):
        return 0.0
    name = _model(winner, models)
    if name not in (one, other):
        raise records.Invalid(f"the winner {winner!r} is neither of {one} and {other}")
    return float(name == one)


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum())
