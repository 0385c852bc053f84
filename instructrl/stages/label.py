"""Rankings of the SFT model's own answers by the tiny world's simulated labelers (paper, 3.2 and 3.4)."""

import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.progress import Progress
from instructrl.stages import models, preferences
from instructrl.stages.contract import Contract
from instructrl.stages.parallel import forked
from instructrl.stages.tables import RANKINGS, read_table, write_table
from instructrl.stages.winrate import Interval
from instructrl.trainers.rollout import generate
from instructrl.world import Prompt, World, labelers, make_world, ranks

TABLES = {"train": "prompts.rank", "valid": "prompts.rank_valid"}
CHUNK = 256  # prompts answered between two updates of the progress display

Answers = list[tuple[str, bool]]
"""The different answers to one prompt, and whether the model ended each by itself."""


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write `rankings.train.parquet` and `rankings.valid.parquet`.

    Returns:
        rankings, valid_rankings; responses_per_prompt (different ones) and pairs_per_prompt, of the former; agreement
        of labelers with each other, held_out_agreement with held-out ones, gold_agreement with the gold preference.
    """
    policy = models.load_policy(inputs["sft"] / "model", recipe)
    contract = Contract.load(inputs["sft"] / "model")
    world = make_world(recipe.data.world, recipe.seed)
    panel = Panel(recipe)
    tables = {split: read_table(inputs["data"] / f"{table}.parquet") for split, table in TABLES.items()}
    prompts = [prompt for rows in tables.values() for prompt in rows]
    progress = Progress(folder)

    def answer(start: int) -> list[Answers]:
        generator = torch.Generator().manual_seed(recipe.seed * len(prompts) + start)
        texts = [prompt["prompt"] for prompt in prompts[start : start + CHUNK]]
        found = sample(policy, contract, texts, recipe, generator)
        progress.update(start + len(texts), len(prompts))
        return found

    chunks = forked(answer, range(0, len(prompts), CHUNK), recipe.runtime.jobs, models.device(recipe))
    answers = iter([one for chunk in chunks for one in chunk])
    rankings = {}
    for split, rows in tables.items():
        rankings[split] = [panel.rank(world, prompt, next(answers), by_all=split == "valid") for prompt in rows]
        write_table(folder / f"rankings.{split}.parquet", rankings[split], RANKINGS)
    return metrics(rankings["train"], rankings["valid"])


class Panel:
    """The labelers: half of them rank for training, the others are held out (paper, 3.4)."""

    def __init__(self, recipe: Recipe) -> None:
        self.noise, self.tie = recipe.label.agreement_noise, recipe.label.tie_threshold
        n = recipe.label.labelers
        everyone = labelers(2 * n, recipe.seed, recipe.label.taste_spread)
        self.labelers, self.held_out = everyone[:n], everyone[n:]
        self.rng = random.Random(f"label {recipe.seed}")

    def rank(self, world: World, prompt: dict, answers: Answers, by_all: bool) -> dict:
        """A row of RANKINGS: what one labeler, drawn at random, thinks of the answers.

        by_all: all rank them, to measure how people agree: `annotators`, of which `ranks` is one, and `held_out`.
        """
        spec = Prompt.from_json(prompt["spec"])
        judgements = [world.judge(spec, text, ended) for text, ended in answers]
        number = self.rng.randrange(len(self.labelers))
        every = range(len(self.labelers)) if by_all else [number]
        annotators = {i: self.labelers[i].rank(judgements, self.rng, self.noise, self.tie) for i in every}
        held_out = [one.rank(judgements, self.rng, self.noise, self.tie) for one in self.held_out] if by_all else []
        return {
            "prompt": prompt["prompt"],
            "responses": [text for text, _ in answers],
            "ranks": annotators[number],
            "annotators": list(annotators.values()) if by_all else [],
            "held_out": held_out,
            "gold": ranks([judgement.utility for judgement in judgements]),
            "labeler": f"labeler {number + 1}",
            "source": "world",
        }


def sample(
    policy: PreTrainedModel, contract: Contract, prompts: list[str], recipe: Recipe, generator: torch.Generator
) -> list[Answers]:
    """K answers of the policy to each prompt; an answer that comes again is shown once."""
    k, tokenizer = recipe.label.responses_per_prompt, contract.tokenizer
    completions = generate(
        policy,
        [contract.prompt(text) for text in prompts for _ in range(k)],
        max_new_tokens=recipe.label.response_length,
        temperature=recipe.label.temperature,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        generator=generator,
        batch_size=recipe.runtime.generation_batch_size,
    )
    answers = [(contract.decode(one.ids), one.ids[-1] == tokenizer.eos_token_id) for one in completions]
    return [list(dict(answers[start : start + k]).items()) for start in range(0, len(answers), k)]


def metrics(train: list[dict], valid: list[dict]) -> dict:
    """What there is to rank, and how people agree on it."""
    sizes = [len(row["responses"]) for row in train]
    return {
        "rankings": len(train),
        "valid_rankings": len(valid),
        "responses_per_prompt": sum(sizes) / len(sizes),
        "pairs_per_prompt": sum(len(preferences.pairs(row["ranks"])) for row in train) / len(sizes),
        "agreement": mean(preferences.agreement(valid)),
        "held_out_agreement": mean(preferences.held_out_agreement(valid)),
        "gold_agreement": mean(preferences.gold_agreement(valid)),
    }


def mean(interval: Interval | None) -> float | None:
    return interval.mean if interval else None
