"""The policy that PPO starts from: the base model fine-tuned on demonstrations and a few documents (paper, App. C.3).

Everything but the documents is `sft`'s: the same base model, tokenizer, padding token, demonstrations and trainer.
"""

import random
from functools import partial
from pathlib import Path

from trl import SFTConfig

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.stages import benchmarks, models, ranks, sft
from instructrl.stages.arguments import check_trainer
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.tables import read_table

HELD_OUT = 500  # documents of each kind, enough to measure their loss to a hundredth


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the policy to `folder/model`.

    Returns:
        What `sft.fine_tune` returns and, where there is held-out text, text_loss: nats a token. (The paper chose the
        learning rate by the losses on demonstrations and on text.)

    Raises:
        UserError: as `sft.fine_tune`, or there is no text to mix in.
    """
    metrics = sft.fine_tune(name, recipe, inputs, folder, partial(draw_documents, recipe, inputs["data"]))
    loss = text_loss(recipe, inputs["data"], folder / "model")
    return metrics if loss is None else metrics | {"text_loss": loss}


def check(recipe: Recipe) -> None:
    """Refuse fields in `ppo_init.trainer` that TRL's SFTConfig does not have, before anything trains."""
    check_trainer(SFTConfig, recipe, "ppo_init")


def draw_documents(recipe: Recipe, data: Path, contract: Contract, limits: Limits, demonstrations: int) -> list[dict]:
    """So many documents that they are `pretraining_share` of all rows, drawn by the seed; every one before any twice.

    A row has the columns of `sft.encode`. All tokens count but the first, which nothing predicts.

    Raises:
        UserError: there is none.
    """
    section = recipe.ppo_init
    count = round(demonstrations * section.pretraining_share / (1 - section.pretraining_share))
    if not count:
        return []
    texts = [row["text"] for row in read_table(data / "text.train.parquet")]
    if not texts:
        raise UserError("ppo_init has no pretraining text: set data.text, or ppo_init.pretraining_share=0.")
    chance = random.Random(f"ppo_init {recipe.seed}")
    order: list[int] = []
    while len(order) < count:
        order += chance.sample(range(len(texts)), len(texts))
    cut = min(section.ptx_max_length, limits.both)
    return [document_row(contract, texts[number], cut) | {"number": number} for number in order[:count]]


def document_row(contract: Contract, text: str, cut: int) -> dict[str, list[int]]:
    """A document of at most `cut` tokens as a row like those of `sft.encode`."""
    ids = contract.document(text)[:cut]
    return {"input_ids": ids, "completion_mask": [0] + [1] * (len(ids) - 1)}


def text_loss(recipe: Recipe, data: Path, model: Path) -> float | None:
    """Nats a token of held-out text; None without any. The ranks share the documents."""
    ranks.meet(models.device(recipe))  # rank 0 writes the model
    policy, contract = models.load_policy(model, recipe), Contract.load(model)
    cut = min(recipe.ppo_init.ptx_max_length, Limits.of(recipe, policy).both)
    documents = [contract.document(row["text"])[:cut] for row in benchmarks.held_out_text(data, HELD_OUT)]
    pad = contract.tokenizer.pad_token_id
    found = ranks.gathered(benchmarks.text_losses(policy, ranks.share(documents), pad, recipe.runtime.max_tokens))
    tokens = sum(count for _, count in found)
    return sum(loss for loss, _ in found) / tokens if tokens else None
