"""The reward model (`reward_model`) and the judge that only `eval` uses (`judge`), from K-way rankings.

Paper section 3.5, eq. 1, and App. C.2: the SFT model with a scalar in place of the unembedding, all pairs of a prompt
as one batch element, one epoch, and a shift by which demonstrations score 0 on average.
"""

import math
from collections import Counter
from pathlib import Path
from statistics import fmean

from datasets import Dataset, disable_progress_bars
from peft import PeftModel
from transformers import PreTrainedModel, set_seed
from trl import RewardConfig

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import base_model, lora, models, preferences, ranks
from instructrl.stages.arguments import check_trainer, counted, optimizer, trainer_arguments
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.divergence import Rows
from instructrl.stages.tables import read_table
from instructrl.stages.winrate import Interval
from instructrl.trainers.ranking import KWiseRewardTrainer, has_pair, score
from instructrl.trainers.sharding import shard, unsharded

JUDGE_SEED = 1_000_003  # added to the recipe's seed
BIAS_DEMONSTRATIONS = 1_000  # enough for their mean score


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the reward model to `folder/model`; its config carries `reward_bias`.

    Returns:
        What `measure` does, and rankings (trained on), dropped (reason -> count), steps, train_loss, valid_loss (the
        same loss on the rankings held out, nats a pair), reward_bias.

    Raises:
        UserError: no ranking with an untied pair is left to train on or to measure with.
    """
    disable_progress_bars()
    contract = Contract.load(inputs["sft"] / "model")
    # The judge is another model: with the same head and order it would share the reward model's errors.
    seed = recipe.seed + JUDGE_SEED if name == "judge" else recipe.seed
    set_seed(seed)
    model, trained = starting_model(recipe, inputs, contract)
    limits, dropped, unmeasured = Limits.of(recipe, model), Counter(), Counter()
    source = inputs.get("label", inputs["data"])
    train_table = "judge" if name == "judge" else "train"
    rows = encode(read_table(source / f"rankings.{train_table}.parquet"), contract, limits, dropped)
    held_out = encode(read_table(source / "rankings.valid.parquet"), contract, limits, unmeasured)
    if not rows or not held_out:
        what, why = ("train on", dropped) if not rows else ("measure it with", unmeasured)
        raise UserError(f"{name} has no ranking with an untied pair left to {what}; dropped: {counted(why)}.")

    fed = singles(rows) if recipe.reward_model.shuffle_pairs else rows
    arguments = trainer_arguments(RewardConfig, in_steps(recipe, len(fed) / len(rows)), "reward_model", folder / FOLDER)
    arguments.seed = seed
    if ranks.share_more(recipe):
        shard(trained, arguments.device, recipe.runtime.sharding)
    trainer = KWiseRewardTrainer(
        model=trained,
        args=arguments,
        train_dataset=Dataset.from_list([{key: row[key] for key in ("completion_ids", "ranks")} for row in fed]),
        processing_class=contract.tokenizer,
        optimizers=(optimizer(model, recipe.reward_model), None),
    )
    tables = [Rows(source / f"rankings.{train_table}.parquet", [row["number"] for row in fed])]
    train_loss = train(trainer, folder, recipe.runtime.save_minutes, tables)
    with unsharded(trained):
        bias = demonstrations_mean(model, inputs["data"], contract, limits, recipe)
    model.config.reward_bias = bias
    lora.save(trained, contract, folder / "model", base_model.identity(inputs, recipe))
    metrics = {"rankings": len(rows), "dropped": dict(dropped), "steps": trainer.state.global_step}
    with unsharded(trained):
        measured = measure(model, contract, rows, held_out, recipe)
    metrics |= {"train_loss": train_loss, "valid_loss": held_out_loss(held_out), "reward_bias": bias}
    return metrics | measured


def starting_model(
    recipe: Recipe, inputs: dict[str, Path], contract: Contract
) -> tuple[PreTrainedModel, PreTrainedModel | PeftModel]:
    """The SFT model with a new scalar head in place of the unembedding: the network to read, and the same to train, of
    which with `model.lora` SFT's adapter goes on training and the base model's weights do not."""
    sft = inputs["sft"] / "model"
    if recipe.model.lora is None:
        model = models.init_reward_model(sft, recipe, models.nursery(recipe))
        return model, model
    model = base_model.scorer(base_model.load(inputs, recipe, contract))
    return model, lora.adapted(model, recipe, start=sft)


def check(recipe: Recipe) -> None:
    """Refuse fields in `reward_model.trainer` that TRL's RewardConfig does not have, before anything trains."""
    check_trainer(RewardConfig, recipe, "reward_model")


def encode(rankings: list[dict], contract: Contract, limits: Limits, dropped: Counter) -> list[dict]:
    """Rankings with their `number`, from 0, and `completion_ids`: prompt and response of each. Over-long responses, and
    rankings that have no pair left, are counted in `dropped`."""
    rows = []
    for number, ranking in enumerate(rankings):
        prompt = contract.prompt(ranking["prompt"], limits.prompt)
        responses = [contract.response(text, limits.response) for text in ranking["responses"]]
        problems = [limits.problem(prompt, response) for response in responses]
        for problem in filter(None, problems):
            dropped[f"responses {problem}"] += 1
        kept = [i for i, problem in enumerate(problems) if problem is None]
        row = ranking | {"number": number, "completion_ids": [prompt + responses[i] for i in kept]}
        for column in ("responses", "ranks", "gold"):
            row[column] = [ranking[column][i] for i in kept] if ranking[column] else []
        for column in ("annotators", "held_out"):
            row[column] = [[ranks[i] for i in kept] for ranks in ranking[column]]
        if has_pair(row):
            rows.append(row)
        else:
            dropped["rankings without an untied pair"] += 1
    return rows


def singles(rows: list[dict]) -> list[dict]:
    """Every untied pair of every ranking as a ranking of its own."""
    return [
        {
            "number": row["number"],
            "completion_ids": [row["completion_ids"][better], row["completion_ids"][worse]],
            "ranks": [1, 2],
        }
        for row in rows
        for better, worse in preferences.pairs(row["ranks"])
    ]


def in_steps(recipe: Recipe, pairs: float) -> Recipe:
    """The recipe with so many times the rows a step, as a whole number: as many pairs as its rankings have."""
    settings = recipe.reward_model
    larger = settings.model_copy(update={"batch_size": settings.batch_size * max(1, round(pairs))})
    return recipe.model_copy(update={"reward_model": larger})


def held_out_loss(rows: list[dict]) -> float:
    """Eq. 1 on rankings with `scores`: the mean of -log sigmoid(better - worse) over a prompt's pairs, then prompts."""

    def loss(row: dict) -> float:
        margins = [row["scores"][better] - row["scores"][worse] for better, worse in preferences.pairs(row["ranks"])]
        return fmean(math.log1p(math.exp(-abs(margin))) + max(0.0, -margin) for margin in margins)

    return fmean(map(loss, rows))


def demonstrations_mean(
    model: PreTrainedModel, data: Path, contract: Contract, limits: Limits, recipe: Recipe
) -> float:
    """The mean score of demonstrations; 0 if all are too long."""
    rows = read_table(data / "demonstrations.train.parquet")
    every = max(1, len(rows) // BIAS_DEMONSTRATIONS)
    encoded = [(contract.prompt(row["prompt"]), contract.response(row["response"])) for row in rows[::every]]
    sequences = [prompt + response for prompt, response in encoded if limits.problem(prompt, response) is None]
    scores = scored(model, sequences, contract, recipe)
    return sum(scores) / len(scores) if scores else 0.0


def scored(model: PreTrainedModel, sequences: list[list[int]], contract: Contract, recipe: Recipe) -> list[float]:
    """Each sequence's score; the ranks share them."""
    own = ranks.share(sequences)
    return ranks.gathered(score(model, own, contract.tokenizer.pad_token_id, recipe.runtime.max_tokens))


def measure(model: PreTrainedModel, contract: Contract, rows: list[dict], held_out: list[dict], recipe: Recipe) -> dict:
    """How the scores agree with held-out rankings.

    Returns:
        accuracy, accuracy_low, accuracy_high (95 % bootstrap over prompts), pairs, prompts; beside it on the same pairs
        longer_wins and bag_of_words (what length and words alone can do); agreement (annotators with each other),
        held_out_agreement and held_out_accuracy (labelers who ranked nothing for training), gold_accuracy (the
        world's truth), each null where the data has none; by_source.
    """
    flat = [ids for row in held_out for ids in row["completion_ids"]]
    scores = iter(scored(model, flat, contract, recipe))
    for row in held_out:
        row["scores"] = [next(scores) for _ in row["ranks"]]
    sources = sorted({row["source"] for row in held_out})
    return accuracies(held_out) | {
        "bag_of_words": mean(preferences.bag_of_words(rows, held_out)),
        "agreement": mean(preferences.agreement(held_out)),
        "held_out_agreement": mean(preferences.held_out_agreement(held_out)),
        "held_out_accuracy": mean(
            preferences.share([preferences.tally_all(row["scores"], row["held_out"]) for row in held_out])
        ),
        "gold_accuracy": mean(
            preferences.share([preferences.tally(row["scores"], row["gold"]) for row in held_out if row["gold"]])
        ),
        "by_source": {source: accuracies([row for row in held_out if row["source"] == source]) for source in sources},
    }


def accuracies(rows: list[dict]) -> dict:
    """The share of pairs that the scores order as the ranking does, and 'longer wins' on the same pairs."""
    accuracy = preferences.share([preferences.tally(row["scores"], row["ranks"]) for row in rows])
    return {
        "accuracy": accuracy.mean,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "longer_wins": mean(preferences.longer_wins(rows)),
        "pairs": sum(len(preferences.pairs(row["ranks"])) for row in rows),
        "prompts": len(rows),
    }


def mean(interval: Interval | None) -> float | None:
    return interval.mean if interval else None
