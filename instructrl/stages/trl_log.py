"""The log of TRL's PPOTrainer as one of ours: the same names where they mean the same, and steps, lengths, seconds."""

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from instructrl.config import PPO
from instructrl.stages.checkpoints import Log

ITS_OWN = (  # TRL averages these over padding, too, or counts something else as clipped: not our numbers of that name
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "policy/entropy_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/ratio_var",
)


class Sampling:
    """A policy's `generate`, and since the last look: the tokens of its responses, and seconds."""

    def __init__(self, policy: PreTrainedModel, pad_token_id: int) -> None:
        self.generate, self.pad_token_id = policy.generate, pad_token_id
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        began = time.perf_counter()
        output = self.generate(input_ids=input_ids, **options)
        self.seconds += time.perf_counter() - began
        self.tokens += int((output.sequences[:, input_ids.shape[1] :] != self.pad_token_id).sum())
        return output

    def look(self) -> tuple[int, float]:
        """(tokens, seconds)"""
        seen, (self.tokens, self.seconds) = (self.tokens, self.seconds), (0, 0.0)
        return seen


@contextmanager
def counted_sampling(policy: PreTrainedModel, pad_token_id: int) -> Iterator[Sampling]:
    """The policy counts its responses' tokens, which TRL does not."""
    policy.generate = Sampling(policy, pad_token_id)
    try:
        yield policy.generate
    finally:
        del policy.generate


class TRLLog(Log):
    """Writes what TRL logs as our trainer logs it: optimizer steps as steps, the score before the penalty for a missing
    EOS, seconds. Numbers that do not mean ours keep their names under `trl/`."""

    def __init__(self, folder: Path, section: PPO, sampling: Sampling) -> None:
        super().__init__(folder)
        self.section, self.sampling = section, sampling
        self.steps = section.num_ppo_epochs * section.num_mini_batches
        self.lines: list[dict[str, float]] = []
        self.last = time.perf_counter()

    def on_train_begin(self, args, state, control, **_):
        super().on_train_begin(args, self.in_steps(state), control)

    def on_step_end(self, args, state, control, **_):
        super().on_step_end(args, self.in_steps(state), control)

    def on_log(self, args, state, control, logs=None, **_):
        line = self.translated(logs)
        self.lines.append(line)
        super().on_log(args, self.in_steps(state), control, logs=line)

    def in_steps(self, state: Any) -> Any:
        """TRL's state counts iterations, ours optimizer steps."""
        counted = copy.copy(state)
        counted.global_step, counted.max_steps = state.global_step * self.steps, state.max_steps * self.steps
        return counted

    def translated(self, logs: dict[str, float]) -> dict[str, float]:
        """A line of TRL's log as one of ours."""
        section, (tokens, rollout) = self.section, self.sampling.look()
        now, began = time.perf_counter(), self.last
        self.last = now
        unended = 1 - logs["val/num_eos_tokens"] / section.batch_size
        line = {(f"trl/{key}" if key in ITS_OWN else key): value for key, value in logs.items()}
        return line | {
            "loss": logs["loss/policy_avg"] + section.vf_coef * logs["loss/value_avg"],
            "objective/scores": logs["objective/scores"] + section.missing_eos_penalty * unended,
            "completions/mean_length": tokens / section.batch_size,
            "seconds/rollout": rollout,
            "seconds/rest": now - began - rollout,
            "eps": section.batch_size / (now - began),
        }
