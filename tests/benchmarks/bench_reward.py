"""`make bench-reward`: this project's K-wise reward trainer beside TRL's RewardTrainer on the same comparisons.

Prints one JSON object for each K. Both train the same model for one epoch on the same rankings: ours as they are, TRL
on all their pairs, with as many sequences in a forward pass and as many optimizer steps, each over as many pairs. Each
runs in a process of its own on one thread; they take turns of a sixth of the epoch, and the first one is not counted.

    cpu_seconds_per_turn      CPU seconds of each counted turn
    sequences, padded_tokens  through the model in the whole epoch, padding included
    peak_mb, loaded_mb        the process's peak memory, and what of it there was before training
    accuracy                  after the epoch, on held-out comparisons
    ratio                     TRL's median seconds over ours
    memory_ratio              our peak over TRL's; memory_above_loaded_ratio the same of what training added
"""

import argparse
import json
from pathlib import Path
from statistics import median

from turns import alternate, rounded

HERE = Path(__file__).parent
ROUNDS = 6
COMPLETIONS = 36
"""An optimizer step."""


def compare(k: int, steps: int) -> dict:
    """The line for rankings of K."""
    turns = alternate(
        HERE / "reward_worker.py",
        ["ours", "trl"],
        ROUNDS + 2,
        k=k,
        rankings=COMPLETIONS // k,
        steps=steps,
        rounds=ROUNDS,
    )
    line = {"k": k, "rankings": COMPLETIONS // k * steps, "steps": steps}
    line |= {side: figures(said) for side, said in turns.items()}
    ours, trl = line["ours"], line["trl"]
    return line | {
        "ratio": median(trl["cpu_seconds_per_turn"]) / median(ours["cpu_seconds_per_turn"]),
        "memory_ratio": ours["peak_mb"] / trl["peak_mb"],
        "memory_above_loaded_ratio": (ours["peak_mb"] - ours["loaded_mb"]) / (trl["peak_mb"] - trl["loaded_mb"]),
    }


def figures(turns: list[dict]) -> dict:
    loading, _, *counted, last = turns
    return {
        "cpu_seconds_per_turn": [turn["cpu_seconds"] for turn in counted],
        "sequences": last["sequences"],
        "padded_tokens": last["padded_tokens"],
        "peak_mb": counted[-1]["peak_mb"],
        "loaded_mb": loading["loaded_mb"],
        "accuracy": last["accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--k", type=int, action="append", help="may be given several times; by default 2, 4 and 9")
    parser.add_argument("--steps", type=int, default=36, help=f"optimizer steps of the epoch, a multiple of {ROUNDS}")
    options = parser.parse_args()
    if options.steps % ROUNDS:
        parser.error(f"--steps={options.steps} is not a multiple of {ROUNDS}")
    for k in options.k or (2, 4, 9):
        print(json.dumps(rounded(compare(k, options.steps))), flush=True)


if __name__ == "__main__":
    main()
