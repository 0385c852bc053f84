"""`make bench-estimate`: what `instructrl estimate` says of a stage's memory, beside what the stage takes.

Prints one JSON object a workload. Each is a stage as `run-all` starts it, in a process of its own on one CPU thread, on
a random model and a few batches of random words that are as long as the recipe lets them be.

    estimated_mb   what the estimate says
    measured_mb    the largest resident size of the stage's process (ru_maxrss), libraries included
    error          the first over the second, less one
    phase          where the estimate's peak is
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from instructrl import estimate_memory
from instructrl.config import Recipe
from instructrl.pipeline import stages
from instructrl.shapes import shape

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MB = 1e6
ALLOWED = 0.15
ROWS = 64
"""Of each table that `estimate_inputs.py` writes."""

GPT2_117M = {"architecture": "gpt2", "vocabulary": 50_257, "width": 768, "layers": 12}
GPT2_60M = {"architecture": "gpt2", "vocabulary": 30_000, "width": 640, "layers": 8}
LLAMA_30M = {"architecture": "llama", "vocabulary": 16_000, "width": 512, "layers": 5}
LLAMA_70M = {"architecture": "llama", "vocabulary": 32_000, "width": 640, "layers": 6}
LORA, FULL = {"r": 16, "alpha": 32}, None
WORKLOADS = {
    "sft-gpt2-117m": GPT2_117M | {"stage": "sft"},
    "sft-gpt2-117m-checkpointing": GPT2_117M | {"stage": "sft", "checkpointing": True},
    "sft-llama-70m-lora": LLAMA_70M | {"stage": "sft", "lora": LORA},
    "reward_model-gpt2-60m": GPT2_60M | {"stage": "reward_model"},
    "reward_model-llama-70m-checkpointing": LLAMA_70M | {"stage": "reward_model", "checkpointing": True},
    "ppo-llama-30m": LLAMA_30M | {"stage": "ppo"},
    "ppo-gpt2-60m-lora": GPT2_60M | {"stage": "ppo", "lora": LORA},
    "ppo_ptx-llama-70m": LLAMA_70M | {"stage": "ppo_ptx"},
    "ppo_ptx-gpt2-117m": GPT2_117M | {"stage": "ppo_ptx"},
    "ppo_ptx-gpt2-117m-checkpointing": GPT2_117M | {"stage": "ppo_ptx", "checkpointing": True},
}


def recipe_of(workload: dict, folder: Path) -> Recipe:
    """Two optimizer steps of each stage, with the defaults of everything that they do not need to be short."""
    short = {"total_episodes": 8, "batch_size": 4, "num_mini_batches": 1, "response_length": 32, "ptx_ratio": 1}
    short |= {"init": "sft", "ptx_max_length": 96, "warmup_iterations": 0}
    return Recipe.model_validate(
        {
            "model": {"path": str(folder / "base" / "model"), "template": "{prompt}", "lora": workload.get("lora")},
            "data": {"max_prompt_tokens": 64, "max_response_tokens": 32, "text": [{"path": "text.txt"}]},
            "sft": {"batch_size": 4, "epochs": 8 / ROWS},
            "reward_model": {"batch_size": 4, "epochs": 8 / ROWS},
            "ppo": short,
            "ppo_ptx": short,
            "runtime": {
                "device": "cpu",
                "threads": 1,
                "micro_batch_size": 2,
                "max_tokens": 512,
                "gradient_checkpointing": workload.get("checkpointing", False),
            },
        }
    )


def measured(workload: dict, folder: Path, recipe: Recipe) -> int:
    """Bytes that the stage's process had in memory at most.

    Raises:
        RuntimeError: it failed.
    """
    name = workload["stage"]
    made = {key: workload[key] for key in ("architecture", "vocabulary", "width", "layers")}
    order = made | {"folder": str(folder), "recipe": recipe.model_dump(mode="json")}
    run([str(HERE / "estimate_inputs.py"), json.dumps(order)])
    stage = stages(recipe)[name]
    places = {"data": "data", "reward_model": "reward_model"}
    inputs = {need: str(folder / places.get(need, "policy")) for need in stage.needs}
    out = folder / name / "run"
    out.mkdir(parents=True)
    order = {"stage": name, "module": stage.module or name, "inputs": inputs, "recipe": recipe.model_dump(mode="json")}
    (out / "order.json").write_text(json.dumps(order))
    return run(["-m", "instructrl.worker", str(out)])


def run(arguments: list[str]) -> int:
    """Run Python; bytes of its largest resident size."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(HERE), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, *arguments], stdout=said, stderr=said, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            said.seek(0)
            raise RuntimeError(f"{arguments[:2]} failed: ...{said.read()[-2000:]}")
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def line(name: str) -> dict:
    """A workload's line."""
    workload = WORKLOADS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder, began = Path(temporary), time.perf_counter()
        recipe = recipe_of(workload, folder)
        found = measured(workload, folder, recipe)
        seconds = time.perf_counter() - began
        model = shape(recipe)
        peak = estimate_memory.peak(estimate_memory.phases(workload["stage"], recipe, model, "cpu"))
    return {
        "workload": name,
        "stage": workload["stage"],
        "parameters": model.policy,
        "lora": bool(workload.get("lora")),
        "checkpointing": workload.get("checkpointing", False),
        "estimated_mb": round(peak.total / MB),
        "measured_mb": round(found / MB),
        "error": round(peak.total / found - 1, 3),
        "phase": peak.name,
        "parts_mb": {part: round(size / MB) for part, size in peak.parts.items()},
        "seconds": round(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", action="append", choices=WORKLOADS, help="may be given several times")
    worst = 0.0
    for name in parser.parse_args().workload or WORKLOADS:
        found = line(name)
        worst = max(worst, abs(found["error"]))
        print(json.dumps(found), flush=True)
    if worst > ALLOWED:
        raise SystemExit(f"an estimate is off by more than {ALLOWED:.0%}")


if __name__ == "__main__":
    main()
