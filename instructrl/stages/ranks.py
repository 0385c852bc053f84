"""The processes of a stage, its ranks, as `torch.distributed.run` has started them; one where it has not.

All compute, rank 0 alone writes.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from instructrl.config import Recipe
from instructrl.trainers.experience import interleave


def rank() -> int:
    """Which one this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def count() -> int:
    """How many there are, on all nodes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which one of its machine this is: the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def share_more(recipe: Recipe) -> bool:
    """Whether they share more than batches of what they train (`runtime.sharding`)."""
    return count() > 1 and recipe.runtime.sharding != "none"


def sharded(recipe: Recipe) -> bool:
    """Whether they share its weights."""
    return count() > 1 and recipe.runtime.sharding in ("fsdp", "zero3")


def share(items: Sequence[Any]) -> list[Any]:
    """This rank's part of the items: each rank takes every `count`-th."""
    return list(items[rank() :: count()])


def meet(device: torch.device) -> None:
    """Wait for all others, however long they take."""
    if count() > 1:
        backend = "gloo" if device.type == "cpu" else None
        state = PartialState(cpu=device.type == "cpu", backend=backend, timeout=timedelta(days=7))
        state.wait_for_everyone()


def gathered(own: list[Any]) -> list[Any]:
    """What the ranks made of their shares, in the order of the items. Ranks must have met: a trainer did that."""
    return interleave(gather_object([own])) if count() > 1 else own
