"""Who compares the models' answers: the world's gold preference, a reward model learnt from held-out labels, or people.

A judge that scores gives a number for each answer; whose is higher wins the prompt. Labels may also name winners.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import records, sources
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
}


def names(recipe: Recipe) -> dict[str, str]:
    """The five models and, where the recipe asks for it, the best of several of SFT's answers."""
    n = recipe.eval.best_of_n
    return NAMES | {BEST: f"SFT, best of {n}"} if n else NAMES


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

    def prompts(self) -> int:
        """How many prompts compare some model with SFT."""
        return len({prompt for found in self.outcomes.values() for prompt in found})

    def card(self) -> dict:
        """JSON for `metrics.json`."""
        counts = {"prompts": self.prompts(), "other_prompts": self.other_prompts, "invalid": self.invalid}
        return counts | {"evaluated": self.evaluated, "by_model": {name: len(p) for name, p in self.outcomes.items()}}


def read_labels(recipe: Recipe, prompts: Iterable[str] = ()) -> Labels:
    """From `eval.labels`, each model against SFT. Several labels of one prompt and model count as their mean.

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
    found = _against_baseline(read, models)
    if not any(found.values()):
        raise UserError(f"{key}: no label in {source.path} compares a model with SFT on the same prompt")
    labelled = {prompt for outcomes_ in found.values() for prompt in outcomes_}
    wanted = labelled & {normalized(prompt) for prompt in prompts}
    kept = wanted or labelled
    found = {name: {prompt: values[prompt] for prompt in values if prompt in kept} for name, values in found.items()}
    return Labels(found, bool(wanted), len(labelled) - len(kept), invalid)


def _read_label(label: dict, models: dict[str, str]) -> tuple[str, str, str | None, float]:
    """(prompt, model, its opponent, its outcome), or (prompt, model, None, its score)."""
    prompt = normalized(label["prompt"])
    if "score" in label:
        return prompt, _model(label["model"], models), None, label["score"]
    one, other = _model(label["model_a"], models), _model(label["model_b"], models)
    return prompt, one, other, _outcome(label["winner"], one, other, models)


def _against_baseline(
    read: list[tuple[str, str, str | None, float]], models: Iterable[str]
) -> dict[str, dict[str, float]]:
    """{model: {prompt: mean outcome against SFT}}; the mean scores of a prompt make one more outcome."""
    scores: dict[tuple[str, str], list[float]] = {}
    found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for prompt, one, other, value in read:
        if other is None:
            scores.setdefault((prompt, one), []).append(value)
        elif BASELINE in (one, other) and one != other:
            name, outcome = (one, value) if other == BASELINE else (other, 1 - value)
            found[name].setdefault(prompt, []).append(outcome)
    for (prompt, name), values in scores.items():
        baseline = scores.get((prompt, BASELINE))
        if baseline and name != BASELINE:
            outcome = outcomes([np.mean(values)], [np.mean(baseline)])[0]
            found[name].setdefault(prompt, []).append(float(outcome))
    return {
        name: {prompt: float(np.mean(values)) for prompt, values in labelled.items()}
        for name, labelled in found.items()
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
