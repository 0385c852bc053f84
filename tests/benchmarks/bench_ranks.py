"""`make bench-ranks`: one process, two with all weights each (DDP), and two that share them (FSDP), on equal batches.

With `instructrl[deepspeed]` also two that share what DeepSpeed's ZeRO shares, in its three stages.

Prints one JSON object for each stage and size of model. Each process computes on one thread; the sides take turns of
some optimizer steps, and the first turn is not counted. On one core two processes cannot be faster than one.

    seconds                    by the clock, of a turn's steps: the median turn's, and all of them
    cpu_seconds                of the busier process, which does not wait for other programs, nor for its partner
    speed_up, cpu_speed_up     of two processes: one's over theirs
    share_of_weights           that a process holds between two steps
    largest_weight_difference  of a weight at the end, from one process's
    largest_loss_difference    of a step's loss (an iteration's, of PPO)
    peak_mb, loaded_mb         a process's peak memory, and what of it there was before training
"""

import argparse
import importlib.util
import json
import socket
import tempfile
from pathlib import Path
from statistics import median

from turns import Worker, rounded

HERE = Path(__file__).parent
SIDES = {"one": 1, "ddp": 2, "fsdp": 2} | (
    {"zero1": 2, "zero2": 2, "zero3": 2} if importlib.util.find_spec("deepspeed") else {}
)
STAGES = ("sft", "reward_model", "ppo_ptx")
SIZES = {"small": {"width": 64, "layers": 2}, "large": {"width": 256, "layers": 8}}
"""With 4,096 words: 0.4 and 7.4 million weights."""


class Side:
    """One process, or two that take their turns together."""

    def __init__(self, name: str, **arguments):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        where = [{"rank": rank, "ranks": SIDES[name], "port": port} for rank in range(SIDES[name])]
        self.workers = [Worker(HERE / "ranks_worker.py", side=name, **each, **arguments) for each in where]

    def turn(self) -> dict:
        """What rank 0 says; seconds are those of the slowest."""
        for worker in self.workers:
            worker.go()
        said = [worker.said() for worker in self.workers]
        return said[0] | {key: max(one[key] for one in said) for key in ("seconds", "cpu_seconds", "peak_mb")}

    def close(self) -> None:
        for worker in self.workers:
            worker.close()


def compare(stage: str, size: str, rounds: int, folder: Path) -> dict:
    """A stage's line."""
    said: dict[str, list[dict]] = {name: [] for name in SIDES}
    sides = {}
    try:
        for name in SIDES:
            weights = str(folder / f"{stage}-{size}-{name}")
            sides[name] = Side(name, stage=stage, size=SIZES[size], rounds=rounds + 1, weights=weights)
        for turn in range(rounds + 2):
            for name in list(SIDES) if turn % 2 else list(SIDES)[::-1]:
                said[name].append(sides[name].turn())
    finally:
        for side in sides.values():
            side.close()
    line = {"stage": stage, "size": size, "parameters": said["one"][0]["parameters"]}
    line |= {name: figures(turns) for name, turns in said.items()}
    for name in list(SIDES)[1:]:
        line[name]["speed_up"] = line["one"]["seconds"] / line[name]["seconds"]
        line[name]["cpu_speed_up"] = line["one"]["cpu_seconds"] / line[name]["cpu_seconds"]
        line[name] |= differences(said["one"][-1], said[name][-1])
        line[name]["share_of_weights"] = said[name][0]["held"] / said["one"][0]["held"]
    return line


def figures(turns: list[dict]) -> dict:
    loading, _, *counted = turns
    return {
        "seconds": median(turn["seconds"] for turn in counted),
        "turns": [turn["seconds"] for turn in counted],
        "cpu_seconds": median(turn["cpu_seconds"] for turn in counted),
        "peak_mb": counted[-1]["peak_mb"],
        "loaded_mb": loading["loaded_mb"],
    }


def differences(one: dict, other: dict) -> dict:
    """Between what two sides ended with."""
    from safetensors.torch import load_file

    ours, theirs = load_file(other["weights"]), load_file(one["weights"])
    losses = zip(one["losses"], other["losses"], strict=True)
    return {
        "largest_weight_difference": max((ours[name] - theirs[name]).abs().max().item() for name in theirs),
        "largest_loss_difference": max(abs(a - b) for a, b in losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="counted turns of each side")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be given several times")
    parser.add_argument("--size", action="append", choices=SIZES, help="may be given several times")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for size in options.size or SIZES:
            for stage in options.stage or STAGES:
                line = compare(stage, size, options.rounds, Path(folder))
                print(json.dumps(rounded(line)), flush=True)


if __name__ == "__main__":
    main()
