"""Losses, gradient norms and weights that are nan or infinite: training stops at the first and says which rows it read.

Nothing can be learnt from a nan, and Adam's moments never forget one. Trainer itself goes on.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from instructrl.errors import StageFailed
from instructrl.trainers.sharding import local

SHOWN = 12  # rows of a table in a message


@dataclass(frozen=True)
class Rows:
    """Where rows of the training set come from: `numbers[i]` is the row of the table that the i-th one was made of."""

    table: Path
    numbers: Sequence[int]
    """From 0."""


class Watch:
    """Looks at the loss and the gradient norm of every optimizer step, before the step (after it with DeepSpeed, which
    leaves a network as it was if its norm is not finite).

    A GPU computes behind the program: its numbers are copied without waiting for them and looked at once they are
    there, so that training never waits. There the stop comes a step or two late; weights that are not finite are
    never saved either way (`check_finite`), and a checkpoint waits for all numbers before it counts.

    Args:
        tables: what the training set is made of, one table after the other.
        checkpoint: where the last complete checkpoint is; called only for the message.
    """

    def __init__(self, trainer: Trainer, tables: Sequence[Rows], checkpoint: Callable[[], str | None]) -> None:
        self.trainer, self.tables, self.checkpoint = trainer, tables, checkpoint
        self.training_step, self.get_grad_norm = trainer.training_step, trainer._get_grad_norm
        self.losses: list[Tensor] = []
        self.copies: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()
        # GradScaler skips the steps of infinite gradients by itself
        self.scaled = trainer.accelerator.scaler is not None

    def step(self, *args: Any, **kwargs: Any) -> Tensor:
        """In the place of `Trainer.training_step`."""
        loss = self.training_step(*args, **kwargs)
        self.losses.append(loss)
        return loss

    def norm(self, *args: Any, **kwargs: Any) -> Tensor | float:
        """In the place of `Trainer._get_grad_norm`, which is called once an optimizer step, before it."""
        norm = self.get_grad_norm(*args, **kwargs)
        values = self.losses if self.scaled else [*self.losses, torch.as_tensor(norm, device=self.losses[0].device)]
        self.look(self.trainer.state.global_step + 1, values)
        self.losses = []
        return norm

    def look(self, step: int, values: list[Tensor]) -> None:
        """values: losses of the micro-batches, then the gradient norm; scalars."""
        if values[0].device.type != "cuda":
            self.check(step, [float(value) for value in values])
            return
        copy = torch.stack([value.float() for value in values]).to("cpu", non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.copies.append((step, copy, arrived))
        self.settle(wait=False)

    def settle(self, wait: bool) -> None:
        """Look at the copies that have arrived; with `wait`, at all."""
        while self.copies and (wait or self.copies[0][2].query()):
            step, copy, arrived = self.copies.popleft()
            arrived.synchronize()
            self.check(step, copy.tolist())

    def check(self, step: int, values: list[float]) -> None:
        if all(map(math.isfinite, values)):
            return
        losses = values if self.scaled else values[:-1]
        bad = [value for value in losses if not math.isfinite(value)]
        what = f"the loss is {bad[0]}" if bad else f"the gradient's norm is {values[-1]}"
        folder = self.checkpoint()
        last = f"The last good checkpoint is {folder}." if folder else "There is no checkpoint yet."
        known = sum(len(table.numbers) for table in self.tables)
        rows = batch_rows(self.trainer, step) if known else []
        told = [str(diverged(what, step)), sources(self.tables, rows), last]
        raise StageFailed(" ".join(filter(None, told)))


@contextmanager
def watched(trainer: Trainer, tables: Sequence[Rows], checkpoint: Callable[[], str | None]) -> Iterator[Watch]:
    """The trainer stops at the first loss or gradient norm that is not finite.

    Raises:
        StageFailed: with the step, the rows of its batch and the last good checkpoint.
    """
    watch = Watch(trainer, tables, checkpoint)
    trainer.training_step, trainer._get_grad_norm = watch.step, watch.norm
    try:
        yield watch
        watch.settle(wait=True)
    finally:
        del trainer.training_step, trainer._get_grad_norm


def batch_rows(trainer: Trainer, step: int) -> list[int]:
    """The rows of the training set that an optimizer step reads, over all processes. Counted only once it is asked for:
    the samplers here are functions of seed and epoch.

    Args:
        step: from 1.
    """
    if hasattr(trainer, "batch_rows"):
        return trainer.batch_rows(step)
    args, sampler = trainer.args, trainer._get_train_sampler()
    if not hasattr(sampler, "set_epoch"):
        return []
    size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epoch, number = divmod(step - 1, math.ceil(len(sampler) / size))
    sampler.set_epoch(epoch)
    return list(sampler)[number * size : (number + 1) * size]


def sources(tables: Sequence[Rows], rows: Sequence[int]) -> str:
    """`Its batch: rows 3, 17 of data/demonstrations.train.parquet (the first row is 0).`, or "" if it is not known."""
    told, first = [], 0
    for table in tables:
        found = sorted({table.numbers[row - first] for row in rows if first <= row < first + len(table.numbers)})
        first += len(table.numbers)
        if found:
            more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            told.append(f"row{'s' * (len(found) > 1)} {', '.join(map(str, found[:SHOWN]))}{more} of {table.table}")
    return f"Its batch: {'; '.join(told)} (the first row is 0)." if told else ""


def check_finite(model: torch.nn.Module, step: int) -> None:
    """Never save weights from which nothing can be learnt any more. (Frozen ones are as they were.)

    Raises:
        StageFailed: a weight is nan or infinite.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(local(parameter)).all():
            raise diverged(f"{name} is not finite", step)


def diverged(what: str, step: int) -> StageFailed:
    return StageFailed(f"training diverged: {what} at step {step}; lower the learning rate.")
