"""Two processes do what one does: prompts, sampling, whitening, minibatches and both gradients are over all of them."""

import socket
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started below

import test_ppo

OPTIONS = {"ptx_coef": 0.5, "ptx_ratio": 2.0, "num_ppo_epochs": 2, "whiten_rewards": True, "ddp_backend": "gloo"}
OPTIONS |= {"total_episodes": 32, "kl_target": 0.01, "kl_horizon": 30, "ema_decay": 0.9}


def train(rank, port, folder):
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, str(value))
        torch.set_num_threads(1)
        made = test_ppo.trained(folder, **OPTIONS)
        evaluated = made.evaluate(test_ppo.PROMPTS)  # 11: one process answers more than the other
        if rank == 0:
            made.save_model()
            line = test_ppo.log(made)[-1]
            numbers = {name: value for name, value in line.items() if "seconds" not in name and name != "eps"}
            policy, critic = test_ppo.weights(made.model.policy), test_ppo.weights(made.model.critic)
            torch.save((policy, critic, dict(made.ema.averages), made.kl.coef, numbers, evaluated), folder / "end")


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, tmp_path), nprocs=2)
    policy, critic, averages, kl_coef, numbers, evaluated = torch.load(tmp_path / "end", weights_only=True)
    alone = test_ppo.trained(tmp_path, **OPTIONS | {"ddp_backend": None})
    strip = {name.removeprefix("module."): p for name, p in alone.model.policy.named_parameters()}
    assert max((policy[name] - p).abs().max().item() for name, p in strip.items()) < 1e-5
    assert test_ppo.distance(critic, test_ppo.weights(alone.model.critic)) < 1e-5
    assert test_ppo.distance(averages, alone.ema.averages) < 1e-5
    assert kl_coef == pytest.approx(alone.kl.coef, rel=1e-4)
    assert kl_coef != alone.args.kl_coef
    for name, value in numbers.items():
        assert test_ppo.log(alone)[-1][name] == pytest.approx(value, abs=1e-4), name
    assert evaluated == pytest.approx(alone.evaluate(test_ppo.PROMPTS), abs=1e-3)
