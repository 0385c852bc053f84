"""Two gloo ranks do what one process does; and what a runner makes of ranks that are killed or stopped."""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started below

import test_ppo_stage
import test_reward_model
import test_sft
from test_ppo_stage import inputs as ppo_inputs  # noqa: F401 (a fixture, as the next two)
from test_reward_model import sft as rated_policy  # noqa: F401
from test_sft import inputs as sft_inputs  # noqa: F401

from instructrl import launch
from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.launch import command
from instructrl.pipeline import stages
from instructrl.stages import ppo, reward_model, sft
from instructrl.trainers import sharding

RUNS = {"sft": sft.run, "reward_model": reward_model.run, "ppo_ptx": ppo.run}


def recipes():
    """21 demonstrations in steps of 10: the last step has one, for two ranks. So have 21 rankings in steps of 4."""
    small = {"micro_batch_size": 3, "threads": 1}
    return {
        "sft": test_sft.recipe(sft={"batch_size": 10, "learning_rate": 1e-3, "residual_dropout": 0}, runtime=small),
        "reward_model": test_reward_model.recipe(reward_model={"epochs": 2, "learning_rate": 1e-3}, runtime=small),
        "ppo_ptx": test_ppo_stage.recipe(num_ppo_epochs=2),
    }


@pytest.fixture
def orders(sft_inputs, rated_policy, ppo_inputs, tmp_path):  # noqa: F811
    demonstrations = tmp_path / "demonstrations"
    test_sft.write_demonstrations(demonstrations, test_sft.DEMONSTRATIONS_[:21])
    ranked = [test_reward_model.ranking(n) for n in range(30)]
    rankings = test_reward_model.write(tmp_path / "rankings", ranked[:21], ranked[21:])
    made = {
        "sft": sft_inputs | {"data": demonstrations},
        "reward_model": {"data": rankings, "sft": rated_policy},
        "ppo_ptx": ppo_inputs,
    }
    return {name: (recipe, made[name]) for name, recipe in recipes().items()}


def changed(orders, runtime=(), model=(), **sections):
    """The orders with other settings in these sections of their recipes."""
    updates = {"runtime": dict(runtime), "model": dict(model), **sections}

    def of(recipe):
        parts = {section: getattr(recipe, section).model_copy(update=update) for section, update in updates.items()}
        return recipe.model_copy(update=parts)

    return {name: (of(recipe), made_from) for name, (recipe, made_from) in orders.items()}


FSDP = {"sharding": "fsdp"}


def be_a_rank(rank, port, ranks=2):
    environment = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ |= {name: str(value) for name, value in environment.items()}


def train(rank, port, orders, folder):
    """Both ranks of all three stages, one after the other, first as DDP and then as FSDP."""
    be_a_rank(rank, port)
    run_all(orders, folder / "ddp")
    networks = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "fully_shard", lambda model, **options: networks.append(fully_shard(model, **options)))
        run_all(changed(orders, runtime=FSDP), folder / "fsdp")
    whole = [model for model in networks if isinstance(model, PreTrainedModel)]
    assert len(whole) == 2 + 4  # PPO's policy, critic, reference and reward model
    assert len(networks) >= 2 * len(whole)  # and their layers


def run_all(orders, folder):
    torch.set_num_threads(1)
    found = {}
    for name, (recipe, made_from) in orders.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        found[name] = RUNS[name](name, recipe, made_from, folder / name)
    if os.environ.get("RANK", "0") == "0":
        (folder / "metrics.json").write_text(json.dumps(found))


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def difference(one, other):
    """The largest between two folders' weights, and the files that both have."""

    def saved(folder):
        found = [*folder.glob("*/*.safetensors"), *folder.glob("*/adapter/*.safetensors")]
        return sorted(path.relative_to(folder) for path in found)

    files = saved(one)
    assert files == saved(other)
    largest = 0.0
    for file in files:
        first, second = load_file(one / file), load_file(other / file)
        assert first.keys() == second.keys()
        largest = max([largest, *((first[key] - second[key]).abs().max().item() for key in first)])
    return largest


def test_two_ranks_end_where_one_process_does(orders, tmp_path):
    """Every loss to 1e-5 of itself, every final weight to 1e-5 (measured: see docs/scaling.md)."""
    alone = tmp_path / "alone"
    torch.multiprocessing.spawn(train, (free_port(), orders, tmp_path), nprocs=2)
    run_all(orders, alone)
    for two in (tmp_path / "ddp", tmp_path / "fsdp"):
        ends_alike(two, alone, orders)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ends_alike(two, alone, orders):
    for name in orders:
        lines = [[line for line in log(folder / name) if "loss" in line] for folder in (two, alone)]
        assert len(lines[0]) >= 3
        for ours, theirs in zip(*lines, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-6), name
            assert ours.get("num_tokens") == theirs.get("num_tokens")
            assert (ours["step"], ours["grad_norm"]) == pytest.approx((theirs["step"], theirs["grad_norm"]), rel=1e-4)
        assert difference(two / name, alone / name) < 1e-5, name
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (two, alone))
    for name, key in (("sft", "valid_loss"), ("sft", "train_loss"), ("reward_model", "train_loss")):
        assert ours[name][key] == pytest.approx(theirs[name][key], rel=1e-5), (name, key)
    assert ours["sft"]["valid_accuracy"] == pytest.approx(theirs["sft"]["valid_accuracy"], rel=1e-5)
    assert ours["reward_model"]["reward_bias"] == pytest.approx(theirs["reward_model"]["reward_bias"], abs=1e-5)
    assert ours["reward_model"]["accuracy"] == theirs["reward_model"]["accuracy"]
    assert ours["ppo_ptx"]["held_out"] == pytest.approx(theirs["ppo_ptx"]["held_out"], abs=1e-4)


def test_a_rank_that_is_killed_is_named_and_one_process_goes_on(instructrl, fakes, here):
    script = here / "script.json"
    script.write_text(json.dumps({"sft": {"steps": 2000, "seconds": 0.02, "end": "lose rank"}}))
    failed = instructrl("sft", "recipe=base.yaml", "runtime.num_processes=2", "runtime.sharding=fsdp")
    assert failed.code == 1
    assert "sft ended with its rank 1 of 2, which was killed by SIGKILL; was this machine out of memory?" in failed.err
    script.write_text("{}")
    done = instructrl("sft", "recipe=base.yaml")
    assert done.code == 0, done.err
    said = " ".join((done.out + done.err).split())
    assert "goes on with 1 process from a checkpoint of 2 processes with sharding=fsdp, so that" in said
    assert "to rounding, not to the bit" in said


@pytest.mark.slow
def test_sigterm_lets_both_ranks_save(spawn, here):
    (here / "script.json").write_text(json.dumps({"sft": {"steps": 200, "seconds": 0.1}}))
    process = spawn("sft", "recipe=base.yaml", "runtime.num_processes=2")
    while not list(here.glob("artifacts/sft/*/checkpoints/*/COMPLETE")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "sft was stopped and saved at step" in err


def test_a_batch_that_ranks_cannot_share_is_refused_before_anything_runs(instructrl, fakes, here):
    found = instructrl("sft", "recipe=base.yaml", "runtime.num_processes=3", "sft.batch_size=32")
    assert found.code == 2
    assert "sft.batch_size = 32 cannot be shared by runtime.num_processes = 3 processes" in found.err
    assert "or take 2." in found.err
    assert not (here / "ran.log").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sft": {"muon_learning_rate": 0.01}}, "sft.muon_learning_rate: Muon is not for"),
        ({"sft": {"trainer": {"optim": "adafactor"}}}, "sft.trainer.optim=adafactor is not for"),
        ({"reward_model": {"trainer": {"fp16": True}}}, "reward_model.trainer.fp16 is not for"),
        ({"model": {"dtype": "bfloat16"}}, "model.dtype=bfloat16 is not for"),
        ({"model": {"lora": {}}}, "model.lora is not for"),
        ({"model": {"lora": {"quantization": "nf4"}}}, "model.lora.quantization is not for"),
        ({"runtime": {"rollouts": "vllm"}}, "runtime.rollouts=vllm is not for"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused(changes, sentence):
    asked = {"data": {"world": {}}, "eval": {"judge": "gold"}} | changes
    asked["model"] = {"path": None} | changes.get("model", {})
    runtime = {"num_processes": 2, "sharding": "zero3"} | changes.get("runtime", {})
    with pytest.raises(ValidationError, match=f"{sentence} runtime.sharding=zero3[,;]"):
        Recipe.model_validate(asked | {"runtime": runtime})
    Recipe.model_validate(asked | {"runtime": runtime | {"num_processes": 1}})


@pytest.mark.parametrize("there", [None, "0.16.4"])
def test_a_deepspeed_that_is_not_there_or_too_old_is_missed_before_anything_runs(here, monkeypatch, there):
    def version(name):
        if name != "deepspeed":
            return metadata.version(name)
        if there is None:
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(launch, "version", version)
    with pytest.raises(UserError) as refused:
        launch.check_deepspeed("zero2")
    found = "which is not installed" if there is None else "and this is 0.16.4"
    assert str(refused.value) == (
        f"runtime.sharding=zero2 needs deepspeed 0.19.8 or newer, {found}: pip install 'instructrl[deepspeed]', or set "
        "runtime.sharding=fsdp."
    )


@pytest.mark.slow
def test_two_nodes_meet_at_an_endpoint(instructrl, fakes, here):
    """Both on this machine: `node_command` starts what follows it twice, as srun does it on two machines."""
    everywhere = here / "everywhere"
    everywhere.write_text("""#!/bin/sh
"$@" & "$@" & wait $! && wait
""")
    everywhere.chmod(0o755)
    meeting = f"runtime.rdzv_endpoint=127.0.0.1:{free_port()}"
    nodes = ["runtime.nodes=2", f"runtime.node_command={everywhere}", meeting]
    done = instructrl("sft", "recipe=base.yaml", *nodes)
    assert done.code == 0, done.err
    made = json.loads(next(here.glob("artifacts/sft/*/manifest.json")).read_text())["made"]
    assert made["processes"] == 2


# ---- PPO-ptx, killed


def start(recipe: Recipe, made_from, folder, processes):
    """The stage as a runner starts it."""
    folder.mkdir(exist_ok=True)
    (folder / "error.json").unlink(missing_ok=True)
    recipe = recipe.model_copy(update={"runtime": recipe.runtime.model_copy(update={"num_processes": processes})})
    order = {"stage": "ppo_ptx", "module": "ppo", "recipe": recipe.model_dump(mode="json")}
    order |= {"inputs": {name: str(path) for name, path in made_from.items()}}
    (folder / "order.json").write_text(json.dumps(order))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = command(stages(recipe)["ppo_ptx"], recipe, folder)
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finished(process):
    _, errors = process.communicate()
    assert process.returncode == 0, errors


def progress(folder):
    try:
        return json.loads((folder / "progress.json").read_text())["step"]
    except (FileNotFoundError, ValueError):
        return 0


def kill_a_rank(process, folder, rank, seconds):
    """Once it trains, and so many seconds later."""
    before = progress(folder)
    while progress(folder) == before and process.poll() is None:
        time.sleep(0.01)
    time.sleep(seconds)
    assert process.poll() is None, process.communicate()[1]
    ranks = {int(one.environ()["RANK"]): one for one in psutil.Process(process.pid).children()}
    ranks[rank].kill()
    process.communicate()
    assert process.returncode == 1
    assert json.loads((folder / "error.json").read_text()) == {"rank": rank, "ranks": 2, "code": -signal.SIGKILL}


def digests(folder):
    return {
        path.parent.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.glob("*/model.safetensors"))
    }


def saved_often(iterations):
    """At the end of every iteration."""
    recipe = test_ppo_stage.recipe(total_episodes=16 * iterations, kl_target=0.05, kl_horizon=500)
    often = recipe.runtime.model_copy(update={"save_minutes": 1e-5})
    return recipe.model_copy(update={"runtime": often})


@pytest.mark.slow
def test_ppo_whose_ranks_were_killed_ends_to_the_bit_with_two(ppo_inputs, tmp_path):  # noqa: F811
    recipe = saved_often(iterations=150)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finished(start(recipe, ppo_inputs, whole, 2))
    dice = random.Random(0)
    for number in range(4):
        kill_a_rank(start(recipe, ppo_inputs, killed, 2), killed, number % 2, dice.random() * 0.5)
    assert 0 < progress(killed) < 300
    finished(start(recipe, ppo_inputs, killed, 2))
    assert digests(killed) == digests(whole)
    assert set(digests(whole)) == {"model", "critic", "ema"}

    def lines(folder):
        return [{k: v for k, v in line.items() if "seconds" not in k and k != "eps"} for line in log(folder)]

    assert lines(killed) == lines(whole)


@pytest.mark.slow
def test_ppo_of_which_a_rank_was_killed_ends_to_rounding_with_one(ppo_inputs, tmp_path):  # noqa: F811
    """Over 20 iterations. Over 150 a rounding may make one sampled token another, and all that follows."""
    recipe = saved_often(iterations=20)
    whole, alone = tmp_path / "whole", tmp_path / "alone"
    finished(start(recipe, ppo_inputs, whole, 2))
    kill_a_rank(start(recipe, ppo_inputs, alone, 2), alone, 1, 0.05)
    finished(start(recipe, ppo_inputs, alone, 1))
    largest = difference(alone, whole)
    assert 0 < largest < 1e-5
    print(f"resumed with one process: largest difference of a final weight {largest:.1e}")
