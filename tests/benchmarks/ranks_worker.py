"""One process of `bench_ranks.py`: a trainer of a stage, alone or as one of two ranks.

Started by the driver with {side, stage, size, rank, ranks, port, rounds, weights}. The first turn loads; the last one
leaves the weights in the file `weights`.
"""

import os
import random
import tempfile
import time

from turns import Player, peak_mb

VOCABULARY = 4096  # as reward_worker has
STEPS = {"small": 8, "large": 2}
"""Optimizer steps a turn; of PPO an iteration is `MINIBATCHES` of them."""
MINIBATCHES = 2
BATCH = {"sft": 16, "reward_model": 8, "ppo_ptx": 16}
"""Demonstrations, rankings of 4, or episodes, a step of both processes together."""


def main() -> None:
    player = Player()
    arguments = player.arguments
    if arguments["ranks"] > 1:
        where = {"RANK": "rank", "LOCAL_RANK": "rank", "WORLD_SIZE": "ranks", "MASTER_PORT": "port"}
        os.environ |= {name: str(arguments[key]) for name, key in where.items()} | {"MASTER_ADDR": "127.0.0.1"}
    import torch

    torch.set_num_threads(1)
    player.wait()
    with tempfile.TemporaryDirectory() as folder:
        trainer, model = Trainers(player, folder).of(arguments["stage"])
        held = sum(local(weight).numel() for weight in model.parameters())
        parameters = sum(weight.numel() for weight in model.parameters())
        player.report(loaded_mb=peak_mb(), held=held, parameters=parameters)
        player.wait()
        trainer.train()


def local(tensor):
    from instructrl.trainers import sharding

    return sharding.local(tensor)


class Trainers:
    """The trainer of each stage, and the model whose weights are compared."""

    def __init__(self, player: Player, folder: str):
        import models

        self.player, self.turn, self.asked = player, 0, player.arguments
        self.size = models.Size(**self.asked["size"])
        self.sharding = self.asked["side"] if self.asked["side"] not in ("one", "ddp") else "none"
        self.steps = STEPS["small" if self.size.layers == 2 else "large"]
        total = self.steps * (self.asked["rounds"] + 2)  # a turn more than there are, so that none ends with training
        self.total = total
        self.common = {
            "output_dir": folder,
            "learning_rate": 1e-4,
            "activation_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "ddp_backend": "gloo" if self.asked["ranks"] > 1 else None,
            "report_to": [],
            "save_strategy": "no",
            "disable_tqdm": True,
        }

    def of(self, stage: str):
        return getattr(self, stage)()

    def sft(self):
        import models
        from datasets import Dataset
        from sft_worker import demonstrations
        from trl import SFTConfig

        from instructrl.stages.sft import FastSFTTrainer

        model = models.policy("gpt2", VOCABULARY, end_probability=1 / 20, size=self.size)
        share = BATCH["sft"] // self.asked["ranks"]
        args = SFTConfig(
            per_device_train_batch_size=share, max_length=None, completion_only_loss=True, **self.stepwise()
        )
        rows = Dataset.from_list(demonstrations(BATCH["sft"] * self.total, VOCABULARY))
        return self.made(FastSFTTrainer, model, args, rows)

    def reward_model(self):
        import models
        from datasets import Dataset
        from reward_worker import comparisons
        from trl import RewardConfig

        from instructrl.trainers.ranking import KWiseRewardTrainer

        model = models.scorer("gpt2", VOCABULARY, seed=0, size=self.size)
        share = BATCH["reward_model"] // self.asked["ranks"]
        args = RewardConfig(per_device_train_batch_size=share, max_length=None, **self.stepwise())
        rows = Dataset.from_list(comparisons(BATCH["reward_model"] * self.total, 4, seed=1))
        return self.made(KWiseRewardTrainer, model, args, rows)

    def stepwise(self) -> dict:
        return self.common | {"max_steps": self.total, "logging_steps": 1}

    def made(self, kind, model, args, rows):
        import models

        from instructrl.trainers.sharding import shard

        if self.sharding != "none":
            shard(model, args.device, self.sharding)
        callbacks = [self.player.callback(self.steps, self.facts)]
        tokenizer = models.tokenizer(VOCABULARY)
        self.trainer = kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks)
        self.model = model
        return self.trainer, model

    def ppo_ptx(self):
        import models

        from instructrl.trainers.ppo import PPOConfig, PPOTrainer

        episodes = BATCH["ppo_ptx"] * MINIBATCHES
        args = PPOConfig(
            batch_size=episodes,
            num_mini_batches=MINIBATCHES,
            total_episodes=episodes * self.total,
            response_length=48,
            ptx_coef=1.0,
            ptx_ratio=1.0,
            sharding=self.sharding,
            **self.common,
        )
        rng = random.Random(0)
        self.model = models.policy("gpt2", VOCABULARY, end_probability=1 / 24, size=self.size)
        self.trainer = PPOTrainer(
            args=args,
            processing_class=models.tokenizer(VOCABULARY),
            model=self.model,
            value_model=models.scorer("gpt2", VOCABULARY, seed=2, size=self.size),
            reward_model=models.scorer("gpt2", VOCABULARY, seed=1, size=self.size),
            train_dataset=[{"prompt_ids": ids} for ids in models.prompts(512, VOCABULARY, seed=3)],
            ptx_dataset=[{"input_ids": [rng.randrange(2, VOCABULARY) for _ in range(64)]} for _ in range(256)],
            callbacks=[self.player.callback(max(self.steps, args.steps_per_iteration), self.facts)],
        )
        return self.trainer, self.model

    def facts(self) -> dict:
        """Losses so far, and in the last turn weights: after the seconds have been taken."""
        found = {"seconds": time.perf_counter() - self.player.began}
        found |= {"cpu_seconds": time.process_time() - self.player.started}
        found |= {"losses": [line["loss"] for line in self.trainer.state.log_history if "loss" in line]}
        self.turn += 1
        if self.turn == self.asked["rounds"]:
            self.save()
            found["weights"] = self.asked["weights"]
        return found

    def save(self) -> None:
        from safetensors.torch import save_file

        from instructrl.trainers.sharding import is_sharded, whole_weights

        weights = whole_weights(self.model) if is_sharded(self.model) else dict(self.model.named_parameters())
        if self.asked["rank"] == 0:
            names = [name for name, _ in self.model.named_parameters()]  # a tied head once
            save_file({name: weights[name].detach().clone() for name in names}, self.asked["weights"])


if __name__ == "__main__":
    main()
