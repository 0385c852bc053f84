"""SIGKILL at twenty random moments of PPO-ptx: the run that went on each time ends as the undisturbed one. T18."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from test_ppo_stage import inputs, recipe  # noqa: F401 (a fixture)

KILLS = 20
RUN = """
import json, sys
from pathlib import Path
import torch
from instructrl.config import Recipe
from instructrl.stages import ppo
order = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(1)
recipe = Recipe.model_validate(order["recipe"])
ppo.run("ppo_ptx", recipe, {name: Path(path) for name, path in order["inputs"].items()}, Path(sys.argv[2]))
"""
FILES = ("model/model.safetensors", "critic/model.safetensors", "ema/model.safetensors")


def start(order, folder):
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN, str(order), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def numbers(folder):
    """What was logged, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "seconds" not in key and key != "eps"} for line in lines]


@pytest.mark.slow
def test_a_run_that_was_killed_twenty_times_ends_to_the_last_bit_as_one_that_was_not(inputs, tmp_path):  # noqa: F811
    whole, killed, order = tmp_path / "whole", tmp_path / "killed", tmp_path / "order.json"
    changed = {"total_episodes": 16 * 400, "kl_target": 0.05, "kl_horizon": 500}
    asked = recipe(**changed).model_dump(mode="json")
    asked["runtime"]["save_minutes"] = 1e-5  # at the end of every iteration
    order.write_text(json.dumps({"recipe": asked, "inputs": {name: str(path) for name, path in inputs.items()}}))
    finished(start(order, whole))

    dice, steps = random.Random(0), []
    while len(steps) < KILLS:
        process = start(order, killed)
        before = progress(killed)
        while progress(killed) == before and process.poll() is None:  # until it trains
            time.sleep(0.01)
        time.sleep(dice.random() * 0.5)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        steps.append(progress(killed))
    finished(start(order, killed))

    assert 0 < steps[0] < steps[-1] < 800
    assert numbers(killed) == numbers(whole)
    for file in FILES:
        assert digest(killed / file) == digest(whole / file), file


def progress(folder: Path) -> int:
    try:
        return json.loads((folder / "progress.json").read_text())["step"]
    except (FileNotFoundError, ValueError):
        return 0


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
