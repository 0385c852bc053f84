"""PPO with vLLM's answers: through TRL's own code, on an engine that is a transformers model (`transformers_llm.py`).

`test_vllm_engine.py` is the same on vLLM itself.
"""

import importlib.util
import json
import socket

import pytest
import test_ppo_stage
import tiny_models as tiny
import torch
from peft import LoraConfig
from pydantic import ValidationError
from test_ppo import PROMPTS, distance, log, trainer, weights
from test_ppo_stage import inputs  # noqa: F401 (a fixture)
from transformers_llm import LLM, SamplingParams
from trl.generation import vllm_client, vllm_generation

from instructrl.config import Recipe, Runtime
from instructrl.errors import StageFailed
from instructrl.stages import lora, ppo
from instructrl.trainers import engine
from instructrl.trainers.rollout import RolloutError

MEAN, MOST = (f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max"))
FAST = {"learning_rate": 1e-2}  # two iterations
without_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")


@pytest.fixture
def exact(monkeypatch):
    """TRL finds a vLLM, which computes in float32."""
    return installed(monkeypatch, torch.float32)


def installed(monkeypatch, dtype):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, {"WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}.get(name, "0"))
    monkeypatch.setattr(engine, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "LLM", lambda *a, **k: LLM(*a, dtype=dtype, **k), raising=False)
    monkeypatch.setattr(vllm_generation, "SamplingParams", SamplingParams, raising=False)


def made(folder, architecture="llama", **settings):
    """A trainer whose vLLM starts from another model than the policy is: only what it is given makes them agree."""
    tiny.policy(architecture, seed=9).save_pretrained(folder / "other")
    return trainer(folder, architecture, use_vllm=True, vllm_model=str(folder / "other"), **FAST | settings)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_iteration_is_answered_by_the_policy_as_it_is_then(tmp_path, exact, architecture):
    trained = made(tmp_path, architecture)
    trained.train()
    llm, lines = trained.engine.llm, log(trained)
    assert len(llm.asked) == llm.resets == len(lines) == 2
    assert [line[MOST] < 1e-4 for line in lines] == [True] * 2
    assert lines[-1]["objective/kl_k3"] > 0.01  # the policy has moved
    assert llm.options["max_model_len"] == max(len(row["prompt_ids"]) for row in PROMPTS) + 8


def test_prompts_and_the_text_contract_reach_vllm(tmp_path, exact):
    trained = made(tmp_path, temperature=0.7, response_length=5)
    trained.train()
    prompts, asked = trained.engine.llm.asked[0]
    numbers = trained.prompt_order.rows(0, 8)
    assert prompts == [{"prompt_token_ids": PROMPTS[number]["prompt_ids"]} for number in numbers]
    assert asked == SamplingParams(
        temperature=0.7,
        max_tokens=5,
        logprobs=0,
        stop_token_ids=[tiny.EOS],
        ignore_eos=True,
        logit_bias={tiny.PAD: -100.0},
    )
    assert log(trained)[0][MOST] < 1e-4  # of the softmax at that temperature, without the padding token


def test_a_response_ends_with_the_stop_token_and_never_holds_padding(tmp_path, exact):
    trained = made(tmp_path, stop_token_id=5, response_length=12)
    with torch.no_grad():
        trained.model.policy.get_output_embeddings().weight[[tiny.PAD, 5]] *= 4
    episodes = trained.experience(0)
    assert not any(tiny.PAD in response for response in episodes.responses)
    assert any(tiny.EOS in response[:-1] for response in episodes.responses)
    for response, ended in zip(episodes.responses, episodes.ended.tolist(), strict=True):
        assert ended == (response[-1] == 5)
        assert 5 not in response[:-1]


def test_the_ratio_knows_only_our_own_logprobs(tmp_path, monkeypatch):
    """In bfloat16 vLLM's are others; those of the policy, computed here in one forward pass, are what counts."""
    installed(monkeypatch, torch.bfloat16)
    trained = made(tmp_path, num_mini_batches=1)
    policy = trained.model.policy
    episodes = trained.experience(0)
    for row, (sequence, start) in enumerate(zip(episodes.sequences, episodes.prompt_lengths, strict=True)):
        with torch.no_grad():
            logits = policy(torch.tensor([sequence])).logits[0]
        logits[:, tiny.PAD] = float("-inf")
        every = torch.log_softmax(logits, dim=-1)
        own = [float(every[place - 1, sequence[place]]) for place in range(start, len(sequence))]
        kept = episodes.old_logprobs[row][episodes.mask[row]]
        assert kept.tolist() == pytest.approx(own, abs=1e-5)
    found = (episodes.sampler_logprobs - episodes.old_logprobs)[episodes.mask].abs().tolist()
    mean = sum(found) / len(found)
    assert mean > 1e-3
    assert [float(trained.stats[name][0]) for name in (MEAN, MOST)] == pytest.approx([mean, max(found)])
    trained.train()
    assert [line["val/ratio"] for line in log(trained)] == pytest.approx([1] * 2, abs=1e-5)


def test_stale_weights_are_refused(tmp_path, exact, monkeypatch):
    trained = made(tmp_path, vllm_max_logprob_difference=0.02)
    synced = engine.Engine.sync_weights
    monkeypatch.setattr(engine.Engine, "sync_weights", lambda self: None if self.llm.resets else synced(self))
    with pytest.raises(RolloutError, match=r"differ from the policy's by 0.*vllm_max_logprob_difference=0.02.*weights"):
        trained.train()
    assert trained.state.global_step == 2  # the first iteration was as it should be


def test_an_adapter_reaches_vllm_merged_and_the_policy_stays_as_it_is(tmp_path, exact):
    settings = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    options = {"models": {"peft_config": settings, "plain_weights": lora.merged_weights}}
    trained = made(tmp_path, **options)
    before = weights(trained.model)
    trained.train()
    after, llm = weights(trained.model), trained.engine.llm
    assert all(torch.equal(after[name], before[name]) for name in before if "policy" in name and ".lora_" not in name)
    assert [line[MOST] < 1e-4 for line in log(trained)] == [True] * 2
    trained.engine.sync_weights()
    merged = lora.merged_weights(trained.model.policy)
    assert distance(weights(llm.model), merged) == 0
    assert distance(weights(tiny.policy("llama")), merged) > 1e-3
    with pytest.raises(ValueError, match="pass plain_weights"):
        made(tmp_path, models={"peft_config": settings})


def test_the_moving_average_is_what_answers_where_it_is_applied(tmp_path, exact):
    trained = made(tmp_path, ema_decay=0.5, total_episodes=8)
    trained.train()
    found = trained.evaluate(PROMPTS[:3])
    assert found["eval_ema_objective/kl"] != found["eval_objective/kl"]
    trained.engine.sync_weights()
    assert distance(weights(trained.engine.llm.model), weights(trained.model.policy)) == 0


def test_a_seed_is_a_run_and_global_generators_are_left_alone(tmp_path, exact):
    said = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        trained = made(tmp_path / name, seed=seed)
        torch.manual_seed(len(said))
        before = torch.get_rng_state()
        said.append(
            [trained.sample_and_score(trained.prompts, [0, 1, 2], "sampling", step).responses for step in (0, 1)]
        )
        assert torch.equal(torch.get_rng_state(), before)
    assert said[0] == said[1] != said[2]
    assert said[0][0] != said[0][1]


def test_a_server_that_is_not_there_is_named(tmp_path, exact, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    with socket.socket() as probe:  # bound, and not listening
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(RolloutError, match=f"^the vLLM server at {url}: The vLLM server can't be reached"):
            made(tmp_path, vllm_mode="server", vllm_server_base_url=url, vllm_server_timeout=1e-6)


# ---- the stage -------------------------------------------------------------------------------------------------------


def asking_for_vllm(**vllm):
    found = test_ppo_stage.recipe()
    runtime = Runtime.model_validate({"threads": 1, "device": "cpu", "rollouts": "vllm", "vllm": vllm})
    return found.model_copy(update={"runtime": runtime})


def test_the_stage_says_how_far_vllm_is_from_the_policy(inputs, tmp_path, exact):  # noqa: F811
    metrics = ppo.run("ppo_ptx", asking_for_vllm(), inputs, tmp_path)
    assert 0 < metrics["logprob_difference"] < 1e-5
    assert metrics["held_out"]["length"] > 0


def test_the_stage_refuses_a_large_difference_by_its_key(inputs, tmp_path, monkeypatch):  # noqa: F811
    installed(monkeypatch, torch.bfloat16)
    with pytest.raises(StageFailed, match=r"more than runtime\.vllm\.max_logprob_difference=1e-06: does it have"):
        ppo.run("ppo", asking_for_vllm(max_logprob_difference=1e-6), inputs, tmp_path)


@without_vllm
def test_the_stage_says_what_to_install(inputs, tmp_path):  # noqa: F811
    with pytest.raises(StageFailed, match=r"^runtime.rollouts=vllm needs vLLM.*pip install 'instructrl\[vllm\]'"):
        ppo.run("ppo", asking_for_vllm(), inputs, tmp_path)


@without_vllm
def test_a_missing_vllm_is_missed_before_anything_runs(instructrl, here):
    done = instructrl("run-all", "recipe=base.yaml", "runtime.rollouts=vllm")
    assert (done.code, done.out) == (2, "")
    assert "pip install 'instructrl[vllm]', or set runtime.rollouts=transformers" in done.err
    assert not (here / "artifacts" / "data").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"runtime": {"jobs": 2, "vllm": {"mode": "server"}}}, "a vLLM server holds one policy at a time"),
        ({"runtime": {"device": "cpu", "vllm": {"mode": "server"}}}, "needs a CUDA device"),
        ({"runtime": {"vllm": {"tensor_parallel_size": 2}}}, "does not divide the stage's 1 processes"),
        ({"ppo": {"init": "sft", "backend": "trl"}}, "needs ppo.backend=instructrl"),
        ({"model": {"path": None, "lora": {"quantization": "nf4"}}}, "is not for model.lora.quantization"),
        ({"runtime": {"vllm": {"server_base_url": "localhost:8000"}}}, "server_base_url"),
    ],
)
def test_what_vllm_cannot_do_is_refused(changes, sentence):
    base = {"model": {"path": None}, "data": {"world": {}}, "eval": {"judge": "gold"}}
    asked = base | changes | {"runtime": {"rollouts": "vllm"} | changes.get("runtime", {})}
    with pytest.raises(ValidationError, match=sentence):
        Recipe.model_validate(asked)


def test_a_resumed_stage_says_that_the_bits_may_differ(instructrl, here, fakes):
    (here / "script.json").write_text(json.dumps({"ppo": {"steps": 2, "end": "crash"}}))
    command = ("ppo", "recipe=base.yaml", "runtime.rollouts=vllm")
    assert "does not end with the same bits" not in instructrl(*command).out
    (here / "script.json").write_text("{}")
    done = instructrl(*command)
    assert done.code == 0
    assert "ppo: goes on from a checkpoint; vLLM may sample other responses" in done.out


def test_a_stage_that_vllm_began_says_so_wherever_it_ends(instructrl, here, fakes):
    (here / "script.json").write_text(json.dumps({"ppo": {"steps": 2, "end": "crash"}}))
    instructrl("ppo", "recipe=base.yaml", "runtime.rollouts=vllm")
    (here / "script.json").write_text("{}")
    done = instructrl("ppo", "recipe=base.yaml")
    assert done.code == 0
    assert "vLLM may sample other responses" in done.out
    shown = json.loads(instructrl("show", "ppo", "recipe=base.yaml", "--json").out)
    assert shown["made"]["rollouts"] == "vllm"
    assert "rollouts" not in json.loads(instructrl("show", "sft", "recipe=base.yaml", "--json").out)["made"]
