"""Two trainers taking turns: each in a process of its own, so that peak memory is the operating system's own figure.

A worker trains one turn (an iteration of PPO, some steps of SFT), says what it took and waits for its next turn, while
the other one has the machine. Whatever else happens on it then slows both. Times are CPU seconds of the process and,
where a GPU computes, seconds by the clock.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).parents[2]


class Worker:
    """The driver's end: starts `script` with JSON arguments and gives it turns.

    Raises:
        RuntimeError: the process ended before its turn did. The message ends with what it wrote last.
    """

    def __init__(self, script: Path, **arguments: Any):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.process = subprocess.Popen(
            [sys.executable, str(script), json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TRL_EXPERIMENTAL_SILENCE": "1"},
        )

    def turn(self) -> dict[str, Any]:
        """What the worker says of its next turn."""
        self.go()
        return self.said()

    def go(self) -> None:
        """Give it its turn."""
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason follows

    def said(self) -> dict[str, Any]:
        """What it says once its turn is over."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"{self.process.args[1]} failed: ...{self.errors.read()[-1000:]}")
        return json.loads(line)

    def close(self) -> None:
        """End the process, in the middle of training or not."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def alternate(script: Path, sides: list[str], turns: int, **arguments: Any) -> dict[str, list[dict[str, Any]]]:
    """What the workers say of their turns: one worker a side, each turn in another order."""
    said: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    workers = {side: Worker(script, side=side, **arguments) for side in sides}
    try:
        for turn in range(turns):
            for side in sides if turn % 2 else sides[::-1]:
                said[side].append(workers[side].turn())
    finally:
        for worker in workers.values():
            worker.close()
    return said


def rounded(value: Any) -> Any:
    """Three decimals, or three digits of small numbers, are more than the noise leaves."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    if isinstance(value, float):
        return round(value, 3) if abs(value) >= 0.1 else float(f"{value:.3g}")
    return value


class Player:
    """The worker's end. Make it first: it takes standard output for itself, because trainers print there."""

    def __init__(self):
        self.channel: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.arguments = json.loads(sys.argv[1])
        self.started = self.began = 0.0

    def wait(self) -> None:
        """Until it is this worker's turn; ends the process where no turn follows."""
        if not sys.stdin.readline():
            os._exit(0)  # in the middle of training, and nothing of it is kept
        self.started, self.began = time.process_time(), time.perf_counter()

    def report(self, **facts: Any) -> None:
        """Say what the turn took: CPU seconds, and the peak memory so far in MB, the process's or the GPU's."""
        facts = gpu_peak() | facts
        facts = {"cpu_seconds": time.process_time() - self.started, "peak_mb": peak_mb()} | facts
        facts["seconds"] = facts.get("seconds", time.perf_counter() - self.began)
        print(json.dumps(facts), file=self.channel, flush=True)

    def callback(self, steps: int, facts: Callable[[], dict[str, Any]] = dict) -> Any:
        """A TrainerCallback that ends a turn every so many optimizer steps and waits for the next."""
        from transformers import TrainerCallback  # not in the driver, whose size its children would inherit

        class Turns(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                if state.global_step % steps == 0:
                    self.report(**facts())
                    self.wait()

        return Turns()


def peak_mb() -> float:
    """The largest resident size that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # Linux counts in KiB


def gpu_peak() -> dict[str, float]:
    """The most memory that tensors have had on the GPU, after all that was asked of it is done; {} without a GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    torch.cuda.synchronize()
    return {"gpu_peak_mb": torch.cuda.max_memory_allocated() / 2**20}
