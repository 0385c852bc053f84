"""One process and two: how far their final weights are apart, and how long they take. On the tiny world, on CPUs.

Each stage is made from the same artifacts. Seconds are those of training alone, as Trainer prints them.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

STAGES = ("sft", "reward_model", "ppo_ptx")
SETTINGS = ("recipe=tiny", "runtime.jobs=1", "runtime.logging_steps=1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where artifacts go; what is there already is not made again")
    parser.add_argument("settings", nargs="*", help="further keys of the recipe and of runtime")
    arguments = parser.parse_args()
    base = arguments.folder / "base"
    for stage in ("reward_model", "ppo_ptx"):
        run(stage, base, arguments.settings)
    for stage in STAGES:
        alone = made(stage, made_with(stage, base, arguments.folder / f"{stage}-1", arguments.settings))
        two = made_with(stage, base, arguments.folder / f"{stage}-2", [*arguments.settings, "runtime.num_processes=2"])
        other = made(stage, two)
        seconds = [training_seconds(folder) for folder in (alone, other)]
        line = {"stage": stage, "difference": difference(alone, other), "loss_difference": losses(alone, other)}
        print(json.dumps(line | {"seconds": seconds, "speed_up": seconds[0] / seconds[1]}), flush=True)


def run(stage: str, output: Path, settings: list[str]) -> None:
    words = [sys.executable, "-m", "instructrl", stage.replace("_", "-"), *SETTINGS, *settings]
    subprocess.run([*words, f"runtime.output_dir={output}"], check=True, stdout=sys.stderr)


def made_with(stage: str, base: Path, output: Path, settings: list[str]) -> Path:
    """The stage's artifact made anew from the base's others."""
    shutil.rmtree(output, ignore_errors=True)
    shutil.copytree(base, output)
    shutil.rmtree(output / stage)
    run(stage, output, settings)
    return output


def made(stage: str, output: Path) -> Path:
    return next(path.parent for path in output.glob(f"{stage}/*/manifest.json"))


def difference(one: Path, other: Path) -> dict[str, float]:
    """The largest of each model's weights."""
    found = {}
    for path in sorted(one.glob("*/model.safetensors")):
        first, second = load_file(path), load_file(other / path.parent.name / path.name)
        found[path.parent.name] = max((first[key] - second[key]).abs().max().item() for key in first)
    return found


def losses(one: Path, other: Path) -> float:
    """The largest difference of a step's loss."""
    both = [
        [line["loss"] for line in map(json.loads, (folder / "log.jsonl").read_text().splitlines()) if "loss" in line]
        for folder in (one, other)
    ]
    return max(abs(a - b) for a, b in zip(*both, strict=True))


def training_seconds(folder: Path) -> float:
    return float(re.findall(r"'train_runtime': '?([\d.]+)", (folder / "stage.log").read_text())[-1])


if __name__ == "__main__":
    main()
