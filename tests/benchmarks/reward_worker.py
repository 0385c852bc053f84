"""One trainer of `bench_reward.py`: the K-wise trainer on rankings, or TRL's RewardTrainer on all their pairs.

Started by the driver with {side, k, rankings (a step), steps, rounds}. The first turn loads, the last one evaluates.
"""

import math
import random
import tempfile
from itertools import combinations

import torch
from turns import Player, peak_mb

VOCABULARY = 4096


def main() -> None:
    player = Player()
    torch.set_num_threads(1)
    player.wait()
    with tempfile.TemporaryDirectory() as folder:
        trainer, seen = build(player, folder, **player.arguments)
        player.report(loaded_mb=peak_mb())
        player.wait()
        trainer.train()
        seen = dict(seen)  # without what follows
        player.report(accuracy=accuracy(trainer.model, comparisons(300, 2, seed=2, noise=0.0)), **seen)


def comparisons(count: int, k: int, seed: int, noise: float = 1.0) -> list[dict]:
    """Rankings of K completions, made of 64 words, by how many good ones they have, with a labeler's noise on top."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        prompt = [rng.randrange(2, VOCABULARY) for _ in range(rng.randint(8, 80))]
        completions = [
            [rng.randrange(2, 66) for _ in range(4 + min(int(rng.expovariate(1 / 20)), 76))] for _ in range(k)
        ]
        scores = [
            sum(1 if word % 2 else -1 for word in words) / math.sqrt(len(words)) + rng.gauss(0, noise)
            for words in completions
        ]
        order = sorted(range(k), key=lambda i: -scores[i])
        ranks = [order.index(i) + 1 for i in range(k)]
        rows.append({"completion_ids": [[*prompt, *completion, 0] for completion in completions], "ranks": ranks})
    return rows


def pairs_of(rankings: list[dict]) -> list[dict]:
    """All pairs, as TRL takes them."""
    rows = []
    for ranking in rankings:
        for pair in combinations(zip(ranking["ranks"], ranking["completion_ids"], strict=True), 2):
            (_, better), (_, worse) = sorted(pair)
            rows.append({"chosen_ids": better, "rejected_ids": worse})
    return rows


def build(player: Player, folder: str, side: str, k: int, rankings: int, steps: int, rounds: int):
    import models
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    from instructrl.trainers.ranking import KWiseRewardTrainer

    rows = comparisons(rankings * steps, k, seed=1)
    if side == "ours":
        trainer_class, batch, accumulation = KWiseRewardTrainer, rankings, 1
    else:  # each of the K - 1 times as many sequences goes through a forward pass of the same size
        trainer_class, rows, batch, accumulation = RewardTrainer, pairs_of(rows), rankings * k // 2, k - 1
    model, seen = models.scorer("gpt2", VOCABULARY, seed=0), {"sequences": 0, "padded_tokens": 0}

    def count(module, arguments, named) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        seen["sequences"] += ids.shape[0]
        seen["padded_tokens"] += ids.numel()

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    args = RewardConfig(
        output_dir=folder,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        learning_rate=1e-3,
        activation_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=models.tokenizer(VOCABULARY),
        callbacks=[player.callback(steps // rounds)],
    )
    return trainer, seen


def accuracy(model, held_out: list[dict]) -> float:
    """The share of pairs whose better completion scores higher."""
    import models

    from instructrl.trainers.ranking import score

    sequences = [ids for row in held_out for ids in row["completion_ids"]]
    scores = iter(score(model, sequences, models.PAD))
    right = [(next(scores) > next(scores)) == (row["ranks"] == [1, 2]) for row in held_out]
    return sum(right) / len(right)


if __name__ == "__main__":
    main()
