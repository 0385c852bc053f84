"""Policies that PPO passes through, kept so that an evaluation sees where it goes too far (Gao et al. 2022,
arXiv 2210.10760): the proxy's reward keeps rising after the true one has begun to fall."""

import math
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from instructrl.config import PPO
from instructrl.stages.lora import merged_weights
from instructrl.stages.models import write_weights
from instructrl.trainers.actor_critic import network

FOLDER = "snapshots"


class Snapshots(TrainerCallback):
    """Writes weights and config of the policy to `snapshots/000004` and so on after some of the iterations.

    A run that goes on after a kill does so from a checkpoint no older than every complete snapshot that it will not
    write again: a step's snapshot is written before its checkpoint.

    Args:
        folder: the stage's folder.
        count: iterations to keep, spread evenly between the first and the last.
        total: iterations of the whole run.
        every: the state's steps an iteration.
    """

    def __init__(
        self, policy: PreTrainedModel | PeftModel, folder: Path, count: int, total: int, every: int = 1
    ) -> None:
        self.policy, self.folder, self.every = policy, folder / FOLDER, every
        self.iterations = spread(count, total)

    def on_step_end(self, args, state, control, **_):
        iteration, rest = divmod(state.global_step, self.every)
        if rest == 0 and iteration in self.iterations:
            weights = merged_weights(self.policy)  # all processes have parts of what is sharded
            if state.is_world_process_zero:
                write_weights(network(self.policy), self.folder / f"{iteration:06d}", weights)


def spread(count: int, total: int) -> list[int]:
    """`count` iterations that cut a run into equal parts: 3 of 16 are 4, 8 and 12. Fewer if it has not so many."""
    return sorted({round(part * total / (count + 1)) for part in range(1, count + 1)} - {0, total})


def iterations(section: PPO) -> int:
    """Rollouts of the whole run."""
    return math.ceil(section.total_episodes / section.batch_size)


def kept(folder: Path) -> dict[int, Path]:
    """{iteration: a folder that the stock Auto classes load}, of a stage's artifact."""
    return {int(path.name): path for path in sorted((folder / FOLDER).glob("[0-9]*"))}
