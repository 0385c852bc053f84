"""Reward models from K-way rankings (Ouyang et al. 2022, section 3.5, eq. 1), on TRL's RewardTrainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from instructrl.trainers.losses import kwise_loss
from instructrl.trainers.rollout import length_batches, score_rewards
from instructrl.trainers.sampler import LengthBuckets
from instructrl.trainers.sharded_trainer import ShardedTrainer
from instructrl.trainers.sharding import as_forward, is_sharded
from instructrl.trainers.shares import batch_size, train_dataloader


@dataclass
class RankingCollator:
    """Rankings -> one batch: every completion a row, padded on the right.

    A ranking is {completion_ids: K lists of token ids, prompt included; ranks: K numbers, 1 is best, equal is a tie}.
    K may differ.

    Returns input_ids and attention_mask [sequences, length]; group [sequences], which ranking a sequence is of; rank
    [sequences].
    """

    pad_token_id: int

    def __call__(self, rankings: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = [torch.tensor(completion) for ranking in rankings for completion in ranking["completion_ids"]]
        sizes = torch.tensor([len(ranking["ranks"]) for ranking in rankings])
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "group": torch.arange(len(rankings)).repeat_interleave(sizes),
            "rank": torch.tensor([rank for ranking in rankings for rank in ranking["ranks"]]),
        }


class KWiseRewardTrainer(ShardedTrainer, RewardTrainer):
    """TRL's RewardTrainer on rankings: one forward pass a completion, all pairs of a prompt one batch element.

    Expanding a ranking into pairs would cost K (K - 1) passes instead of K, and shuffling the pairs makes the model
    overfit within one epoch, because each completion then gets K - 1 separate gradient updates (paper, 3.5).

    The paper leaves open what divides a prompt's loss where ties were dropped: here it is the number of pairs that
    remain. For K = 2 loss and gradient are TRL's own, `center_rewards_coefficient` included.

    Rows of `train_dataset` and `eval_dataset`: {completion_ids, ranks} as `RankingCollator` takes them, or {prompt,
    completions, ranks} as text, to which EOS is added. A completion above `args.max_length` is left out; so is a
    ranking without a pair.

    However a batch is cut into micro-batches, its gradient is that of the mean over its prompts.
    """

    loss_is_scaled_for_ga = True  # compute_loss divides by the prompts of the whole batch
    max_tokens = 1024
    """Padded tokens of a forward pass on a CPU, which gains nothing from larger ones: 1.8x faster than one pass."""

    def __init__(self, model, args: RewardConfig, train_dataset, processing_class, data_collator=None, **options: Any):
        data_collator = data_collator or RankingCollator(processing_class.pad_token_id)
        super().__init__(
            model, args, data_collator, train_dataset=train_dataset, processing_class=processing_class, **options
        )

    def _prepare_dataset(
        self, dataset: Dataset, processing_class: PreTrainedTokenizerBase, args: RewardConfig, dataset_name: str
    ) -> Dataset:
        if "completion_ids" not in dataset.column_names:
            dataset = dataset.map(tokenize, fn_kwargs={"tokenizer": processing_class})
        return dataset.map(shortened, fn_kwargs={"max_length": args.max_length}).filter(has_pair)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["completion_ids", "ranks"]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> LengthBuckets:
        rows = self.train_dataset if train_dataset is None else train_dataset
        lengths = [sum(map(len, completions)) for completions in rows["completion_ids"]]
        return LengthBuckets(lengths, batch_size(self), self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        return train_dataloader(self, self._get_train_sampler(), all_tied)

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        """Prompts of an optimizer step, over all its micro-batches and processes."""
        prompts = torch.tensor(sum(prompts_with_a_pair(batch) for batch in batch_samples), device=device)
        return self.accelerator.gather(prompts).sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        group, rank = inputs["group"], inputs["rank"]
        scores = self.scores(model, inputs["input_ids"], inputs["attention_mask"])  # [sequences]
        better, worse = untied_pairs(group, rank)
        loss = kwise_loss(scores, group, rank)
        if self.args.center_rewards_coefficient is not None:
            sizes = torch.bincount(group[better], minlength=len(group))[group[better]]
            centre = ((scores[better] + scores[worse]) ** 2 / sizes).sum() / len(group.unique())
            loss = loss + self.args.center_rewards_coefficient * centre
        if num_items_in_batch is not None:  # a share of the batch's mean; processes are averaged afterwards
            loss = loss * prompts_with_a_pair(inputs) / num_items_in_batch * self.accelerator.num_processes
        self._count(scores.detach(), better, worse, inputs["attention_mask"])
        return (loss, {"logits": scores[:, None]}) if return_outputs else loss

    def scores(self, model, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Each sequence's score: [sequences, length] twice -> [sequences].

        On a CPU sequences of like length go through the model together, so that little is spent on padding. One
        backward pass follows all the same: loss and gradient do not change.
        """
        lengths = attention_mask.sum(1).tolist()
        # One large pass is faster on a GPU, and all processes must make as many if they share the weights.
        whole = input_ids.device.type != "cpu" or is_sharded(self.model)
        batches = [list(range(len(lengths)))] if whole else length_batches(lengths, self.max_tokens)

        def read() -> Tensor:
            scores = []
            for rows in batches:
                longest = max(lengths[row] for row in rows)
                ids, mask = input_ids[rows, :longest], attention_mask[rows, :longest]
                scores.append(self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1))
            return torch.cat(scores)

        order = torch.tensor([row for rows in batches for row in rows], device=input_ids.device)
        return as_forward(model, self.model, read)[order.argsort()]

    def _count(self, scores: Tensor, better: Tensor, worse: Tensor, attention_mask: Tensor) -> None:
        """TRL's metrics, over pairs."""
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        margin, scores = scores[better] - scores[worse], scores.double()
        counts = len(margin) > 0  # else another process has these, too
        sums = [(margin > 0).sum(), margin.sum(), torch.tensor(len(margin)), scores.sum(), torch.tensor(len(scores))]
        own = torch.stack([one.to(scores) * counts for one in (*sums, attention_mask.sum())])
        ends = torch.stack([scores.min(), -scores.max()]) if counts else scores.new_full((2,), torch.inf)
        right, total, pairs, score, sequences, tokens = self.accelerator.reduce(own).tolist()
        least, most = self.accelerator.gather(ends[None]).min(0).values.tolist()
        for name, value in (
            ("accuracy", right / pairs),
            ("margin", total / pairs),
            ("min_reward", least),
            ("mean_reward", score / sequences),
            ("max_reward", -most),
        ):
            metrics[name].append(value)
        if mode == "train":
            self._total_train_tokens += int(tokens)
        metrics["num_tokens"] = [self._total_train_tokens]


def untied_pairs(group: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the pairs to compare: group [S], rank [S] -> better [pairs], worse [pairs]."""
    above = (group[:, None] == group[None, :]) & (rank[:, None] < rank[None, :])
    return above.nonzero(as_tuple=True)


def prompts_with_a_pair(batch: dict[str, Tensor]) -> int:
    """How many of a batch's prompts teach something."""
    return len(batch["group"][untied_pairs(batch["group"], batch["rank"])[0]].unique())


def all_tied(ranking: dict[str, Any]) -> dict[str, Any]:
    """The ranking without a pair."""
    return ranking | {"ranks": [1] * len(ranking["ranks"])}


def tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Text to ids: prompt and completion apart, EOS at the end."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completions = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in row["completions"]]
    return {"completion_ids": [[*prompt, *completion, tokenizer.eos_token_id] for completion in completions]}


def shortened(row: dict[str, Any], max_length: int | None) -> dict[str, Any]:
    """The ranking without completions longer than that."""
    kept = [i for i, ids in enumerate(row["completion_ids"]) if max_length is None or len(ids) <= max_length]
    return {key: [row[key][i] for i in kept] for key in ("completion_ids", "ranks")}


def has_pair(row: dict[str, Any]) -> bool:
    """Whether two completions are ranked differently: without, a ranking teaches nothing."""
    return len(set(row["ranks"])) > 1


def score(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], pad_token_id: int, max_tokens: int = 4096
) -> list[float]:
    """The reward model's score of every sequence of ids, prompt and response, EOS included.

    max_tokens: padded tokens a forward pass; a longer sequence goes alone.
    """
    model.eval()
    return score_rewards(model, sequences, pad_token_id=pad_token_id, max_tokens=max_tokens).tolist()
