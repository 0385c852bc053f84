"""Work on several CPU cores where torch's own threads do not help: models so small that Python is the bottleneck."""

import multiprocessing
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

_work: Callable[[Any], Any] | None = None  # set before forking, so that closures need no pickling
_items: list[Any] = []


def forked(work: Callable[[Any], Any], items: Iterable[Any], processes: int, device: torch.device) -> list[Any]:
    """`[work(item) for item in items]`, in so many forked processes.

    Each forked process sees the models that are loaded already, without copying them. Only results travel, pickled.
    Work is done here, in order, where forking would not help or is not safe: one process, one item, a model on an
    accelerator, or torch with several threads (https://pytorch.org/docs/stable/notes/multiprocessing.html).
    Results must not depend on what ran before in the same process, so `work` seeds its own generators.
    """
    global _work, _items
    items = list(items)
    if min(processes, len(items)) < 2 or device.type != "cpu" or torch.get_num_threads() > 1:
        return [work(item) for item in items]
    _work, _items = work, items
    try:
        with ProcessPoolExecutor(min(processes, len(items)), multiprocessing.get_context("fork")) as pool:
            return list(pool.map(_call, range(len(items))))
    finally:
        _work, _items = None, []


def _call(number: int) -> Any:
    assert _work is not None
    return _work(_items[number])
