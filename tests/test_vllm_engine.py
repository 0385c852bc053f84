"""PPO with answers of vLLM itself: `make test-vllm` installs its build for CPUs. Each engine has a process of its own.

On a CPU vLLM computes in bfloat16, whatever the weights are.
"""

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the processes that are started below

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
]

MEAN, MOST = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))
PLUGIN = Path(__file__).parent / "vllm_plugin"
NEAR = 0.08  # nats a token, on average: what bfloat16 makes of these models, whose logits are large
WIDE = {"gpt2": {"n_embd": 64, "n_head": 2}, "llama": {"hidden_size": 64, "intermediate_size": 128}}  # heads of 32


def environment():
    found = os.pathsep.join([str(PLUGIN), *filter(None, [os.environ.get("PYTHONPATH")])])
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    small |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}  # compiling takes longer than these models
    return os.environ | small | {"PYTHONPATH": found, "HF_HUB_OFFLINE": "1", "VLLM_HOST_IP": "127.0.0.1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(folder, *options):
    """`vllm serve` of another model than any policy here: its address, once it answers."""
    import tiny_models as tiny

    folder.mkdir(parents=True, exist_ok=True)
    tiny.policy("llama", seed=9, **WIDE["llama"]).save_pretrained(folder / "served")
    tiny.tokenizer().save_pretrained(folder / "served")
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "served")]
    command += ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--enforce-eager", *options]
    with (folder / "server.log").open("w") as output:
        process = subprocess.Popen(
            command, env=environment() | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 240
            while not answers(f"{url}/health"):
                assert process.poll() is None, (folder / "server.log").read_text()[-3000:]
                assert time.monotonic() < deadline, "the server did not come up"
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def answers(url):
    with suppress(OSError):
        return urllib.request.urlopen(url, timeout=2).status == 200
    return False


def start(scenario, folder, ranks=1, **more):
    """Run a function below in processes of its own; what rank 0 returned. `more` is added to their environment."""
    folder.mkdir(parents=True, exist_ok=True)
    common = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | more
    processes = []
    for rank in range(ranks):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
        with (folder / f"{rank}.log").open("w") as output:
            command = [sys.executable, __file__, scenario, str(folder)]
            processes.append(subprocess.Popen(command, env=common | mine, stdout=output, stderr=subprocess.STDOUT))
    for rank, process in enumerate(processes):
        assert process.wait(timeout=300) == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return json.loads((folder / "found.json").read_text())


# ---- what runs in those processes ------------------------------------------------------------------------------------


def plain_matrices():
    """Have vLLM's build for CPUs keep matrices as they are: packed ones, its default there, cannot be loaded again."""
    from vllm import _custom_ops

    _custom_ops._supports_onednn = False


def made(folder, architecture="llama", models=None, **settings):
    import test_ppo
    import tiny_models as tiny

    other = folder / f"other-{os.environ.get('RANK', '0')}"
    tiny.policy(architecture, seed=9, **WIDE[architecture]).save_pretrained(other)
    tiny.tokenizer().save_pretrained(other)
    wide = {"model": tiny.policy(architecture, **WIDE[architecture])}
    options = {"learning_rate": 1e-2, "total_episodes": 24, "use_vllm": True, "vllm_model": str(other)}
    return test_ppo.trainer(folder, architecture, models=wide | (models or {}), **options | settings)


def log(trained):
    lines = [line for line in trained.state.log_history if MEAN in line]
    return [{MEAN: line[MEAN], MOST: line[MOST], "kl": line["objective/kl_k3"]} for line in lines]


def iterations(architecture):
    def scenario(folder):
        trained = made(folder, architecture)
        trained.train()
        return log(trained)

    return scenario


def adapter(folder):
    import torch
    from peft import LoraConfig
    from test_ppo import weights

    from instructrl.stages.lora import merged_weights

    peft = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    trained = made(folder, "gpt2", {"peft_config": peft, "plain_weights": merged_weights}, learning_rate=3e-2)
    before = weights(trained.model.policy)
    trained.train()
    after = weights(trained.model.policy)
    same = all(torch.equal(before[name], after[name]) for name in before if ".lora_" not in name)
    return {"same": same, "log": log(trained)}


def stale(folder):
    from instructrl.trainers.engine import Engine
    from instructrl.trainers.rollout import RolloutError

    trained, synced, calls = made(folder), Engine.sync_weights, []

    def once(self):
        calls.append(1)
        if len(calls) == 1:
            synced(self)

    Engine.sync_weights = once
    try:
        trained.train()
    except RolloutError as error:
        return {"step": trained.state.global_step, "message": str(error)}
    return {}


def contract(folder):
    """A policy that likes padding and its end."""
    import tiny_models as tiny
    import torch

    trained = made(folder, stop_token_id=5, response_length=12, temperature=0.7)
    with torch.no_grad():
        head = trained.model.policy.get_output_embeddings().weight
        head[tiny.PAD] = 5 * head[7]
        head[tiny.EOS] = 1.2 * head[7]
        head[5] = head[7]
    episodes = trained.sample_and_score(trained.prompts, list(range(11)), "here")
    return {"responses": episodes.responses, "ended": episodes.ended.tolist()}


def seeds(folder):
    trained = made(folder)
    streams = (("sampling", 0), ("sampling", 0), ("sampling", 1))
    return [trained.sample_and_score(trained.prompts, [0, 0, 1], *stream).responses for stream in streams]


def two_ranks(folder):
    trained = made(folder, **where(), **({"ddp_backend": "gloo"} if "RANK" in os.environ else {}))
    trained.train()
    found = trained.evaluate([{"prompt_ids": [3, 4]}, {"prompt_ids": [5]}, {"prompt_ids": [6, 7, 8]}])  # not for both
    return {"log": log(trained), "held_out": found["eval_completions/mean_length"]}


def server(folder):
    """Its weights reach `vllm serve` as TRL sends them, but for NCCL."""
    import store_engine

    store_engine.take_the_place_of_nccl()
    return two_ranks(folder)


def refused_by_server(folder):
    from instructrl.trainers.rollout import RolloutError

    if os.environ.get("STORE"):
        import store_engine

        store_engine.take_the_place_of_nccl()
    try:
        made(folder, **where())
    except RolloutError as error:
        return str(error)
    return ""


def where():
    """The settings of a server, if there is one."""
    url = os.environ.get("SERVER")
    port = int(os.environ.get("GROUP_PORT", 0))
    told = {"vllm_mode": "server", "vllm_server_base_url": url, "vllm_server_timeout": 1.0, "vllm_group_port": port}
    return told if url else {}


def stage(folder):
    """`ppo_ptx`, from artifacts to artifacts."""
    from test_ppo_stage import recipe

    from instructrl.config import Runtime
    from instructrl.stages import ppo

    runtime = Runtime(threads=1, device="cpu", rollouts="vllm")
    return ppo.run("ppo_ptx", recipe().model_copy(update={"runtime": runtime}), artifacts(folder), folder)


def artifacts(folder):
    """Those of data, sft and reward_model, as in test_ppo_stage with a wider model."""
    import test_ppo_stage

    test_ppo_stage.SIZE |= {"hidden_size": 64}
    return test_ppo_stage.make_inputs(folder / "inputs")


SCENARIOS = {
    "gpt2": iterations("gpt2"),
    "llama": iterations("llama"),
    "adapter": adapter,
    "stale": stale,
    "contract": contract,
    "seeds": seeds,
    "two_ranks": two_ranks,
    "server": server,
    "refused_by_server": refused_by_server,
    "stage": stage,
}


# ---- and what came of it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_every_iteration_is_answered_by_the_policy_as_it_is_then(tmp_path, architecture):
    lines = start(architecture, tmp_path)
    assert len(lines) == 3
    assert lines[-1]["kl"] > 0.05  # the policy has moved
    assert [0 < line[MEAN] < NEAR for line in lines] == [True] * 3


def test_an_adapter_reaches_vllm_merged_and_the_policy_stays_as_it_is(tmp_path):
    found = start("adapter", tmp_path)
    assert found["same"]
    assert found["log"][-1]["kl"] > 0.05
    assert [0 < line[MEAN] < NEAR for line in found["log"]] == [True] * 3


def test_stale_weights_are_refused(tmp_path):
    found = start("stale", tmp_path)
    assert found["step"] in (2, 4)  # after an iteration or two
    assert "differ from the policy's" in found["message"]


def test_a_response_ends_with_the_stop_token_and_never_holds_padding(tmp_path):
    found = start("contract", tmp_path)
    assert len(found["responses"]) == 11
    assert not any(1 in response for response in found["responses"])
    assert any(0 in response[:-1] for response in found["responses"])  # EOS is a token like others here
    assert any(found["ended"])
    for response, ended in zip(found["responses"], found["ended"], strict=True):
        assert ended == (response[-1] == 5)
        assert 5 not in response[:-1]


def test_a_seed_is_a_run(tmp_path):
    first, again, next_one = start("seeds", tmp_path)
    assert first == again != next_one
    assert first[0] != first[1]  # one prompt's samples


def test_two_ranks_have_an_engine_each(tmp_path):
    found = start("two_ranks", tmp_path, ranks=2)
    assert [0 < line[MEAN] < NEAR for line in found["log"]] == [True] * 3
    assert found["held_out"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_server_is_given_the_weights_and_answers_all_ranks(tmp_path, ranks):
    transfer = ["--weight-transfer-config", '{"backend": "store"}', "--logprobs-mode", "processed_logprobs"]
    with served(tmp_path / "server", *transfer) as url:
        found = start("server", tmp_path, ranks, SERVER=url, GROUP_PORT=str(free_port()))
    assert found["log"][-1]["kl"] > 0.05
    assert [0 < line[MEAN] < NEAR for line in found["log"]] == [True] * 3
    assert found["held_out"] > 0


def test_a_server_that_cannot_do_it_is_refused_in_a_sentence(tmp_path):
    none = f"http://127.0.0.1:{free_port()}"
    said = start("refused_by_server", tmp_path / "a", SERVER=none, GROUP_PORT=str(free_port()))
    assert said.startswith(f"the vLLM server at {none}: The vLLM server can't be reached")
    transfer = ["--weight-transfer-config", '{"backend": "store"}']
    with served(tmp_path / "server", *transfer) as url:
        said = start("refused_by_server", tmp_path / "b", SERVER=url, GROUP_PORT=str(free_port()))
        assert "Weight synchronization runs on vLLM's NCCL weight-transfer engine, which needs a CUDA device" in said
        said = start("refused_by_server", tmp_path / "c", SERVER=url, GROUP_PORT=str(free_port()), STORE="1")
        assert "it runs with --logprobs-mode raw_logprobs: restart it with processed_logprobs" in said


def test_the_stage_trains(tmp_path):
    metrics = start("stage", tmp_path)
    assert metrics["iterations"] == 3
    assert 0 < metrics["logprob_difference"] < NEAR
    assert (tmp_path / "model" / "model.safetensors").exists()


if __name__ == "__main__":
    random.seed(0)
    plain_matrices()
    found = SCENARIOS[sys.argv[1]](Path(sys.argv[2]))
    if os.environ.get("RANK", "0") == "0":
        (Path(sys.argv[2]) / "found.json").write_text(json.dumps(found))
