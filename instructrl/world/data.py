"""What the data stage writes of a tiny world: text, demonstrations, prompts and public tasks.

Each comes from a random stream of its own, so that a size can change without changing the others.
"""

import random
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING

from instructrl.world.prompts import Prompt
from instructrl.world.world import World

if TYPE_CHECKING:
    from instructrl.config import World as Sizes


@dataclass(frozen=True)
class WorldData:
    """Everything generated from one recipe's `data.world`.

    No question of a `valid` or `eval` prompt occurs in training: not as a prompt of `demonstrations`, `rank` or
    `train`, whatever stands before it, not in their shots, and on no page of the pretraining text (`prompts.part`).
    Held-out documents are never in that text.
    """

    demonstrations: dict[str, list[tuple[Prompt, str]]]
    """train, valid: prompts with a demonstrator's answer."""
    prompts: dict[str, list[Prompt]]
    """rank, rank_valid: to be ranked; train, valid: for PPO; eval: for evaluation."""
    text: dict[str, list[tuple[str, str]]]
    """train, valid: pretraining documents (kind, text)."""
    tasks: list[dict]
    """{task, context, choices, answer}."""


def make_world(sizes: "Sizes", seed: int) -> World:
    """The world of a recipe: `recipe.data.world` and `recipe.seed`."""
    return World(seed, sizes.people, sizes.strangers)


def world_data(sizes: "Sizes", seed: int, valid_share: float = 0.1) -> WorldData:
    """Generates everything. `valid_share`: validation demonstrations and prompts for each one of training, made
    in addition to the sizes that the recipe names."""
    world = make_world(sizes, seed)

    def stream(name: str) -> random.Random:
        return random.Random(f"{name} {seed}")

    def prompts(name: str, n: int, part: str) -> list[Prompt]:
        return world.prompts(n, stream(f"prompts {name}"), of=part, unique=part == "eval")

    def demonstrations(name: str, n: int) -> list[tuple[Prompt, str]]:
        rng = stream(f"answers {name}")
        drawn = prompts(f"demonstrations {name}", n, name)
        return [(prompt, world.demonstration(prompt, rng, sizes)) for prompt in drawn]

    valid_text = world.documents(sizes.valid_documents, stream("text valid"))
    train_text = world.documents(sizes.documents, stream("text train"), exclude={text for _, text in valid_text})
    return WorldData(
        demonstrations={
            "train": demonstrations("train", sizes.demonstrations),
            "valid": demonstrations("valid", ceil(valid_share * sizes.demonstrations)),
        },
        prompts={
            "rank": prompts("rank", sizes.ranked_prompts, "train"),
            "rank_valid": prompts("rank_valid", sizes.valid_ranked_prompts, "valid"),
            "train": prompts("train", sizes.ppo_prompts, "train"),
            "valid": prompts("valid", ceil(valid_share * sizes.ppo_prompts), "valid"),
            "eval": prompts("eval", sizes.eval_prompts, "eval"),
        },
        text={"train": train_text, "valid": valid_text},
        tasks=world.tasks(stream("tasks")),
    )
