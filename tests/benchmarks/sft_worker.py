"""One trainer of `bench_sft.py`: TRL's SFTTrainer, ours in TRL's order of rows, or ours.

Started by the driver with {side, architecture, vocabulary, completion_only_loss, rounds}. The first turn loads.
"""

import random
import tempfile

import torch
from turns import Player, peak_mb

STEPS, BATCH = 6, 16
"""Optimizer steps a turn, and rows a step."""


def main() -> None:
    player = Player()
    torch.set_num_threads(1)
    player.wait()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(player, folder, **player.arguments)
        player.report(loaded_mb=peak_mb())
        player.wait()
        trainer.train()


def demonstrations(count: int, vocabulary: int, seed: int = 1) -> list[dict]:
    """Prompts of 8 to 80 tokens, and responses mostly short, some long: 24 on average."""
    rng, rows = random.Random(seed), []
    for _ in range(count):
        prompt, response = rng.randint(8, 80), 4 + min(int(rng.expovariate(1 / 20)), 76)
        ids = [rng.randrange(2, vocabulary) for _ in range(prompt + response)]
        rows.append({"input_ids": [*ids, 0], "completion_mask": [0] * prompt + [1] * (response + 1)})
    return rows


def build(player: Player, folder: str, side: str, architecture: str, vocabulary: int, completion_only_loss, rounds):
    import models
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from instructrl.stages.sft import FastSFTTrainer

    class Recording:
        """Keeps each step's loss, and counts real tokens."""

        losses: list[float] = []
        tokens = 0

        def training_step(self, model, inputs, num_items_in_batch=None):
            self.tokens += int(inputs["attention_mask"].sum())
            loss = super().training_step(model, inputs, num_items_in_batch)
            self.losses.append(loss.item())
            return loss

    class Ours(Recording, FastSFTTrainer):
        pass

    class SameOrder(Ours):
        def _get_train_sampler(self, train_dataset=None):
            return super(FastSFTTrainer, self)._get_train_sampler(train_dataset)

    class TRL(Recording, SFTTrainer):
        pass

    def facts() -> dict:
        said = {"losses": trainer.losses[-STEPS:], "tokens": trainer.tokens}
        trainer.tokens = 0
        return said

    steps = STEPS * (rounds + 2)  # one turn more than there are, so that none ends with training
    trainer = {"ours": Ours, "same_order": SameOrder, "trl": TRL}[side](
        model=models.policy(architecture, vocabulary, end_probability=1 / 20),
        args=SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            learning_rate=1e-3,
            completion_only_loss=completion_only_loss,
            max_length=None,
            activation_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(demonstrations(BATCH * steps, vocabulary)),
        processing_class=models.tokenizer(vocabulary),
        callbacks=[player.callback(STEPS, facts)],
    )
    return trainer


if __name__ == "__main__":
    main()
