"""What a Trainer does otherwise with a model that `sharding.shard` was given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from instructrl.trainers.actor_critic import load_weights
from instructrl.trainers.sharding import (
    engine_of,
    is_sharded,
    part_of_state,
    unsharded,
    whole,
    whole_state,
    whole_weights,
    zero_stage,
)


class ShardedTrainer:
    """To be named before a Trainer, which it leaves as it is for a model that is not sharded.

    The model, or its parts as PPO's policy and critic, must be sharded before Trainer's `__init__`.
    """

    model: nn.Module
    zero: Any = None  # the optimizer that DeepSpeed shares

    @property
    def sharded(self) -> bool:
        """Whether each process has a part of the weights."""
        return any(map(is_sharded, self.networks))

    @property
    def in_step(self) -> bool:
        """Whether all processes must make equally many backward passes: each sends what it gives away."""
        return self.sharded or any(zero_stage(network) > 1 for network in self.networks)

    @property
    def networks(self) -> Sequence[nn.Module]:
        """What is trained: the model, or PPO's policy and critic."""
        return networks(self.model)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        if not any(map(is_sharded, networks(model))):  # else it is there
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **options: Any) -> nn.Module:
        shares_optimizer = training and zero_stage(self.networks[0])
        if not self.sharded and not shares_optimizer:
            return super()._wrap_model(model, training, *args, **options)
        # Autocast, but no DDP: accelerate then takes the model for prepared.
        prepared = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        if shares_optimizer:
            self.start_zero()
        return engine_of(prepared) or prepared if training else prepared

    def start_zero(self) -> None:
        """Put DeepSpeed's engines around what is trained."""
        from instructrl.trainers.zero import ZeroOptimizer

        args, stage = self.args, zero_stage(self.networks[0])
        self.zero = ZeroOptimizer(self.optimizer, self.networks, stage, args.bf16, args.max_grad_norm or 0.0)
        self.optimizer = self.zero

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        with unsharded(self.model):
            return super().evaluate(*args, **options)

    def clipped(self) -> list[Tensor]:
        """Clip each network's gradients by itself -> their norms before. With DeepSpeed, the step is done, too."""
        if self.zero:
            return self.zero.clip_and_step()
        return [whole(clip_grad_norm_(network.parameters(), self.args.max_grad_norm)) for network in self.networks]

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return self.clipped()[0] if self.zero else whole(super()._clip_grad_norm(model))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | None = None) -> Tensor | float:
        if self.zero:  # whose step is done while gradients are clipped
            return self._clip_grad_norm(model) if grad_norm is None else grad_norm
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
        if self.sharded or self.zero:  # in place of rank 0's part
            state = self.zero.whole_state() if self.zero else whole_state(self.optimizer.state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir) / OPTIMIZER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.sharded:
            load_weights(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not (self.sharded or self.zero) or checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        self.optimizer.load_state_dict(saved if self.zero else part_of_state(saved, self.optimizer))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))


def networks(model: nn.Module) -> Sequence[nn.Module]:
    """What of a model is sharded by itself."""
    return getattr(model, "networks", (model,))
