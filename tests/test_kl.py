"""The KL controller against Ziegler et al. 2019, section 2.2, by hand, and in the trainer."""

import pytest
from test_ppo import log, trained

from instructrl.trainers.kl import KLController


def test_without_a_target_the_coefficient_stays():
    controller = KLController(0.02)
    controller.update(kl=1000.0, episodes=512)
    assert controller.coef == 0.02


@pytest.mark.parametrize(("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (100.0, 0.2), (5.4, -0.1), (-3.0, -0.2)])
def test_it_moves_by_the_clipped_error(kl, error):
    controller = KLController(0.15, target=6.0, horizon=10_000)
    controller.update(kl, episodes=512)
    assert controller.coef == pytest.approx(0.15 * (1 + error * 512 / 10_000), rel=1e-12)


def test_the_trainer_rewards_with_the_coefficient_of_the_iteration_before(tmp_path):
    made = trained(tmp_path, total_episodes=48, learning_rate=1e-2, kl_coef=0.1, kl_target=0.01, kl_horizon=20)
    lines, expected = log(made), 0.1
    for line in lines:
        assert line["objective/kl_coef"] == pytest.approx(expected, rel=1e-6)
        assert line["objective/non_score_reward"] == pytest.approx(-expected * line["objective/kl"], rel=1e-4, abs=1e-7)
        expected *= 1 + min(max(line["objective/kl"] / 0.01 - 1, -0.2), 0.2) * 8 / 20
    assert made.kl.coef == pytest.approx(expected, rel=1e-6)
    assert lines[-1]["objective/kl_coef"] > 0.1


@pytest.mark.slow
def test_it_holds_the_policy_near_the_target(tmp_path):
    """A reward for one token, which a policy with a weak penalty would soon say all the time."""

    def reward(completion_ids, **_):
        return [ids.count(7) for ids in completion_ids]

    options = {"batch_size": 64, "num_mini_batches": 2, "total_episodes": 64 * 40, "learning_rate": 5e-3}
    options |= {"response_length": 4, "missing_eos_penalty": 0.0, "max_tokens": 10_000, "kl_coef": 0.05}
    models = {"reward_model": None, "reward_funcs": [reward]}
    free = log(trained(tmp_path, models=models, **options))
    held = log(trained(tmp_path, models=models, **options | {"kl_coef": 0.3, "kl_target": 1.0, "kl_horizon": 300}))
    late = [sum(line["objective/kl"] for line in lines[-10:]) / 10 for lines in (free, held)]
    assert late[0] > 8
    assert late[1] == pytest.approx(1.0, abs=0.4)
