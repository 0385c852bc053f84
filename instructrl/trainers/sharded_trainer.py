"""What a Trainer does otherwise with a model that `sharding.shard` was given."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from instructrl.trainers.actor_critic import load_weights
from instructrl.trainers.sharding import is_sharded, part_of_state, unsharded, whole, whole_state, whole_weights


class ShardedTrainer:
    """To be named before a Trainer, which it leaves as it is for a model that is not sharded.

    The model, or its parts as PPO's policy and critic, must be sharded before Trainer's `__init__`.
    """

    model: nn.Module

    @property
    def sharded(self) -> bool:
        return holds_sharded(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not holds_sharded(model):  # else it is there
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if not self.sharded:
            return super()._wrap_model(model, *args, **options)
        # Autocast, but no DDP: accelerate then takes the model for prepared.
        return self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with unsharded(self.model):
            return super().evaluate(*args, **options)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        return whole(super()._get_grad_norm(model, grad_norm))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.sharded:
            self._save(output_dir)  # on every process, not on rank 0 alone
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, whole_weights(self.model) if self.sharded else state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.sharded:  # in place of rank 0's part
            state = whole_state(self.optimizer.state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.sharded or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(part_of_state(saved, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def holds_sharded(model: nn.Module) -> bool:
    """Whether the model is sharded, or its parts are."""
    return any(map(is_sharded, (model, *model.children())))
