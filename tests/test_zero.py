"""Two processes that share optimizer state, gradients and weights by DeepSpeed's ZeRO (gloo) beside one process."""

import math
import os
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before it is imported: else it takes a GPU
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

from instructrl import estimate_memory
from instructrl.errors import StageFailed
from instructrl.stages.sft import FastSFTTrainer
from instructrl.trainers import zero
from instructrl.trainers.muon import MuonAdamW, parameter_groups
from instructrl.trainers.ppo import PPOTrainer
from instructrl.trainers.ranking import KWiseRewardTrainer
from instructrl.trainers.sharding import local, shard, whole

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
        kept = [p for p in model.parameters() if p.grad is not None and p.grad.numel() > 1]
        assert bool(kept) == (stage == 1)  # the others have given theirs away
        (norm,) = optimizer.clip_and_step()
        assert norm > 0
        (engine,) = optimizer.engines
        moments = [state["exp_avg"] for state in engine.optimizer.optimizer.state.values()]
        assert sum(map(torch.numel, moments)) == pytest.approx(total / 2, rel=0.05)
        here = sum(local(p).numel() for p in model.parameters())
        assert here == pytest.approx(total / (2 if stage == 3 else 1), rel=0.05)


def test_each_process_holds_its_part():
    test_sharding.on_two(check_parts)


def test_the_estimate_knows_the_bucket():
    for stage in (1, 2, 3):
        assert 4 * zero.settings(stage)["zero_optimization"]["reduce_bucket_size"] == estimate_memory.BUCKET


def check_uneven(rank):
    """A third of nothing but odd numbers of weights, where memory held nans before."""
    empty = torch.empty

    def full_of_nan(*size, **options):
        found = empty(*size, **options)
        return found.fill_(math.nan) if found.is_floating_point() else found

    model, plain = tiny.policy("gpt2", n_embd=10, vocab_size=301), tiny.policy("gpt2", n_embd=10, vocab_size=301)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", full_of_nan)
        shard(model, torch.device("cpu"), "zero3")
        assert all(torch.isfinite(local(p)).all() for p in model.parameters())
        options = {"lr": 1e-2, "eps": 1e-2}
        optimizer = zero.ZeroOptimizer(torch.optim.AdamW(model.parameters(), **options), [model], 3, False, 1.0)
        expected = torch.optim.AdamW(plain.parameters(), **options)
        for _ in range(2):
            for each in (model, plain):
                (test_sharding.logprobs_sum(each, tiny.sequences(4, 4, 9)) / 50).backward()
            norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            torch.testing.assert_close(optimizer.clip_and_step()[0], norm)
            expected.step()
            expected.zero_grad()
        assert all(torch.isfinite(local(p)).all() for p in model.parameters())
    test_sharding.same({name: whole(p) for name, p in model.named_parameters()}, dict(plain.named_parameters()))


def test_what_does_not_divide_evenly_is_filled_with_zeros():
    test_sharding.on_ranks(3, check_uneven)


@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.AdamW, amsgrad=True), MuonAdamW])
def test_another_optimizer_is_refused(kind):
    model = tiny.policy("gpt2")
    groups = parameter_groups(model, 0.1, 0.1) if kind is MuonAdamW else model.parameters()
    with pytest.raises(ValueError, match="shares the moments of torch's AdamW"):
        zero.ZeroOptimizer(kind(groups), [model], 2, False, 1.0)


# ---- the stages

SETTINGS = {
    "plain": {},
    "checkpointing": {"runtime": {"gradient_checkpointing": True}},
    "uneven": {"runtime": {"max_tokens": 30, "micro_batch_size": 1}},
    "unclipped": {name: {"trainer": {"max_grad_norm": 0.0}} for name in ("sft", "reward_model")},
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


PAIRS = [(stage, then) for stage in STAGES for then in (stage, "ddp", "alone")] + [("ddp", stage) for stage in STAGES]
PAIRS += [("zero1", "zero3"), ("zero3", "zero2"), ("zero2", "fsdp"), ("fsdp", "zero1")]
OF_ADAPTERS = [("zero1", "zero2"), ("zero2", "zero2"), ("zero2", "alone"), ("ddp", "zero1")]


def interrupt_and_go_on(rank, port, orders, folder, pairs):
    test_ranks.be_a_rank(rank, port)
    every = {"ddp": orders, "fsdp": changed(orders, runtime=test_ranks.FSDP)}
    every |= {stage: zero_orders(orders, stage) for stage in STAGES}
    for measure in sorted({measure_of(first) for first, _ in pairs}):
        test_ranks.run_all(every[measure], folder / f"{measure}-whole")
    for first, then in pairs:
        for of, order in every[first].items():
            with pytest.MonkeyPatch.context() as patch:
                for kind in (FastSFTTrainer, KWiseRewardTrainer, PPOTrainer):
                    patch.setattr(kind, "training_step", test_sharding.told_to_stop(kind.training_step, rank))
                with pytest.raises(SystemExit) as stopped:
                    test_ranks.run_all({of: order}, folder / f"{first}-{then}")
            assert stopped.value.code == 75
        if then != "alone":
            test_ranks.run_all(every[then], folder / f"{first}-{then}")


def measure_of(first):
    """The undisturbed run that one begun so is compared with."""
    return first if first in STAGES else "zero1"


@pytest.mark.parametrize(("kind", "pairs"), [("made_orders", PAIRS), ("adapters", OF_ADAPTERS)])
def test_what_was_interrupted_ends_to_the_bit_and_otherwise_shared_to_rounding(request, tmp_path, kind, pairs):
    orders = request.getfixturevalue(kind)
    torch.multiprocessing.spawn(interrupt_and_go_on, (test_ranks.free_port(), orders, tmp_path, pairs), nprocs=2)
    for first, then in pairs:
        ended = tmp_path / f"{first}-{then}"
        if then == "alone":
            test_ranks.run_all(orders, ended)
        for of in orders:
            largest = test_ranks.difference(ended / of, tmp_path / f"{measure_of(first)}-whole" / of)
            print(first, then, of, largest)
            assert largest == 0 if first == then else largest < 1e-5, (first, then, of)
