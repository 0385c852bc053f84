"""What `test_ppo.py` holds to on the CPU, held to on a GPU."""

import math

import pytest
import test_ppo as on_cpu
import tiny_models as tiny
import torch

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
