"""Two processes that share weights, gradients and optimizer state (FSDP2, gloo) beside one that has all of them.

`test_ranks.py` has the stages as they mostly are; here are their other settings, the parts, and what is interrupted.
"""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started below

import adapted_models
import test_lora
import test_ranks
import tiny_models as tiny
from test_ppo_stage import inputs as ppo_inputs  # noqa: F401 (a fixture, as the next three)
from test_ranks import FSDP, changed
from test_ranks import orders as made_orders  # noqa: F401
from test_reward_model import sft as rated_policy  # noqa: F401
from test_sft import inputs as sft_inputs  # noqa: F401

from instructrl.stages.contract import Contract
from instructrl.stages.sft import FastSFTTrainer
from instructrl.trainers import rollout
from instructrl.trainers.ema import EMA
from instructrl.trainers.muon import MuonAdamW, parameter_groups
from instructrl.trainers.packing import Pack
from instructrl.trainers.ppo import PPOTrainer
from instructrl.trainers.ranking import KWiseRewardTrainer
from instructrl.trainers.sharding import (
    as_forward,
    load,
    local,
    part_of_state,
    shard,
    unsharded,
    unsharded_class,
    whole,
    whole_state,
    whole_weights,
)

pytestmark = pytest.mark.slow  # each starts two processes

# ---- the parts


def on_two(work, *args):
    on_ranks(2, work, *args)


def on_ranks(ranks, work, *args):
    torch.multiprocessing.spawn(as_rank, (ranks, test_ranks.free_port(), work, args), nprocs=ranks)


def as_rank(rank, ranks, port, work, args):
    test_ranks.be_a_rank(rank, port, ranks)
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    work(rank, *args)
    torch.distributed.destroy_process_group()


def sharded_policy(architecture):
    model = tiny.policy(architecture)
    shard(model, torch.device("cpu"))
    return model


def logprobs_sum(model, sequences):
    pack = Pack.of(sequences, [range(len(ids) - 1) for ids in sequences], tiny.PAD, "cpu")
    return as_forward(model, model, lambda: rollout.response_logprobs(model, pack, 1.0)).sum()


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def check_parts(rank, architecture, folder):
    plain, model = tiny.policy(architecture), sharded_policy(architecture)
    start = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    assert unsharded_class(model) is type(plain)
    here = sum(local(p).numel() for p in model.parameters())
    assert here == pytest.approx(plain.num_parameters() / 2, rel=0.05)
    check_sampling(rank, plain, model)
    check_gradients(rank, plain, model)
    average, expected = EMA(model, 0.9, 1), EMA(plain, 0.9, 1)
    # a large eps: where a gradient is 0 but for rounding, Adam would make a step of it
    optimizers = [MuonAdamW(parameter_groups(each, 1e-2, 1e-2), eps=1e-2) for each in (model, plain)]
    for each in optimizers:
        each.step()
    saved = whole_weights(model)
    assert bool(saved) == (rank == 0)
    if rank == 0:
        same(saved, plain.state_dict())
        tied = ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight")
        assert len({id(saved[name]) for name in tied if name in saved}) == 1
    check_average(average, expected, model, plain, folder)
    check_optimizer_state(rank, *optimizers)
    load(model.state_dict(), start)
    same({name: whole(tensor) for name, tensor in model.state_dict().items()}, start)


def check_sampling(rank, plain, model):
    """With other numbers of forward passes on each process."""
    prompts, uniforms = tiny.sequences(6, 2, 9), torch.rand(6, 12, generator=torch.Generator().manual_seed(0))
    own = slice(0, 5) if rank == 0 else slice(5, 6)
    options = {"max_new_tokens": 12, "temperature": 1.0, "eos_token_id": tiny.EOS, "pad_token_id": tiny.PAD}
    options |= {"batch_size": 2, "uniforms": uniforms[own]}
    with unsharded(model):
        found = rollout.generate(model, prompts[own], **options)
        assert not any(isinstance(p, DTensor) for p in model.parameters())
    expected = rollout.generate(plain, prompts[own], **options)
    assert [one.ids for one in found] == [one.ids for one in expected]
    assert all(isinstance(p, DTensor) for p in model.parameters())


def check_gradients(rank, plain, model):
    """The mean over processes, added up over passes."""
    rows = tiny.sequences(4, 4, 9, seed=2)
    (logprobs_sum(plain, rows) / 2).backward()
    for part in (rows[rank : rank + 1], rows[rank + 2 : rank + 3]):
        logprobs_sum(model, part).backward()
    expected = {name: p.grad for name, p in plain.named_parameters()}
    same({name: whole(p.grad) for name, p in model.named_parameters()}, expected)


def check_average(average, expected, model, plain, folder):
    """Updated, applied and taken back, saved as one process would save it, and loaded."""
    average.update()
    expected.update()
    before = local(next(model.parameters())).clone()
    with average.applied(), expected.applied():
        same({name: whole(p) for name, p in model.named_parameters()}, dict(plain.named_parameters()))
    assert torch.equal(before, local(next(model.parameters())))
    average.save(folder)
    torch.distributed.barrier()
    same(load_file(folder / "ema.safetensors"), expected.averages)
    kept = {name: tensor.clone() for name, tensor in average.averages.items()}
    for tensor in average.averages.values():
        tensor.zero_()
    average.load(folder)
    same(average.averages, kept)


def check_optimizer_state(rank, sharded, plain):
    """Gathered, it is as one process has it; and back."""
    own, expected = sharded.state_dict()["state"], plain.state_dict()["state"]
    gathered = whole_state(sharded.state_dict())["state"]
    parts = part_of_state(plain.state_dict(), sharded)["state"]
    assert own.keys() == expected.keys() == parts.keys()
    for number, of_one in expected.items():
        assert bool(gathered[number]) == (rank == 0)
        if rank == 0:
            same(gathered[number], of_one)
        same({k: local(v) for k, v in parts[number].items()}, {k: local(v) for k, v in own[number].items()})


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_sharded_model_is_the_model(architecture, tmp_path):
    on_two(check_parts, architecture, tmp_path)


# ---- the stages, with other settings

VARIANTS = {
    "checkpointing": {"runtime": {"gradient_checkpointing": True}},
    "uneven": {"runtime": {"max_tokens": 30, "micro_batch_size": 1}},
    "muon": {"sft": {"muon_learning_rate": 0.01}, "reward_model": {"muon_learning_rate": 0.01}},
    "bf16": {"runtime": {"bf16": True}},  # on a CPU it is TRL's own loss, as on a GPU
}


@pytest.fixture
def adapters(tmp_path):
    """The three stages on a GPT-2 with adapters."""
    contract, folder = Contract(tiny.tokenizer(), test_lora.TEMPLATE), tmp_path / "artifacts"
    recipe = test_lora.recipe(lora={"dropout": 0.0}, sft={"residual_dropout": 0.0}, runtime={"threads": 1})
    adapted_models.write(tiny.policy("gpt2", attn_pdrop=0, embd_pdrop=0), contract, recipe, folder)
    test_lora.write_tables(folder / "data")
    made = {name: folder / name for name in ("data", "pretrain", "sft", "reward_model")}
    return dict.fromkeys(test_ranks.RUNS, (recipe, made))


def train_variants(rank, port, every, folder):
    test_ranks.be_a_rank(rank, port)
    empty = []

    def counted(self, *args):
        found = batches(self, *args)
        empty.append(found.count([]))
        return found

    batches, PPOTrainer.batches = PPOTrainer.batches, counted
    for name, of_one in every.items():
        empty.clear()
        test_ranks.run_all(changed(of_one, runtime=FSDP), folder / name)
        found = torch.tensor(sum(empty))
        torch.distributed.all_reduce(found)
        assert (found > 0) == (name == "uneven"), name
    test_ranks.run_all(every["bf16"], folder / "bf16-ddp")


def test_other_settings_end_where_one_process_does(made_orders, adapters, tmp_path):  # noqa: F811
    every = {name: changed(made_orders, **settings) for name, settings in VARIANTS.items()} | {"lora": adapters}
    torch.multiprocessing.spawn(train_variants, (test_ranks.free_port(), every, tmp_path), nprocs=2)
    alone = tmp_path / "alone"
    for name, of_one in every.items():
        if name == "bf16":  # rounding to 8 bits depends on the micro-batch: beside DDP, which has the same
            test_ranks.ends_alike(tmp_path / name, tmp_path / "bf16-ddp", of_one)
            continue
        test_ranks.run_all(of_one, alone / name)
        test_ranks.ends_alike(tmp_path / name, alone / name, of_one)


# ---- interrupted


def interrupt_and_go_on(rank, port, orders, folder):
    test_ranks.be_a_rank(rank, port)
    sharded = changed(orders, runtime=FSDP)
    test_ranks.run_all(sharded, folder / "whole")
    for name, first, then in (
        ("fsdp-fsdp", sharded, sharded),
        ("ddp-fsdp", orders, sharded),
        ("fsdp-ddp", sharded, orders),
        ("fsdp-alone", sharded, None),
    ):
        for stage, order in first.items():
            with pytest.MonkeyPatch.context() as patch:
                for kind in (FastSFTTrainer, KWiseRewardTrainer, PPOTrainer):
                    patch.setattr(kind, "training_step", told_to_stop(kind.training_step, rank))
                with pytest.raises(SystemExit) as stopped:
                    test_ranks.run_all({stage: order}, folder / name)
            assert stopped.value.code == 75
        if then:
            test_ranks.run_all(then, folder / name)


def told_to_stop(step, rank):
    def training_step(self, *args, **options):
        if self.state.global_step == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **options)

    return training_step


@pytest.mark.parametrize("how", ["plain", "muon", "lora"])
def test_what_was_interrupted_ends_to_the_bit_and_with_other_processes_to_rounding(
    made_orders,  # noqa: F811
    adapters,
    tmp_path,
    how,
):
    orders = adapters if how == "lora" else changed(made_orders, **VARIANTS.get(how, {}))
    torch.multiprocessing.spawn(interrupt_and_go_on, (test_ranks.free_port(), orders, tmp_path), nprocs=2)
    test_ranks.run_all(orders, tmp_path / "fsdp-alone")
    for stage in orders:
        assert test_ranks.difference(tmp_path / "fsdp-fsdp" / stage, tmp_path / "whole" / stage) == 0
        for name in ("ddp-fsdp", "fsdp-ddp", "fsdp-alone"):
            largest = test_ranks.difference(tmp_path / name / stage, tmp_path / "whole" / stage)
            assert largest < 1e-5, (name, stage)
            print(name, stage, largest)
