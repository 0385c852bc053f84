"""`backend: trl`: TRL's own PPOTrainer through our stage where trl 1.12 is installed, and one sentence elsewhere."""

import json
import subprocess
import sys

import pytest
import torch
import trl
from test_ppo_stage import inputs, recipe  # noqa: F401
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from instructrl import pipeline
from instructrl.artifacts import Store
from instructrl.config import PPO, Runtime
from instructrl.errors import StageFailed, UserError
from instructrl.launch import check_trainers
from instructrl.plan import make_plan
from instructrl.stages import models, ppo, trl_ppo
from instructrl.stages.contract import Contract
from instructrl.stages.snapshots import kept
from instructrl.trainers.ema import EMA

try:
    HAS_PPO = bool(trl_ppo.trl_ppo())
except UserError:
    HAS_PPO = False
only_old = pytest.mark.skipif(not HAS_PPO, reason=f"trl {trl.__version__} has no PPOTrainer: see make test-trl-min")
only_new = pytest.mark.skipif(HAS_PPO, reason=f"trl {trl.__version__} has a PPOTrainer")
LONGEST = 1024 + 8  # tokens of a prompt and a response in `recipe`
GIVEN = {  # keys that reach TRL otherwise than under their own name
    "backend",
    "init",
    "ema_decay",
    "snapshots",
    "batch_size",
    "learning_rate",
    "critic_learning_rate",
    "warmup_iterations",
    "max_grad_norm",
    "adam_beta2",
}
UNUSED = {
    "kl_horizon",
    "ptx_ratio",
    "ptx_max_length",
    "ptx_normalization",
}  # mean nothing without kl_target and ptx_coef


def wanting(max_tokens=8 * LONGEST, checkpointing=False, **changes):
    """A recipe whose `ppo` asks for TRL's trainer, with room for 8 episodes in a forward pass."""
    runtime = Runtime(threads=1, device="cpu", max_tokens=max_tokens, gradient_checkpointing=checkpointing)
    return recipe(backend="trl", **changes).model_copy(update={"runtime": runtime})


def weights(kind, folder):
    return dict(kind.from_pretrained(folder).named_parameters())


# ---- what it refuses -------------------------------------------------------------------------------------------------


def test_every_key_is_passed_on_or_refused():
    """A new key of the section must find its place here and in `trl_ppo`."""
    assert set(PPO.model_fields) == set(trl_ppo.PASSED) | GIVEN | set(trl_ppo.LACKS) | UNUSED


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"ptx_coef": 27.8}, r"ppo\.ptx_coef=27\.8: TRL's PPOTrainer has no pretraining loss; set ppo\.ptx_coef=0\.0"),
        ({"whiten_advantages": False}, r"ppo\.whiten_advantages=False: TRL's PPOTrainer always whitens"),
        ({"num_mini_batches": 4, "whiten_rewards": True}, r"ppo\.whiten_rewards=True.*lower ppo\.num_mini_batches=4"),
        (
            {"max_tokens": 8 * LONGEST - 1},
            rf"a minibatch of 8 episodes of up to {LONGEST} tokens exceeds runtime\.max_tokens={8 * LONGEST - 1}, and "
            rf"TRL ignores num_mini_batches when it accumulates gradients; set runtime\.max_tokens={8 * LONGEST} or "
            r"ppo\.num_mini_batches=1",
        ),
    ],
    ids=["ptx", "advantages", "rewards", "accumulation"],
)
def test_what_trl_cannot_do_is_one_sentence(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        ppo.check(wanting(**changes))


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"ppo\.backend=trl runs in one process"):
        trl_ppo.check("ppo", wanting())


@only_new
def test_a_newer_trl_is_one_sentence():
    sentence = (
        rf"ppo\.backend=trl needs TRL's PPOTrainer, which trl {trl.__version__} no longer has: install trl==1\.12"
    )
    with pytest.raises(UserError, match=sentence):
        ppo.check(wanting())


def test_it_is_refused_before_anything_trains(tmp_path):
    settings = wanting(ptx_coef=1.0)
    pipe = pipeline.stages(settings)
    plan = make_plan(pipe, settings, ["ppo"], Store(tmp_path), [], {})
    with pytest.raises(UserError, match=r"^ppo\.ptx_coef=1\.0: TRL's"):
        check_trainers(plan, settings)
    check_trainers(plan, recipe())


def test_our_trainer_needs_nothing_of_trls():
    code = (
        "import sys; from instructrl.stages import ppo; import instructrl.trainers.ppo\n"
        "sys.exit('instructrl.stages.trl_ppo' in sys.modules or any(m.startswith('trl.exp') for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- what it does ----------------------------------------------------------------------------------------------------


@only_old
@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_stage_writes_what_ours_does(inputs, tmp_path, minibatches):  # noqa: F811
    """One minibatch does not fit into a forward pass: TRL accumulates gradients."""
    asked = wanting(num_mini_batches=minibatches, num_ppo_epochs=2, snapshots=2)
    metrics = ppo.run("ppo", asked, inputs, tmp_path)
    assert metrics["iterations"] == 3
    snapshots = {n: weights(AutoModelForCausalLM, path) for n, path in kept(tmp_path).items()}
    assert snapshots.keys() == {1, 2}
    assert any(not torch.equal(snapshots[1][name], snapshots[2][name]) for name in snapshots[1])
    assert metrics["optimizer_steps"] == 3 * 2 * minibatches
    assert (metrics["prompts"], metrics["dropped"]) == (40, 1)
    assert 1 <= metrics["length"] <= 8
    assert set(metrics["seconds"]) == {"rollout", "rest"}
    json.dumps(metrics, allow_nan=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["episode"] for line in lines] == [16, 32, 48]
    assert [line["step"] for line in lines] == [2 * minibatches * n for n in (1, 2, 3)]
    assert lines[0]["objective/scores"] == metrics["initial_score"]
    assert json.loads((tmp_path / "progress.json").read_text())["step"] == 6 * minibatches
    for kind, before, after in (
        (AutoModelForCausalLM, inputs["sft"] / "model", tmp_path / "model"),
        (AutoModelForSequenceClassification, inputs["reward_model"] / "model", tmp_path / "critic"),
    ):
        old, new = weights(kind, before), weights(kind, after)
        assert set(old) == set(new)
        assert any(not torch.equal(old[name], new[name]) for name in old)
    assert Contract.load(tmp_path / "model").template == "{prompt}\n"


@only_old
def test_the_log_means_what_ours_does(inputs, tmp_path):  # noqa: F811
    """The score is logged before the penalty for a missing EOS, as ours."""
    logs = []
    for penalty in (0.0, 3.0):
        folder = tmp_path / str(penalty)
        folder.mkdir()
        ppo.run("ppo", wanting(missing_eos_penalty=penalty), inputs, folder)
        logs.append(json.loads((folder / "log.jsonl").read_text().splitlines()[0]))
    without, with_penalty = logs
    unended = 1 - without["val/num_eos_tokens"] / 16
    assert unended > 0
    assert with_penalty["objective/scores"] == pytest.approx(without["objective/scores"], abs=1e-6)
    assert with_penalty["objective/rlhf_reward"] == pytest.approx(without["objective/rlhf_reward"] - 3 * unended)
    for name in ("loss/policy_avg", "objective/kl", "objective/entropy", "loss"):
        assert name in without
    assert "policy/approxkl_avg" not in without  # TRL's is over padding, too


@only_old
def test_a_run_that_was_stopped_starts_again_and_says_so(inputs, tmp_path, capsys):  # noqa: F811
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    ppo.run("ppo", wanting(), inputs, whole)
    assert "cannot resume" not in capsys.readouterr().out
    (again / "log.jsonl").write_text('{"step": 2, "episode": 16}\n{"step": 4, "epi')
    ppo.run("ppo", wanting(), inputs, again)
    assert "TRL's PPOTrainer cannot resume: it starts again from the beginning." in capsys.readouterr().out
    for file in ("model/model.safetensors", "critic/model.safetensors"):
        assert (whole / file).read_bytes() == (again / file).read_bytes()
    steps = [json.loads(line)["step"] for line in (again / "log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6]


@only_old
def test_checkpointing_changes_memory_only(inputs, tmp_path):  # noqa: F811
    folders = [tmp_path / "plain", tmp_path / "checkpointing"]
    for folder in folders:
        folder.mkdir()
        ppo.run("ppo", wanting(checkpointing=folder.name == "checkpointing"), inputs, folder)
    one, other = (weights(AutoModelForCausalLM, folder / "model") for folder in folders)
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@only_old
def test_a_batch_may_be_larger_than_a_pass_over_the_prompts(inputs, tmp_path):  # noqa: F811
    metrics = ppo.run("ppo", wanting(max_tokens=50 * LONGEST, batch_size=48, num_mini_batches=1), inputs, tmp_path)
    assert (metrics["prompts"], metrics["iterations"]) == (40, 1)


@only_old
def test_the_models_own_sampling_settings_are_set_aside(inputs, tmp_path):  # noqa: F811
    """A repetition penalty would sample from another distribution than the one scored; the policy keeps it."""
    policy = models.load_policy(inputs["sft"] / "model", recipe())
    eos = policy.generation_config.eos_token_id
    policy.generation_config.update(repetition_penalty=1.5, eos_token_id=[eos, 7])
    changed = tmp_path / "sft"
    models.save(policy, Contract.load(inputs["sft"] / "model"), changed / "model")
    ppo.run("ppo", wanting(num_mini_batches=1, max_tokens=99 * LONGEST), inputs | {"sft": changed}, tmp_path)
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert first["trl/val/ratio"] == pytest.approx(1, abs=1e-5)
    assert first["objective/kl"] == pytest.approx(0, abs=1e-4)
    kept = models.load_policy(tmp_path / "model", recipe()).generation_config
    assert (kept.repetition_penalty, kept.eos_token_id) == (1.5, [eos, 7])


@only_old
def test_a_callback_averages_the_weights(inputs, tmp_path):  # noqa: F811
    """With decay 0 the average after the last iteration is the trained policy."""
    settings, tokenizer = wanting(), Contract.load(inputs["sft"] / "model").tokenizer
    policy = models.load_policy(inputs["sft"] / "model", settings)
    critic, reward_model = (models.load_reward_model(inputs["reward_model"] / "model", settings)[0] for _ in range(2))
    prompts, _ = ppo.read_prompts("ppo", settings, inputs["data"], Contract.load(inputs["sft"] / "model"), policy)
    ema = EMA(policy, decay=0.0, every=1)
    before = {name: average.clone() for name, average in ema.averages.items()}
    trl_ppo.train("ppo", settings, tmp_path, tokenizer, policy, critic, reward_model, 0.0, prompts, callbacks=[ema])
    assert all(torch.equal(ema.averages[name], p) for name, p in policy.named_parameters())
    assert any(not torch.equal(ema.averages[name], before[name]) for name in before)


@only_old
def test_a_diverged_run_stops(inputs, tmp_path):  # noqa: F811
    with pytest.raises(StageFailed, match="training diverged: the loss is"):
        ppo.run("ppo", wanting(critic_learning_rate=1e30, warmup_iterations=0), inputs, tmp_path)
