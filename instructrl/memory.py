"""Whether the machine's memory has room for one more stage beside those that run. A GPU's memory is not looked at."""

import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress

from instructrl.failure import memory_limit

SECONDS = 1.0  # between two measurements


class Gauge:
    """The memory of stages' processes, with all that they start: resident bytes now, and at most."""

    def __init__(self) -> None:
        self.now: dict[int, int] = {}
        self.peak: dict[int, int] = {}
        self.measured = 0.0

    def measure(self, pids: Iterable[int]) -> None:
        """Measure, unless that was done within the last second. Pages that processes share count for each."""
        if time.monotonic() - self.measured < SECONDS:
            return
        self.measured = time.monotonic()
        self.now = {pid: resident(pid) for pid in pids}
        for pid, size in self.now.items():
            self.peak[pid] = max(size, self.peak.get(pid, 0))


def resident(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 if it has ended."""
    import psutil

    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                total += one.memory_info().rss
    return total


def available() -> int:
    """Bytes that can be had without swapping: of this machine's, and of what our control group may have."""
    import psutil

    free, limit = psutil.virtual_memory().available, memory_limit()
    return free if limit is None else min(free, max(0, limit - resident(os.getpid())))


def fits(needed: int, free: int, running: Iterable[tuple[int, int]], limit: int | None = None) -> bool:
    """Whether a stage has room beside others.

    Args:
        needed: bytes that it is expected to take.
        free: bytes that can be had now.
        running: of each other stage, bytes that it is expected to take, and those that it has by now.
        limit: bytes that all of them may take together.
    """
    others = [(max(expected, now), now) for expected, now in running]
    growth = sum(expected - now for expected, now in others)
    within = limit is None or sum(expected for expected, _ in others) + needed <= limit
    return needed + growth <= free and within


def expected(stage: str, inputs: Iterable[int], seen: Mapping[str, int], estimate: int | None) -> int:
    """Bytes that a stage will take at most: what it took in this run, for another job; else in an earlier run; else
    what the stages took together that it is made from, since it trains or samples from their models.

    Args:
        inputs: what those took; without what was made before that was measured.
        seen: stage -> what it took in this run.
    """
    return seen.get(stage) or estimate or sum(inputs)
