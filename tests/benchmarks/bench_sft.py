"""`make bench-sft`: this project's SFTTrainer beside TRL's, from which it is derived, on the same demonstrations.

Prints one JSON object a workload. Each trains the same model in a process of its own on one thread; they take turns of
some optimizer steps, and the first one is not counted. Three of them:

    trl           TRL's SFTTrainer as it is
    same_order    ours, with rows in TRL's order: the losses of all steps must be the same
    ours          ours as it is, with rows of about equal length in a batch

    tokens_per_cpu_second     real ones, padding not counted; the median turn's
    largest_loss_difference   between a step of same_order and of trl
    ratio_same_order, ratio   of tokens a CPU second, same_order's and ours over TRL's
    gain_from_lengths         the second over the first
    peak_mb, loaded_mb        the process's peak memory, and what of it there was before training
"""

import argparse
import json
from pathlib import Path
from statistics import median

from turns import alternate, rounded

HERE = Path(__file__).parent
SIDES = ["trl", "same_order", "ours"]
WORKLOADS = {
    "completion-only": {"architecture": "gpt2", "vocabulary": 4096, "completion_only_loss": True},
    "all-tokens": {"architecture": "gpt2", "vocabulary": 4096, "completion_only_loss": False},
    "llama": {"architecture": "llama", "vocabulary": 4096, "completion_only_loss": True},
}
TOLERANCE = 1e-5


def compare(name: str, rounds: int) -> dict:
    """A workload's line."""
    turns = alternate(HERE / "sft_worker.py", SIDES, rounds + 2, rounds=rounds, **WORKLOADS[name])
    line = {"workload": name, **WORKLOADS[name]} | {side: figures(said) for side, said in turns.items()}
    losses = {side: [loss for turn in said[1:] for loss in turn["losses"]] for side, said in turns.items()}
    pairs = zip(losses["trl"], losses["same_order"], strict=True)
    speed = {side: line[side]["tokens_per_cpu_second"] for side in SIDES}
    return line | {
        "largest_loss_difference": max(abs(theirs - ours) for theirs, ours in pairs),
        "ratio_same_order": speed["same_order"] / speed["trl"],
        "ratio": speed["ours"] / speed["trl"],
        "gain_from_lengths": speed["ours"] / speed["same_order"],
        "memory_ratio": line["ours"]["peak_mb"] / line["trl"]["peak_mb"],
    }


def figures(turns: list[dict]) -> dict:
    loading, _, *counted = turns
    return {
        "cpu_seconds_per_turn": [turn["cpu_seconds"] for turn in counted],
        "tokens_per_cpu_second": median(turn["tokens"] / turn["cpu_seconds"] for turn in counted),
        "peak_mb": counted[-1]["peak_mb"],
        "loaded_mb": loading["loaded_mb"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted turns of each trainer")
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be given several times")
    options = parser.parse_args()
    lines = []
    for name in options.workload or WORKLOADS:
        lines.append(compare(name, options.rounds))
        print(json.dumps(rounded(lines[-1])), flush=True)
    if any(line["largest_loss_difference"] > TOLERANCE for line in lines):
        raise SystemExit(f"losses differ by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
