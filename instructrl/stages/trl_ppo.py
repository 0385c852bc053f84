"""TRL's own PPOTrainer in the place of ours (`backend: trl`), as it is: trl 1.12 has it, later versions do not.

Its arguments, an optimizer of the recipe's, and hooks on the models give it what the recipe asks for and TRL has no
setting for: two learning rates, the warm-up, gradient clipping, the reward's bias, a padding token that is never
sampled. What that cannot give is refused before anything trains (`check`). What stays TRL's, with the size of each
difference: `make parity`. Above all, the score is rewarded one token after EOS, and the critic learns a value there.
"""

import copy
import importlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from instructrl.config import PPO, Recipe
from instructrl.errors import UserError
from instructrl.stages import ranks
from instructrl.stages.arguments import largest_divisor
from instructrl.stages.checkpoints import FOLDER, LOG
from instructrl.stages.divergence import check_finite
from instructrl.stages.models import device
from instructrl.stages.trl_log import TRLLog, counted_sampling

VERSION = "1.12.0"
PASSED = (  # keys that TRL's PPOConfig has under the same name and with the same meaning
    "total_episodes",
    "num_mini_batches",
    "num_ppo_epochs",
    "kl_coef",
    "kl_estimator",
    "cliprange",
    "cliprange_value",
    "vf_coef",
    "gamma",
    "lam",
    "whiten_rewards",
    "temperature",
    "response_length",
    "missing_eos_penalty",
)
LACKS = {  # key -> the only value that TRL can follow, and why
    "ptx_coef": (0.0, "has no pretraining loss"),
    "whiten_advantages": (True, "always whitens advantages"),
    "kl_target": (None, "keeps the coefficient of the KL penalty fixed"),
    "missing_eos_score": (None, "can only subtract missing_eos_penalty"),
    "final_learning_rate_share": (1.0, "keeps learning rates after the warm-up"),
    "ema_every": ("iteration", "tells of no single steps"),
}
NEVER = -1e4  # a logit whose probability is 0; minus infinity would make TRL's entropy nan


def trl_ppo() -> ModuleType:
    """`trl.experimental.ppo`.

    Raises:
        UserError: this trl has none.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        return importlib.import_module("trl.experimental.ppo")
    except ModuleNotFoundError:
        raise UserError(
            f"backend=trl needs TRL's PPOTrainer, which trl {trl.__version__} no longer has: install "
            f"trl=={VERSION}, or set backend=instructrl."
        ) from None


def check(name: str, recipe: Recipe) -> None:
    """Refuse what TRL's PPOTrainer cannot do. `name` is the recipe's section.

    Raises:
        UserError: this trl has no PPOTrainer, or it could not follow a key.
    """
    section: PPO = getattr(recipe, name)
    for key, (followed, why) in LACKS.items():
        if getattr(section, key) != followed:
            value = getattr(section, key)
            raise UserError(
                f"{name}.{key}={value}: TRL's PPOTrainer {why}; set {name}.{key}={followed}, or "
                f"{name}.backend=instructrl."
            )
    for key, on in (("model.lora", recipe.model.lora), ("runtime.bf16", recipe.runtime.bf16)):
        if on:
            raise UserError(f"{key} is for our own PPOTrainer, not for TRL's: set {name}.backend=instructrl.")
    micro_batches(name, recipe)
    if section.whiten_rewards and section.batch_size // section.num_mini_batches < 8:
        raise UserError(
            f"{name}.whiten_rewards=True: TRL's PPOTrainer whitens in minibatches of 8 episodes or more; lower "
            f"{name}.num_mini_batches={section.num_mini_batches}."
        )
    if max(ranks.count(), recipe.runtime.ranks) > 1:
        raise UserError(f"{name}.backend=trl runs in one process; use {name}.backend=instructrl with several.")
    try:
        trl_ppo()
    except UserError as error:
        raise UserError(f"{name}.{error}") from None


def micro_batches(name: str, recipe: Recipe) -> tuple[int, int]:
    """(episodes a forward pass may have within `runtime.max_tokens`, micro-batches an iteration is cut into).

    Raises:
        UserError: a minibatch does not fit into one forward pass, and there are several of them. TRL counts
            micro-batches where it should count minibatches (https://github.com/huggingface/trl/issues/5645).
    """
    section: PPO = getattr(recipe, name)
    longest = recipe.data.max_prompt_tokens + section.response_length
    fit = max(1, recipe.runtime.max_tokens // longest)
    minibatch = section.batch_size // section.num_mini_batches
    if minibatch <= fit:
        return fit, 1
    if section.num_mini_batches == 1:
        return fit, section.batch_size // largest_divisor(section.batch_size, fit)
    raise UserError(
        f"{name}.backend=trl: a minibatch of {minibatch} episodes of up to {longest} tokens exceeds "
        f"runtime.max_tokens={recipe.runtime.max_tokens}, and TRL ignores num_mini_batches when it accumulates "
        f"gradients; set runtime.max_tokens={minibatch * longest} or {name}.num_mini_batches=1."
    )


def train(
    name: str,
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel,
    reward_bias: float,
    prompts: Sequence[dict[str, Any]],
    callbacks: Sequence[TrainerCallback] = (),
) -> list[dict[str, float]]:
    """Train policy and critic in place; `log.jsonl` and `progress.json` go to the folder.

    TRL cannot resume, so a run that was stopped starts again, and says so.

    Args:
        prompts: rows with `prompt_ids`.
        callbacks: their `on_step_end` is called once an iteration.

    Returns:
        The log, a line an iteration, in our trainer's names and meanings.

    Raises:
        UserError: as `check`.
        StageFailed: a loss or weight is not a number.
    """
    check(name, recipe)
    if (folder / LOG).exists():
        print("TRL's PPOTrainer cannot resume: it starts again from the beginning.", flush=True)
    pad = tokenizer.pad_token_id
    with plain_sampling(policy, pad):
        trainer = make_trainer(
            name, recipe, folder, tokenizer, policy, critic, reward_model, reward_bias, prompts, callbacks
        )
        with without_padding((policy, trainer.ref_model), pad), counted_sampling(policy, pad) as sampling:
            log = TRLLog(folder, getattr(recipe, name), sampling)
            trainer.add_callback(log)
            trainer.train()
    check_finite(trainer.model, log.steps * len(log.lines))
    return log.lines


def make_trainer(
    name: str,
    recipe: Recipe,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    critic: PreTrainedModel,
    reward_model: PreTrainedModel,
    reward_bias: float,
    prompts: Sequence[dict[str, Any]],
    callbacks: Sequence[TrainerCallback] = (),
) -> Any:
    """TRL's PPOTrainer with the recipe's settings. Arguments as for `train`."""
    section: PPO = getattr(recipe, name)
    fit, accumulation = micro_batches(name, recipe)
    ppo = trl_ppo()
    args = ppo.PPOConfig(
        output_dir=str(folder / FOLDER),
        per_device_train_batch_size=section.batch_size // accumulation,
        gradient_accumulation_steps=accumulation,
        local_rollout_forward_batch_size=min(section.batch_size, recipe.runtime.generation_batch_size, fit),
        stop_token="eos",
        num_sample_generations=0,
        seed=recipe.seed,
        use_cpu=device(recipe).type == "cpu",
        bf16=False,  # on by default, and ignored
        gradient_checkpointing=False,  # the same
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **{key: getattr(section, key) for key in PASSED},
    )
    if recipe.runtime.gradient_checkpointing:
        for model in (policy, critic):
            model.activation_checkpointing_enable()
    left = copy.deepcopy(tokenizer)
    left.padding_side = "left"  # TRL generates from the last column
    rows = [{"input_ids": list(row["prompt_ids"])} for row in prompts]
    set_seed(recipe.seed)  # TRL shuffles minibatches with numpy, which it does not seed
    optimizer = make_optimizer(section, policy, critic)
    trainer = ppo.PPOTrainer(
        args=args,
        processing_class=left,
        model=policy,
        ref_model=copy.deepcopy(policy).requires_grad_(False),
        reward_model=Shifted(reward_model, reward_bias).requires_grad_(False),
        value_model=Shifted(critic, reward_bias),
        # It drops the last batch of a pass that is not full, which may be the only one.
        train_dataset=Dataset.from_list(rows * math.ceil(section.batch_size / len(rows))),
        optimizers=(optimizer, warmup(optimizer, section.warmup_iterations)),
        callbacks=list(callbacks),
    )
    # Without this every micro-batch of a pass's last batch would be an optimizer step.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False
    return trainer


class Shifted(nn.Module):
    """A reward model or critic whose scores have the bias subtracted (App. C.2), in the form that TRL reads."""

    base_model_prefix = "trunk"

    def __init__(self, model: PreTrainedModel, bias: float) -> None:
        super().__init__()
        self.trunk, self.head, self.bias = model.base_model, model.score, bias

    def score(self, hidden: Tensor) -> Tensor:
        """[B, T, H] -> [B, T, 1]"""
        return self.head(hidden) - self.bias


def make_optimizer(section: PPO, policy: nn.Module, critic: nn.Module) -> torch.optim.AdamW:
    """As our trainer's: two learning rates, and policy and critic each clipped by itself before a step. TRL's never
    clips."""
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad], "lr": learning_rate}
        for model, learning_rate in ((policy, section.learning_rate), (critic, section.critic_learning_rate))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, section.adam_beta2), eps=1e-5, weight_decay=0.0)

    def clip(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            clip_grad_norm_(group["params"], section.max_grad_norm)

    optimizer.register_step_pre_hook(clip)
    return optimizer


def warmup(optimizer: torch.optim.Optimizer, iterations: int) -> LambdaLR:
    """From a tenth of the peak over the first iterations (App. C.4); TRL steps it once an iteration."""
    return LambdaLR(optimizer, lambda step: 0.1 + 0.9 * step / iterations if step < iterations else 1.0)


@contextmanager
def without_padding(models: Sequence[PreTrainedModel], pad_token_id: int) -> Iterator[None]:
    """The padding token has probability 0: TRL would end a response at a sampled one, and not count it as ended."""

    def hook(head: nn.Module, inputs: tuple, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor(pad_token_id, device=logits.device), NEVER)

    handles = [model.get_output_embeddings().register_forward_hook(hook) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_sampling(policy: PreTrainedModel, pad_token_id: int) -> Iterator[None]:
    """Sampling from the distribution that is scored: what a model's own generation config would add to TRL's (a
    repetition penalty) makes it another. TRL writes EOS into the config; afterwards the policy has its own again."""
    own = policy.generation_config
    policy.generation_config = GenerationConfig(pad_token_id=pad_token_id)
    try:
        yield
    finally:
        policy.generation_config = own
