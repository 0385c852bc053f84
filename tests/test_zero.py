"""Two processes that share optimizer state, gradients and weights by DeepSpeed's ZeRO (gloo) beside one process."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("deepspeed", reason="pip install 'instructrl[deepspeed]'")
sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started below

import test_ranks
import test_sharding
import tiny_models as tiny
from test_ppo_stage import inputs as ppo_inputs  # noqa: F401 (a fixture, as the next four)
from test_ranks import changed
from test_ranks import orders as made_orders  # noqa: F401
from test_reward_model import sft as rated_policy  # noqa: F401
from test_sft import inputs as sft_inputs  # noqa: F401
from test_sharding import adapters  # noqa: F401

from instructrl.errors import StageFailed
from instructrl.stages.sft import FastSFTTrainer
from instructrl.trainers import zero
from instructrl.trainers.ppo import PPOTrainer
from instructrl.trainers.ranking import KWiseRewardTrainer
from instructrl.trainers.sharding import local, shard

pytestmark = pytest.mark.slow  # each starts two processes

STAGES = ("zero1", "zero2", "zero3")


def zero_orders(orders, stage):
    return changed(orders, runtime={"sharding": stage})


# ---- what each process holds


def check_parts(rank):
    """Half of what the stage shares, after two backward passes and a step; all of the rest."""
    for stage in (1, 2, 3):
        model = tiny.policy("gpt2")
        total = model.num_parameters()
        shard(model, torch.device("cpu"), f"zero{stage}")
        optimizer = zero.ZeroOptimizer(torch.optim.AdamW(model.parameters()), [model], stage, False, 1.0)
        for _ in range(2):
            test_sharding.logprobs_sum(model, tiny.sequences(2, 4, 9)).backward()
        whole = [p for p in model.parameters() if p.grad is not None and p.grad.numel() > 1]
        assert bool(whole) == (stage == 1)  # the others have given theirs away
        (norm,) = optimizer.clip_and_step()
        assert norm > 0
        (engine,) = optimizer.engines
        moments = [state["exp_avg"] for state in engine.optimizer.optimizer.state.values()]
        assert sum(map(torch.numel, moments)) == pytest.approx(total / 2, rel=0.05)
        here = sum(local(p).numel() for p in model.parameters())
        assert here == pytest.approx(total / (2 if stage == 3 else 1), rel=0.05)


def test_each_process_holds_its_part():
    test_sharding.on_two(check_parts)


# ---- the stages

SETTINGS = {
    "plain": {},
    "checkpointing": {"runtime": {"gradient_checkpointing": True}},
    "uneven": {"runtime": {"max_tokens": 30, "micro_batch_size": 1}},
}


def train(rank, port, every, folder):
    test_ranks.be_a_rank(rank, port)
    for name, orders in every.items():
        test_ranks.run_all(orders, folder / name)


def test_stages_end_where_one_process_does(made_orders, adapters, tmp_path):  # noqa: F811
    alone = {name: changed(made_orders, **settings) for name, settings in SETTINGS.items()} | {"lora": adapters}
    every = {(name, stage): zero_orders(orders, stage) for name, orders in alone.items() for stage in STAGES}
    del every["lora", "zero3"]  # which a recipe refuses
    named = {"-".join(key): orders for key, orders in every.items()}
    torch.multiprocessing.spawn(train, (test_ranks.free_port(), named, tmp_path), nprocs=2)
    for name, orders in alone.items():
        test_ranks.run_all(orders, tmp_path / name)
    for name, stage in every:
        two, one = tmp_path / f"{name}-{stage}", tmp_path / name
        test_ranks.ends_alike(two, one, alone[name])
        for of in alone[name]:
            print(name, stage, of, test_ranks.difference(two / of, one / of))


def test_bfloat16_is_that_of_ddp(made_orders, tmp_path):  # noqa: F811
    """Rounding to 8 bits depends on the micro-batch, so one process is not the measure."""
    orders = changed(made_orders, runtime={"bf16": True})
    every = {stage: zero_orders(orders, stage) for stage in STAGES} | {"ddp": orders}
    torch.multiprocessing.spawn(train, (test_ranks.free_port(), every, tmp_path), nprocs=2)
    for stage in STAGES:
        test_ranks.ends_alike(tmp_path / stage, tmp_path / "ddp", orders)


# ---- what goes wrong


def diverge(rank, port, orders, folder):
    test_ranks.be_a_rank(rank, port)
    for stage in STAGES:
        with pytest.raises(StageFailed, match=r"training diverged: the .* is (nan|inf) at step"):
            test_ranks.run_all(zero_orders(orders, stage), folder / stage)


def test_training_stops_where_it_diverges(made_orders, tmp_path):  # noqa: F811
    orders = changed({"sft": made_orders["sft"]}, sft={"learning_rate": 1e30})
    torch.multiprocessing.spawn(diverge, (test_ranks.free_port(), orders, tmp_path), nprocs=2)


# ---- interrupted


def interrupt_and_go_on(rank, port, orders, folder):
    test_ranks.be_a_rank(rank, port)
    for stage in STAGES:
        shared = zero_orders(orders, stage)
        test_ranks.run_all(shared, folder / f"{stage}-whole")
        for name, first, then in (
            (f"{stage}-{stage}", shared, shared),
            (f"{stage}-ddp", shared, orders),
            (f"ddp-{stage}", orders, shared),
            (f"{stage}-alone", shared, None),
        ):
            for of, order in first.items():
                with pytest.MonkeyPatch.context() as patch:
                    for kind in (FastSFTTrainer, KWiseRewardTrainer, PPOTrainer):
                        patch.setattr(kind, "training_step", test_sharding.told_to_stop(kind.training_step, rank))
                    with pytest.raises(SystemExit) as stopped:
                        test_ranks.run_all({of: order}, folder / name)
                assert stopped.value.code == 75
            if then:
                test_ranks.run_all(then, folder / name)


def test_what_was_interrupted_ends_to_the_bit_and_with_other_processes_to_rounding(made_orders, tmp_path):  # noqa: F811
    torch.multiprocessing.spawn(interrupt_and_go_on, (test_ranks.free_port(), made_orders, tmp_path), nprocs=2)
    for stage in STAGES:
        test_ranks.run_all(made_orders, tmp_path / f"{stage}-alone")
        for of in made_orders:
            whole = tmp_path / f"{stage}-whole" / of
            assert test_ranks.difference(tmp_path / f"{stage}-{stage}" / of, whole) == 0
            for name in (f"{stage}-ddp", f"ddp-{stage}", f"{stage}-alone"):
                largest = test_ranks.difference(tmp_path / name / of, whole)
                print(name, of, largest)
                assert largest < 1e-5, (name, of)
