"""The artifacts that a stage of `bench_estimate.py` or `bench_lora.py` begins from: random models, or random adapters
on one, and tables of random words.

Started by the driver with {folder, recipe, architecture, vocabulary, width, layers}. Every text is as long as the
recipe lets it be: an estimate is of the longest.
"""

import json
import random
import sys
from pathlib import Path

import models
import torch

from instructrl.config import Recipe
from instructrl.stages import base_model, lora, tables
from instructrl.stages.contract import Contract
from instructrl.stages.models import save

ROWS = 64
K = 4


def main() -> None:
    order = json.loads(sys.argv[1])
    folder, recipe = Path(order["folder"]), Recipe.model_validate(order["recipe"])
    size = models.Size(order["width"], order["layers"])
    tokenizer = models.tokenizer(order["vocabulary"])
    contract = Contract.of(tokenizer, recipe)
    base = models.policy(order["architecture"], order["vocabulary"], 1e-9, size)
    save(base, contract, folder / "base" / "model")
    if recipe.model.lora:
        write_adapters(folder, recipe, contract)
    else:
        save(base, contract, folder / "policy" / "model")
        scorer = models.scorer(order["architecture"], order["vocabulary"], 1, size)
        save(scorer, contract, folder / "reward_model" / "model")
    write_tables(folder / "data", recipe, order["vocabulary"])


def write_adapters(folder: Path, recipe: Recipe, contract: Contract) -> None:
    """A policy and a reward model that are adapters on `folder/base/model`, which the recipe names."""
    for name in ("policy", "reward_model"):
        torch.manual_seed(0)
        model = base_model.load({}, recipe, contract)
        if name == "reward_model":
            model = base_model.scorer(model)
        lora.save(lora.adapted(model, recipe), contract, folder / name / "model", base_model.identity({}, recipe))


def write_tables(folder: Path, recipe: Recipe, vocabulary: int) -> None:
    rng = random.Random(0)
    folder.mkdir()

    def words(count: int) -> str:
        return " ".join(f"w{rng.randrange(2, vocabulary)}" for _ in range(count))

    prompt, response = recipe.data.max_prompt_tokens, recipe.data.max_response_tokens - 1  # and EOS
    for split in ("train", "valid"):
        demonstrations = [{"prompt": words(prompt), "response": words(response)} for _ in range(ROWS)]
        rankings = [
            {"prompt": words(prompt), "responses": [words(response) for _ in range(K)], "ranks": list(range(1, K + 1))}
            for _ in range(ROWS)
        ]
        prompts = [{"prompt": words(prompt)} for _ in range(ROWS)]
        text = [{"text": words(recipe.ppo_ptx.ptx_max_length)} for _ in range(ROWS)]
        for name, rows, schema in (
            ("demonstrations", demonstrations, tables.DEMONSTRATIONS),
            ("rankings", rankings, tables.RANKINGS),
            ("prompts", prompts, tables.PROMPTS),
            ("text", text, tables.TEXT),
        ):
            kept = rows if split == "train" else rows[:4]
            tables.write_table(folder / f"{name}.{split}.parquet", kept, schema)


if __name__ == "__main__":
    main()
