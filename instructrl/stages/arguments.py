"""A recipe's section as the arguments of a TRL trainer, with the fields that a recipe passes through."""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PreTrainedModel, TrainingArguments

from instructrl.config import SFT, Recipe, RewardModel
from instructrl.errors import UserError
from instructrl.stages import ranks
from instructrl.stages.models import device
from instructrl.trainers.muon import MuonAdamW, parameter_groups

OWNED = {  # field -> who sets it; {section} is sft, ppo_init or reward_model
    "learning_rate": "{section}.learning_rate",
    "lr_scheduler_type": "{section}.final_learning_rate_share",
    "lr_scheduler_kwargs": "{section}.final_learning_rate_share",
    "warmup_steps": "the paper's schedule, which has no warm-up",
    "num_train_epochs": "{section}.epochs",
    "per_device_train_batch_size": "{section}.batch_size and runtime.micro_batch_size",
    "per_device_eval_batch_size": "runtime.micro_batch_size",
    "gradient_accumulation_steps": "{section}.batch_size and runtime.micro_batch_size",
    "adam_beta2": "{section}.adam_beta2",
    "completion_only_loss": "{section}.completion_only_loss",
    "max_length": "data.max_prompt_tokens and data.max_response_tokens",
    "seed": "seed",
    "data_seed": "seed",
    "output_dir": "runtime.output_dir",
    "use_cpu": "runtime.device",
    "ddp_backend": "runtime.device",
    "fsdp": "runtime.sharding",
    "fsdp_config": "runtime.sharding",
    "deepspeed": "runtime.sharding",
    "activation_checkpointing": "runtime.gradient_checkpointing",
    "gradient_checkpointing": "runtime.gradient_checkpointing",
    "logging_steps": "runtime.logging_steps",
    "logging_strategy": "runtime.logging_steps",
    "save_steps": "runtime.save_minutes",
    "save_strategy": "runtime.save_minutes",
    "save_total_limit": "runtime.save_minutes",
    "resume_from_checkpoint": "the stage, which resumes by itself",
    "push_to_hub": "nobody: artifacts stay on this machine",
}


def trainer_arguments(kind: type[TrainingArguments], recipe: Recipe, section: str, folder: Path) -> TrainingArguments:
    """TRL's config from a section of the recipe: a cosine from the peak, no warm-up, no weight decay.

    Args:
        kind: SFTConfig or RewardConfig.
        section: sft, ppo_init or reward_model; its `trainer` mapping adds to and overrides what the recipe has no
            key for.
        folder: where checkpoints go.

    Raises:
        UserError: as `check_trainer`.
    """
    check_trainer(kind, recipe, section)
    settings, runtime = getattr(recipe, section), recipe.runtime
    processes = ranks.count()
    if settings.batch_size % processes:
        raise UserError(f"{section}.batch_size={settings.batch_size} cannot be shared by {processes} processes.")
    share = settings.batch_size // processes
    micro = largest_divisor(share, runtime.micro_batch_size)
    where = device(recipe)
    defaults = {"weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": runtime.bf16, "report_to": []}
    found = kind(
        output_dir=str(folder),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": settings.final_learning_rate_share},
        warmup_steps=0,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        per_device_eval_batch_size=runtime.micro_batch_size,
        gradient_accumulation_steps=share // micro,
        adam_beta2=settings.adam_beta2,
        max_length=None,  # what is too long is dropped and counted before
        seed=recipe.seed,
        use_cpu=where.type == "cpu",
        ddp_backend="gloo" if where.type == "cpu" and processes > 1 else None,
        activation_checkpointing=runtime.gradient_checkpointing,
        gradient_checkpointing=runtime.gradient_checkpointing,
        logging_steps=runtime.logging_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number must be seen
        save_strategy="no",  # checkpoints.train saves by time
        save_total_limit=2,
        disable_tqdm=True,
        dataloader_pin_memory=where.type == "cuda",
        **defaults | settings.trainer,
    )
    found._n_gpu = min(found.n_gpu, 1)  # DataParallel would multiply the recipe's batch by the GPUs it sees
    return found


def optimizer(model: PreTrainedModel, settings: SFT | RewardModel) -> MuonAdamW | None:
    """Muon and AdamW if the section has a rate for Muon; None: Trainer makes AdamW."""
    if settings.muon_learning_rate is None:
        return None
    groups = parameter_groups(model, settings.learning_rate, settings.muon_learning_rate)
    return MuonAdamW(groups, betas=(0.9, settings.adam_beta2))


def counted(dropped: Mapping[str, int]) -> str:
    """What was dropped and why, for a sentence."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none"


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is no larger than `at_most`."""
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)


def check_trainer(kind: type[TrainingArguments], recipe: Recipe, section: str) -> None:
    """Check the recipe's `trainer` mapping against the fields of TRL's config.

    Raises:
        UserError: a field that does not exist, is of another type, or is set by a key of the recipe.
    """
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    hints = typing.get_type_hints(kind)
    for name, value in getattr(recipe, section).trainer.items():
        key = f"{section}.trainer.{name}"
        if name not in fields:
            close = difflib.get_close_matches(name, sorted(fields), n=1)
            right = f"{section}.trainer.{close[0]}" if close else ""
            if close and close[0] in OWNED:
                right = OWNED[close[0]].format(section=section)
            meant = f" Did you mean {right}?" if right else ""
            raise UserError(f"{key}: TRL's {kind.__name__} has no field '{name}'.{meant}")
        if name in OWNED:
            raise UserError(f"{key} is set by {OWNED[name].format(section=section)}; leave it out here.")
        problem = type_problem(value, hints[name])
        if problem:
            raise UserError(f"{key}={value!r}: {problem}.")


def type_problem(value: Any, hint: Any) -> str | None:
    """Why the value is not of the type, or None."""
    try:
        TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        return error.errors()[0]["msg"].lower()
    return None
