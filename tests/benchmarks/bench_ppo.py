"""`make bench-ppo`: this project's PPOTrainer beside TRL 1.12's, the last one that TRL had, on the same work.

Prints one JSON object a workload and a summary. Both trainers run in the same environment, each in a process of its
own on one thread, and take turns of one iteration; the first one is not counted. With --device cuda the models are as
large as GPT-2, batches four times as large, matrix products in bfloat16; seconds are then the clock's, memory is the
GPU's, and there is no floor.

    cpu_seconds_per_iteration     CPU seconds of each counted iteration, from one's end to the next's (seconds_...)
    episodes_per_cpu_second       median (episodes_per_second)
    response_tokens_per_second    median
    response_tokens               per iteration, on average: that both had the same to do
    peak_mb                       the process's peak memory, Python and libraries included
    loaded_mb                     what of it there was before the first iteration
    ratio                         our episodes a CPU second over TRL's
    memory_ratio                  our peak over TRL's
    memory_above_loaded_ratio     the same of the memory that training added
    floor_seconds                 what an iteration's matrix products take by themselves here: see ppo_floor.py
    share_of_floor                floor_seconds over our seconds
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

from turns import Worker, alternate, rounded

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Workload:
    """What is trained: a model of 4 layers and width 128, prompts as uneven as the paper's, 4 minibatches."""

    response_length: int
    end_probability: float
    """That a token is the response's last. At 1/16 most end early, at 1/500 few."""
    architecture: str = "gpt2"
    vocabulary: int = 4096
    episodes: int = 64
    """An iteration."""
    epochs: int = 1
    lora: bool = False
    ptx_ratio: float = 0.0
    """Pretraining examples (32 to 128 tokens) an episode. TRL has no ptx: there a second backward pass is hooked in."""
    size: tuple[int, int] = (128, 4)
    """Width and layers."""
    device: str = "cpu"

    def on_gpu(self) -> "Workload":
        return replace(self, size=(768, 12), device="cuda", episodes=4 * self.episodes)


WORKLOADS = {
    "short": Workload(32, 1 / 16),
    "short-few-end": Workload(32, 1 / 500),
    "long": Workload(128, 1 / 20),
    "long-few-end": Workload(128, 1 / 500, episodes=32),
    "four-epochs": Workload(48, 1 / 20, epochs=4),
    "llama-512": Workload(64, 1 / 20, architecture="llama", vocabulary=512),
    "vocabulary-50k": Workload(32, 1 / 500, vocabulary=50257, episodes=32),
    "lora": Workload(48, 1 / 20, lora=True),
    "ptx": Workload(48, 1 / 20, ptx_ratio=1.0),
}


def measure(workload: Workload, sides: list[str], rounds: int) -> dict[str, dict]:
    """Each side's figures, `rounds` iterations of each in turns."""
    turns = alternate(HERE / "ppo_worker.py", sides, rounds + 2, workload=asdict(workload))  # two do not count
    return {side: figures(each, workload) for side, each in turns.items()}


def figures(turns: list[dict], workload: Workload) -> dict:
    loading, _, *counted = turns
    gpu = workload.device == "cuda"
    unit, memory = ("seconds", "gpu_peak_mb") if gpu else ("cpu_seconds", "peak_mb")
    seconds = [turn[unit] for turn in counted]
    tokens = [turn["response_tokens"] for turn in counted]
    return {
        f"{unit}_per_iteration": [round(value, 3) for value in seconds],
        f"episodes_per_{unit.removesuffix('s')}": workload.episodes / median(seconds),
        "response_tokens": mean(tokens),
        "response_tokens_per_second": median(each / took for each, took in zip(tokens, seconds, strict=True)),
        "peak_mb": counted[-1][memory],
        "loaded_mb": loading.get("gpu_peak_mb", 0.0) if gpu else loading["loaded_mb"],
        "lengths": [turn.get("lengths") for turn in counted],
    }


def compare(name: str, workload: Workload, sides: list[str], rounds: int) -> dict:
    """A workload's line."""
    measured = measure(workload, sides, rounds)
    lengths = {side: each.pop("lengths") for side, each in measured.items()}
    line = {"workload": name} | asdict(workload) | measured
    if len(sides) == 2:
        ours, trl = measured["ours"], measured["trl"]
        rate = "episodes_per_second" if workload.device == "cuda" else "episodes_per_cpu_second"
        line |= {
            "ratio": ours[rate] / trl[rate],
            "memory_ratio": ours["peak_mb"] / trl["peak_mb"],
            "memory_above_loaded_ratio": (ours["peak_mb"] - ours["loaded_mb"]) / (trl["peak_mb"] - trl["loaded_mb"]),
        }
    if "ours" in sides and workload.device == "cpu":
        worker = Worker(HERE / "ppo_floor.py", workload=asdict(workload), lengths=lengths["ours"])
        floor = worker.turn()["seconds"]
        worker.close()
        line |= {
            "floor_seconds": floor,
            "share_of_floor": floor / median(measured["ours"]["cpu_seconds_per_iteration"]),
        }
    return line


def summary(lines: list[dict]) -> dict:
    """Medians and worst cases over the workloads."""
    line = {"summary": "median over workloads, then the worst", "workloads": len(lines)}
    for key, worst in (
        ("ratio", min),
        ("memory_ratio", max),
        ("memory_above_loaded_ratio", max),
        ("share_of_floor", min),
    ):
        values = {line["workload"]: line[key] for line in lines if key in line}
        if values:
            name = worst(values, key=values.get)
            line |= {key: median(values.values()), f"worst_{key}": [name, values[name]]}
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted iterations of each trainer")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be given several times")
    parser.add_argument("--only", choices=("ours", "trl"), help="run one trainer alone")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    sides = [options.only] if options.only else ["ours", "trl"]
    lines = []
    for name in options.workload or WORKLOADS:
        try:
            workload = WORKLOADS[name].on_gpu() if options.device == "cuda" else WORKLOADS[name]
            lines.append(compare(name, workload, sides, options.rounds))
        except RuntimeError as error:
            lines.append({"workload": name, "error": str(error)})
        print(json.dumps(rounded(lines[-1])), flush=True)
    print(json.dumps(rounded(summary(lines))))
    if any("error" in line for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
