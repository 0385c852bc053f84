"""What `test_ppo.py` holds to on the CPU, held to on a GPU."""

import contextlib
import math
import sys
from pathlib import Path

import pytest
import test_ppo as on_cpu
import test_ranks
import test_sharding
import tiny_models as tiny
import torch
from torch.profiler import ProfilerActivity, profile

from instructrl.trainers.sharding import is_sharded, shard, whole

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

BATCH = {"batch_size": 16, "total_episodes": 64, "num_mini_batches": 4, "ptx_coef": 0.5}


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """The trainers of `test_ppo.py` use the GPU. TF32 is off, as it is by default in torch."""
    monkeypatch.setitem(on_cpu.SETTINGS, "use_cpu", False)


@on_cpu.CASES
def test_weights_after_two_iterations_are_the_oracles(tmp_path, architecture, dtype, options):
    on_cpu.test_weights_after_two_iterations_are_the_oracles(tmp_path, architecture, dtype, options)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", [{"bf16": True}, {"dtype": torch.bfloat16}], ids=["autocast", "weights"])
def test_in_bfloat16_the_old_log_probabilities_are_the_updates(tmp_path, architecture, precision):
    options = {"num_mini_batches": 1, "total_episodes": 8} | precision
    first = on_cpu.log(on_cpu.trained(tmp_path, architecture, **options))[0]
    assert first["val/ratio"] == pytest.approx(1, abs=0.01)
    assert first["policy/approxkl_avg"] < 1e-3


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_all_models_compute_on_the_gpu(tmp_path, architecture):
    made = on_cpu.trained(tmp_path, architecture, bf16=True, **BATCH)
    assert {p.device.type for p in made.model.parameters()} == {"cuda"}
    assert all(math.isfinite(line["objective/kl"]) and math.isfinite(line["loss/ptx"]) for line in on_cpu.log(made))


def test_a_resumed_run_ends_as_one_that_was_not(tmp_path):
    whole = on_cpu.trained(tmp_path / "whole", **BATCH)
    first = on_cpu.trainer(tmp_path / "cut", save_strategy="steps", save_steps=8, **BATCH)
    first.train()
    second = on_cpu.trainer(tmp_path / "cut", **BATCH)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-8"))
    assert on_cpu.distance(on_cpu.weights(whole.model), on_cpu.weights(second.model)) == 0


# ---- speed and memory ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_is_an_error():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "autocast"])
def test_nothing_in_the_inner_loop_waits_for_the_gpu(tmp_path, architecture, precision):
    made = on_cpu.trainer(tmp_path, architecture, **on_cpu.INNER, **precision)
    with on_cpu.in_the_inner_loop(made, waiting_is_an_error):
        made.train()


def large(folder, device="cuda", width=768, layers=12, episodes=64):
    """PPO-ptx on a model as large as GPT-2, in bfloat16, as `make bench-ppo ARGS='--device cuda'` has it."""
    from dataclasses import asdict, replace

    import ppo_worker
    from bench_ppo import WORKLOADS

    class Alone:
        def callback(self, steps, facts):
            return on_cpu.Steps()

    workload = replace(WORKLOADS["ptx"], size=(width, layers), device=device, episodes=episodes, vocabulary=50257)
    return ppo_worker.ours(Alone(), asdict(workload), str(folder)).__self__


def test_a_profile_of_ppo_ptx_on_gpt2_in_bfloat16(tmp_path, capsys):
    """Prints tokens a second of the last iteration of three, peak memory, and where the time of two others goes."""
    made, watched = large(tmp_path / "timed"), large(tmp_path / "watched")
    made.args.max_steps, watched.args.max_steps = (n * made.args.steps_per_iteration for n in (3, 2))
    torch.cuda.reset_peak_memory_stats()
    made.train()
    gigabytes, lines = torch.cuda.max_memory_allocated() / 1e9, on_cpu.log(made)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        watched.train()
    assert all(math.isfinite(line["objective/kl"]) and math.isfinite(line["loss/ptx"]) for line in lines)
    seconds = sum(value for name, value in lines[-1].items() if name.startswith("seconds/"))
    tokens = sum(map(len, made.last_episodes.sequences))
    with capsys.disabled():
        print(f"\n{tokens / seconds:,.0f} tokens of episodes a second, {gigabytes:.1f} GB with both trainers' weights")
        print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=20))


# ---- FSDP on one GPU -------------------------------------------------------------------------------------------------


def test_a_model_that_fsdp_shards_on_one_gpu_is_the_model(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_PORT", str(test_ranks.free_port()))
    torch.distributed.init_process_group("nccl")
    try:
        plain, model = tiny.policy("llama").cuda(), tiny.policy("llama")
        shard(model, torch.device("cuda", 0))
        assert is_sharded(model)
        rows = tiny.sequences(4, 4, 9)
        for each in (plain, model):
            test_sharding.logprobs_sum(each, rows).backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), theirs.grad, msg=name)
    finally:
        torch.distributed.destroy_process_group()
