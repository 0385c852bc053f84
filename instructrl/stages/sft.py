"""Supervised fine-tuning on demonstrations: TRL's SFTTrainer with the paper's settings (3.5, App. C.1)."""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, disable_progress_bars
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, set_seed
from trl import SFTConfig, SFTTrainer

from instructrl.config import SFT, Recipe
from instructrl.errors import UserError
from instructrl.stages import base_model, lora, models, ranks
from instructrl.stages.arguments import check_trainer, counted, optimizer, trainer_arguments
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.divergence import Rows
from instructrl.stages.tables import read_table
from instructrl.trainers.actor_critic import network
from instructrl.trainers.rollout import length_batches
from instructrl.trainers.sampler import LengthBuckets
from instructrl.trainers.sharded_trainer import ShardedTrainer
from instructrl.trainers.sharding import as_forward, is_sharded, shard
from instructrl.trainers.shares import batch_size, train_dataloader


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the policy to `folder/model`. Returns and raises as `fine_tune`."""
    return fine_tune(name, recipe, inputs, folder)


Draw = Callable[[Contract, Limits, int], list[dict]]
"""(contract, limits, number of demonstrations) -> pretraining documents, as rows like those of `encode`, their numbers
in `text.train.parquet`."""


def fine_tune(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path, draw: Draw | None = None) -> dict:
    """Train the base model on the demonstrations as the recipe's section `name` says, and write it to `folder/model`.

    Args:
        draw: the documents to mix in among the demonstrations.

    Returns:
        demonstrations, documents (if `draw`), dropped (reason -> rows), contract (as it tells of itself), steps,
        train_loss; valid_loss and valid_accuracy (of the next token) where there are held-out demonstrations.

    Raises:
        UserError: the model cannot be loaded, a response is empty, or no demonstration is short enough.
    """
    disable_progress_bars()
    section: SFT = getattr(recipe, name)
    path = base_model.path_of(inputs, recipe)
    tokenizer = models.load_tokenizer(path, recipe)
    model = models.load_base(path, recipe)
    contract = models.contract_of(path, tokenizer, recipe)
    models.fit(model, contract)
    set_seed(recipe.seed)  # an adapter is drawn
    model = lora.adapted(model, recipe)
    limits = Limits.of(recipe, network(model))
    rows, dropped = encode(inputs["data"] / "demonstrations.train.parquet", contract, limits)
    held_out, _ = encode(inputs["data"] / "demonstrations.valid.parquet", contract, limits)
    if not rows:
        raise UserError(f"{name} has no demonstration left; dropped: {counted(dropped)}.")
    documents = draw(contract, limits, len(rows)) if draw else []

    args = arguments(recipe, folder / FOLDER, name)
    if ranks.share_more(recipe):
        shard(model, args.device, recipe.runtime.sharding)
    trainer = FastSFTTrainer(
        model=model,
        args=args,
        train_dataset=dataset(rows + documents),
        eval_dataset=dataset(held_out) if held_out else None,
        processing_class=tokenizer,
        optimizers=(optimizer(model, section), None),
    )
    tables = [
        Rows(inputs["data"] / table, [row["number"] for row in of])
        for table, of in (("demonstrations.train.parquet", rows), ("text.train.parquet", documents))
    ]
    with residual_dropout(network(model), section.residual_dropout, name):
        train_loss = train(trainer, folder, recipe.runtime.save_minutes, tables)
    metrics = {
        "demonstrations": len(rows),
        **({"documents": len(documents)} if draw else {}),
        "dropped": dict(dropped),
        "contract": contract.told(),
        "steps": trainer.state.global_step,
        "train_loss": train_loss,
    }
    if held_out:
        result = trainer.evaluate()
        metrics |= {"valid_loss": result["eval_loss"], "valid_accuracy": result["eval_mean_token_accuracy"]}
    lora.save(model, contract, folder / "model", base_model.identity(inputs, recipe))
    return metrics


def check(recipe: Recipe) -> None:
    """Refuse fields in `sft.trainer` that TRL's SFTConfig does not have, before anything trains."""
    check_trainer(SFTConfig, recipe, "sft")


def arguments(recipe: Recipe, checkpoints: Path, name: str = "sft") -> SFTConfig:
    """TRL's config. The loss is on the response only if the recipe says so: the paper does not tell."""
    arguments = trainer_arguments(SFTConfig, recipe, name, checkpoints)
    arguments.completion_only_loss = getattr(recipe, name).completion_only_loss
    return arguments


def encode(path: Path, contract: Contract, limits: Limits) -> tuple[list[dict], Counter]:
    """(rows for TRL, why the others were dropped).

    A row is `input_ids`, prompt and response joined, `completion_mask`, 1 on the response's tokens, EOS included, and
    its `number` in the table, from 0.

    Raises:
        UserError: a response is empty.
    """
    rows, dropped = [], Counter()
    for number, row in enumerate(read_table(path), 1):
        if not row["response"].strip():
            raise UserError(f"demonstration {number} has an empty response; its prompt is {row['prompt'][:60]!r}.")
        prompt = contract.prompt(row["prompt"], limits.prompt)
        response = contract.response(row["response"], limits.response)
        problem = limits.problem(prompt, response)
        if problem:
            dropped[problem] += 1
        else:
            rows.append(joined(prompt, response) | {"number": number - 1})
    return rows, dropped


def dataset(rows: list[dict]) -> Dataset:
    """What TRL trains on, of rows as `encode` makes them."""
    return Dataset.from_list([{key: row[key] for key in ("input_ids", "completion_mask")} for row in rows])


def joined(prompt: list[int], response: list[int]) -> dict[str, list[int]]:
    """The row that TRL trains on: `input_ids`, and `completion_mask`, 1 on the response's tokens."""
    return {"input_ids": prompt + response, "completion_mask": [0] * len(prompt) + [1] * len(response)}


def trained_on(row: dict[str, list[int]], completion_only: bool) -> list[int]:
    """Which tokens of a row TRL's loss counts, 1 or 0 each. Nothing predicts the first."""
    return [0, *(row["completion_mask"][1:] if completion_only else [1] * (len(row["input_ids"]) - 1))]


class FastSFTTrainer(ShardedTrainer, SFTTrainer):
    """TRL's SFTTrainer with rows of similar length in a batch and, on a CPU, a faster way to the same loss.

    TRL computes the unembedding in chunks over all tokens, prompts included, and again in the backward pass, to save
    memory. Here it is computed once, and only for tokens that count; and a CPU reads rows of like length together.
    """

    max_tokens = 1024
    """Padded tokens a forward pass: a CPU gains nothing from more."""

    # Their logits are the unembedding of the trunk's output, with nothing in between.
    PLAIN = frozenset({"gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3"})

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthBuckets:
        rows = self.train_dataset if train_dataset is None else train_dataset
        return LengthBuckets([len(ids) for ids in rows["input_ids"]], batch_size(self), self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1 or self.args.packing:
            return super().get_train_dataloader()
        return train_dataloader(self, self._get_train_sampler(), unlabelled)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """All rows on every process: the loss is a mean over batches, and other batches would make it another one."""
        loader = super().get_eval_dataloader(eval_dataset)
        shard = loader.batch_sampler
        if isinstance(shard, BatchSamplerShard):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def evaluation_loop(self, *args, **options):
        self.gather_function = lambda losses: self.accelerator.gather_for_metrics(losses)[: len(losses)]  # one's own
        return super().evaluation_loop(*args, **options)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        plain = self.model.config.model_type in self.PLAIN and self.args.loss_type == "nll"
        plain = plain and "attention_mask" in inputs and not self.args.bf16  # packed rows have no mask
        if return_outputs or not plain or self.model.device.type != "cpu" or self.label_smoother is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inner = network(self.model)

        def predict() -> tuple[Tensor, Tensor]:
            hidden, targets = labelled(inner, inputs, math.inf if is_sharded(self.model) else self.max_tokens)
            return inner.get_output_embeddings()(hidden).float().log_softmax(-1), targets  # [tokens, vocabulary]

        logprobs, targets = as_forward(model, self.model, predict)
        self._count(logprobs.detach(), targets, inputs["attention_mask"])
        loss = F.nll_loss(logprobs, targets, reduction="sum")
        if num_items_in_batch is None:
            return loss / max(len(targets), 1)
        return loss / max(int(num_items_in_batch), 1) * self.args.world_size  # gradients are averaged over processes

    def _count(self, logprobs: Tensor, targets: Tensor, attention_mask: Tensor) -> None:
        """TRL's metrics: the mean entropy of the next token, and how often the likeliest one is right."""
        mode = "train" if self.model.training else "eval"
        entropy, right = -(logprobs.exp() * logprobs).sum(), (logprobs.argmax(-1) == targets).sum()
        tokens = attention_mask.sum() * bool(len(targets))  # a row without a label is another process's
        sums = torch.stack([entropy.double(), right.double(), tokens.double()])
        sums = torch.cat([sums, sums.new_tensor([len(targets)])])
        entropy, right, tokens, count = (self.accelerator.reduce(sums) if mode == "train" else sums).tolist()
        self._metrics[mode]["entropy"].append(entropy / max(count, 1))
        self._metrics[mode]["mean_token_accuracy"].append(right / max(count, 1))
        if mode == "train":
            self._total_train_tokens += int(tokens)
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def unlabelled(row: dict) -> dict:
    """The row without a token that counts."""
    return row | {"labels": [-100] * len(row["input_ids"])}


def labelled(model: PreTrainedModel, inputs: dict[str, Tensor], max_tokens: float) -> tuple[Tensor, Tensor]:
    """The trunk's output before each token that counts, and those tokens. Rows of like length are read together.

    inputs: input_ids, attention_mask, labels, each [rows, length], padded on the right; a label of -100 does not count.
    -> [tokens, width], [tokens]
    """
    lengths = inputs["attention_mask"].sum(1).tolist()
    hidden, targets = [], []
    for rows in length_batches(lengths, max_tokens):
        ids, mask, labels = (
            inputs[name][rows, : lengths[rows[0]]] for name in ("input_ids", "attention_mask", "labels")
        )
        counts = labels[:, 1:] != -100
        trunk = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        hidden.append(trunk.last_hidden_state[:, :-1][counts])
        targets.append(labels[:, 1:][counts])
    return torch.cat(hidden), torch.cat(targets)


@contextlib.contextmanager
def residual_dropout(model: PreTrainedModel, share: float, name: str = "sft") -> Iterator[None]:
    """Drop that share of each attention's and MLP's output before it joins the residual stream (App. C.1).

    GPT-2 has dropout layers there; they get this share, and their own back at the end. Llama and its relatives have
    none: hooks do it. Neither leaves a trace in the saved model.

    Raises:
        UserError: an architecture of another form, and the share is not 0.
    """
    own = residual_dropout_layers(model)
    branches = [] if own else residual_branches(model)
    if share and not own and not branches:
        raise UserError(
            f"{name}.residual_dropout={share}: the residual stream of a {model.config.model_type} model is not known "
            f"here; set {name}.residual_dropout=0."
        )
    before = [layer.p for layer in own]
    for layer in own:
        layer.p = share
    hooks = [branch.register_forward_hook(dropout_hook(share)) for branch in branches if share]
    try:
        yield
    finally:
        for layer, p in zip(own, before, strict=True):
            layer.p = p
        for hook in hooks:
            hook.remove()


def residual_dropout_layers(model: PreTrainedModel) -> list[nn.Dropout]:
    """The model's own dropout layers on residual branches: GPT-2's and GPT-NeoX's."""
    if model.config.model_type == "gpt2":
        return [layer for block in model.base_model.h for layer in (block.attn.resid_dropout, block.mlp.dropout)]
    if model.config.model_type == "gpt_neox":
        layers = model.base_model.layers
        return [dropout for layer in layers for dropout in (layer.post_attention_dropout, layer.post_mlp_dropout)]
    return []


def residual_branches(model: PreTrainedModel) -> list[nn.Module]:
    """The attentions and MLPs of Llama and its relatives, whose output is added to the residual stream as it is."""
    if model.config.model_type not in ("llama", "mistral", "qwen2", "qwen3"):
        return []
    return [branch for layer in model.base_model.layers for branch in (layer.self_attn, layer.mlp)]


def dropout_hook(share: float):
    """A forward hook that drops from the output, or from the first of several outputs."""

    def hook(module: nn.Module, arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
        if isinstance(output, tuple):
            return (F.dropout(output[0], share, module.training), *output[1:])
        return F.dropout(output, share, module.training)

    return hook
