"""`make bench-lora`: the memory of a stage that trains adapters on one shared base model, beside one that trains all
weights.

Prints one JSON object a model and stage. Each stage runs as `run-all` starts it, in a process of its own on one CPU
thread, on a random model of GPT-2's architecture and two batches of random words that are as long as the recipe lets
them be. A run's memory is the largest resident size of its process (ru_maxrss); `above` is that, less what the same
stage takes with a model of 60 thousand weights: libraries, tables and whatever else a model's size does not change.

    full_mb, lora_mb, nf4_mb   above, of all weights, adapters of rank 16, and the same on a base in 4 bits (only where
                               bitsandbytes is installed)
    lora_share, nf4_share      the second and third over the first
    floor_mb                   of the model's weights once, in float32
"""

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path

from bench_estimate import MB, measured, recipe_of

from instructrl.shapes import shape

SMALLEST = {"architecture": "gpt2", "vocabulary": 300, "width": 64, "layers": 1}
MODELS = {
    "10m": {"architecture": "gpt2", "vocabulary": 8_000, "width": 320, "layers": 6},
    "40m": {"architecture": "gpt2", "vocabulary": 16_000, "width": 512, "layers": 10},
    "124m": {"architecture": "gpt2", "vocabulary": 50_257, "width": 768, "layers": 12},
}
LORA = {"r": 16, "alpha": 32}
KINDS = {"full": None, "lora": LORA, "nf4": LORA | {"quantization": "nf4"}}
STAGES = ("sft", "ppo")


def peak(model: dict, stage: str, kind: str) -> tuple[int, int]:
    """(bytes that the stage's process had in memory at most, parameters of the model)"""
    workload = model | {"stage": stage, "lora": KINDS[kind]}
    with tempfile.TemporaryDirectory() as temporary:
        recipe = recipe_of(workload, Path(temporary))
        found = measured(workload, Path(temporary), recipe)
        return found, shape(recipe).policy


def line(name: str, stage: str, kinds: list[str], without: dict[tuple[str, str], int]) -> dict:
    """A model's and a stage's line. `without` remembers what a stage takes without a model."""
    began, above, parameters = time.perf_counter(), {}, 0
    for kind in kinds:
        if (stage, kind) not in without:
            without[stage, kind], _ = peak(SMALLEST, stage, kind)
        found, parameters = peak(MODELS[name], stage, kind)
        above[kind] = found - without[stage, kind]
    shares = {f"{kind}_share": round(above[kind] / above["full"], 3) for kind in kinds if kind != "full"}
    return {
        "model": name,
        "stage": stage,
        "parameters": parameters,
        **{f"{kind}_mb": round(size / MB) for kind, size in above.items()},
        **shares,
        "floor_mb": round(4 * parameters / MB),
        "without_mb": {kind: round(without[stage, kind] / MB) for kind in kinds},
        "seconds": round(time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="may be given several times")
    parser.add_argument("--stage", action="append", choices=STAGES, help="may be given several times")
    chosen = parser.parse_args()
    kinds = ["full", "lora"] + (["nf4"] if importlib.util.find_spec("bitsandbytes") else [])
    without: dict[tuple[str, str], int] = {}
    for stage in chosen.stage or STAGES:
        for name in chosen.model or MODELS:
            print(json.dumps(line(name, stage, kinds, without)), flush=True)


if __name__ == "__main__":
    main()
