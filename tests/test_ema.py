"""The moving average of the policy's weights. T12."""

import pytest
import tiny_models as tiny
import torch
from safetensors.torch import load_file
from test_ppo import distance, trained, trainer, weights
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from instructrl.trainers.ema import EMA


def test_after_n_updates_of_constant_weights_it_has_its_closed_form():
    """w_n + (w_0 - w_n) decay^n."""
    model = nn.Linear(3, 2).double()
    start = model.weight.detach().clone()
    ema = EMA(model, 0.992, every=1)
    model.weight.data.add_(1.5)
    for _ in range(125):
        ema.update()
    assert torch.allclose(ema.averages["weight"], start + 1.5 * (1 - 0.992**125), rtol=0, atol=1e-12)


def test_it_does_not_get_stuck_in_bfloat16():
    model = nn.Linear(3, 2).bfloat16()
    start = model.weight.detach().float()
    ema = EMA(model, 0.992, every=1)
    model.weight.data.add_(0.25)
    moved = model.weight.detach().float() - start
    for _ in range(1000):
        ema.update()
    assert torch.allclose(ema.averages["weight"] - start, moved * (1 - 0.992**1000), atol=1e-4)
    with ema.applied():
        assert model.weight.dtype == torch.bfloat16


class Weights(TrainerCallback):
    """The policy's weights after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.steps.append(weights(model.policy))


@pytest.mark.parametrize(("every", "stride"), [("iteration", 2), ("step", 1)])
def test_both_conventions_follow_the_policy(tmp_path, every, stride):
    seen = Weights()
    made = trainer(tmp_path, callbacks=[seen], total_episodes=32, ema_decay=0.6, ema_every=every)
    expected = weights(made.model.policy)
    made.train()
    assert len(seen.steps) == 8
    for step in range(stride - 1, 8, stride):
        expected = {name: 0.6 * mean + 0.4 * seen.steps[step][name] for name, mean in expected.items()}
    assert distance(made.ema.averages, expected) < 1e-6
    assert distance(made.ema.averages, weights(made.model.policy)) > 1e-4


def test_it_is_saved_as_a_model_and_the_policy_keeps_its_own_weights(tmp_path):
    made = trained(tmp_path, ema_decay=0.5)
    before = weights(made.model.policy)
    with made.ema.applied():
        made.model.policy.save_pretrained(tmp_path / "ema")
    saved = weights(AutoModelForCausalLM.from_pretrained(tmp_path / "ema"))
    assert distance(saved, made.ema.averages) == 0
    assert distance(before, weights(made.model.policy)) == 0
    made.save_model(str(tmp_path / "model"))
    assert distance(load_file(tmp_path / "model" / "ema.safetensors"), made.ema.averages) == 0


def test_evaluation_tells_both_and_disturbs_neither(tmp_path):
    held_out = [{"prompt_ids": ids} for ids in tiny.sequences(6, 1, 12, seed=5)]
    options = {"total_episodes": 32, "ema_decay": 0.9, "learning_rate": 1e-2}
    plain = trained(tmp_path / "plain", **options)
    made = trained(
        tmp_path / "evaluated", models={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=2, **options
    )
    assert distance(weights(plain.model), weights(made.model)) == 0
    lines = [line for line in made.state.log_history if "eval_objective/scores" in line]
    assert len(lines) == 4
    again = made.evaluate()
    assert again["eval_objective/scores"] == lines[-1]["eval_objective/scores"]
    with made.ema.applied():
        assert made.evaluate()["eval_objective/scores"] == pytest.approx(again["eval_ema_objective/scores"], abs=1e-6)
    assert again["eval_objective/kl"] > again["eval_ema_objective/kl"] > 0  # the average lags behind
    assert "eval_ema_objective/kl" not in trainer(tmp_path, ema_decay=0.0).evaluate(held_out)


def test_without_decay_there_is_none(tmp_path):
    made = trained(tmp_path, ema_decay=0.0)
    made.save_model(str(tmp_path / "model"))
    assert made.ema is None
    assert not (tmp_path / "model" / "ema.safetensors").exists()
