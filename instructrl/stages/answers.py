"""What the models answer to held-out prompts: sampling, and the prefixes of GPT (prompted)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import torch
from transformers import PreTrainedModel

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages.contract import Contract
from instructrl.stages.tables import read_table
from instructrl.trainers.rollout import Completion, generate
from instructrl.trainers.selection import best_of_n, rewards_of
from instructrl.world import Prompt, World, make_world

PREFIXES = 4
"""Few-shot prefixes that the world offers GPT (prompted); the paper's authors wrote four (App. C.5)."""
PREFIX_PROMPTS = 100
"""Validation prompts on which the prefix is chosen. Our choice."""
PLAIN_FRAME = "Q: {prompt}\nA:"
SHOTS = 3


@dataclass(frozen=True)
class Answer:
    """One answer of one model."""

    text: str
    ids: list[int]
    """As a reward model reads it after the prompt: with EOS if the answer ended."""
    ended: bool
    """By itself: by EOS, or by GPT (prompted)'s stop."""
    logprob: float
    """Of the whole answer, under the distribution that it was drawn from."""

    @property
    def length(self) -> int:
        """Tokens, the one that ends it not counted."""
        return len(self.ids) - self.ended

    def to_json(self) -> dict:
        return asdict(self)


def held_out_prompts(
    recipe: Recipe, data: Path, contract: Contract, context: int, table: str, limit: int
) -> list[dict]:
    """The first prompts of a table that are not too long. Adds `ids`, the prompt as the models read it.

    Raises:
        UserError: none is short enough.
    """
    rows = read_table(data / f"{table}.parquet")
    longest = min(recipe.data.max_prompt_tokens, context - recipe.eval.response_length)
    kept = []
    for row in rows:
        row["ids"] = contract.prompt(row["prompt"])
        if len(row["ids"]) <= longest:
            kept.append(row)
        if len(kept) == limit:
            break
    if rows and not kept:
        raise UserError(
            f"none of the {len(rows)} prompts of {table} has at most {longest} tokens, the smaller of "
            f"data.max_prompt_tokens={recipe.data.max_prompt_tokens} and the model's {context} less "
            f"eval.response_length={recipe.eval.response_length}: raise the one or lower the other"
        )
    return kept


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    contract: Contract,
    recipe: Recipe,
    temperature: float,
    stops: Sequence[int] = (),
    stop: str = "",
) -> list[Answer]:
    """One answer a prompt. The random numbers belong to the prompts, so that models are compared on the same ones.

    With a `stop`, the answer is what stands before it, without the spaces around it, and is tokenised anew.
    """
    completions = generate(model, prompts, temperature=temperature, stop_token_ids=stops, **sampling(contract, recipe))
    return [answer(completion, contract, stop) for completion in completions]


def sample_best(
    model: PreTrainedModel,
    reward_model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    contract: Contract,
    recipe: Recipe,
) -> tuple[list[Answer], list[tuple[list[Answer], list[float]]]]:
    """Of `eval.best_of_n` answers to each prompt the one with the highest reward; `sample`'s is among them. Also all of
    them, in rounds of one a prompt, with their rewards."""
    read = rewards_of(reward_model, contract.tokenizer.pad_token_id, recipe.runtime.max_tokens)
    drawn: list[tuple[list[Answer], list[float]]] = []

    def score(asked: Sequence[Sequence[int]], completions: Sequence[Completion]) -> list[float]:
        rewards = list(map(float, read(asked, completions)))
        given, size = [answer(completion, contract) for completion in completions], len(prompts)
        drawn.extend((given[at : at + size], rewards[at : at + size]) for at in range(0, len(given), size))
        return rewards

    found = best_of_n(
        model,
        prompts,
        recipe.eval.best_of_n,
        score,
        temperature=recipe.eval.temperature,
        **sampling(contract, recipe),
    )
    return [answer(completion, contract) for completion in found.completions], drawn


def sampling(contract: Contract, recipe: Recipe) -> dict:
    """What all models sample with."""
    return {
        "max_new_tokens": recipe.eval.response_length,
        "eos_token_id": contract.tokenizer.eos_token_id,
        "pad_token_id": contract.tokenizer.pad_token_id,
        "generator": torch.Generator().manual_seed(recipe.seed),
        "batch_size": recipe.runtime.generation_batch_size,
    }


def answer(completion: Completion, contract: Contract, stop: str = "") -> Answer:
    """The completion as text; with a `stop`, what stands before it."""
    ids = completion.ids
    ended = ids[-1] == contract.tokenizer.eos_token_id
    text = contract.decode(ids)
    if stop:
        before, found, _ = text.partition(stop)
        text, ended = before.strip(), ended or bool(found)
        ids = contract.response(text)
        ids = ids if ended else ids[:-1]
    return Answer(text, ids, ended, float(completion.logprobs.sum()))


def stop_tokens(contract: Contract, stop: str) -> list[int]:
    """Every token whose text contains `stop`: BPE vocabularies hold many with a newline."""
    if not stop:
        return []
    tokenizer = contract.tokenizer
    words = tokenizer.batch_decode([[number] for number in range(len(tokenizer))])
    return [number for number, word in enumerate(words) if stop in word and number != tokenizer.eos_token_id]


# ---- GPT (prompted)


def prefixes(recipe: Recipe, data: Path) -> list[str]:
    """The candidates: the recipe's, else the world's, else a plain frame and one with three short demonstrations."""
    if recipe.eval.prompted_templates:
        for number, prefix in enumerate(recipe.eval.prompted_templates):
            if prefix.count("{prompt}") != 1:
                raise UserError(f"eval.prompted_templates[{number}] must contain {{prompt}} exactly once")
        return list(recipe.eval.prompted_templates)
    if recipe.data.world:
        return world_of(recipe).prompted_templates(random.Random(f"prefixes {recipe.seed}"), PREFIXES)
    rows = [
        row for row in read_table(data / "demonstrations.train.parquet") if "\n" not in row["prompt"] + row["response"]
    ]
    shots = sorted(rows, key=lambda row: (len(row["prompt"] + row["response"]), row["prompt"]))[:SHOTS]
    frame = "".join(PLAIN_FRAME.replace("{prompt}", row["prompt"]) + f" {row['response']}\n" for row in shots)
    return [PLAIN_FRAME, frame + PLAIN_FRAME] if shots else [PLAIN_FRAME]


def prefixed(recipe: Recipe, prefix: str, rows: Sequence[dict], contract: Contract, context: int) -> list[list[int]]:
    """Prompts behind a prefix, as ids. What is too long loses its beginning, the shots first; BOS stays."""
    plain = contract.plain()
    world = world_of(recipe) if recipe.data.world else None
    bos = len(plain.bos)
    room = context - recipe.eval.response_length - bos
    result = []
    for row in rows:
        text = (
            world.prompted(prefix, Prompt.from_json(row["spec"]))
            if world
            else prefix.replace("{prompt}", row["prompt"])
        )
        ids = plain.prompt(text)
        result.append(ids[:bos] + ids[bos:][-room:])
    return result


def choose_prefix(candidates: Sequence[str], score: Callable[[str], float]) -> tuple[str, dict[str, float]]:
    """The candidate with the highest mean reward on validation prompts (App. C.5), and every candidate's."""
    rewards = {prefix: score(prefix) for prefix in candidates}
    return max(rewards, key=lambda prefix: rewards[prefix]), rewards


def world_of(recipe: Recipe) -> World:
    """The built-in world of the recipe's data. Kept: its gold preference takes a second to get ready."""
    return _made(recipe.data.world, recipe.seed)


_made = lru_cache(maxsize=1)(make_world)
