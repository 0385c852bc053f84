"""What the benchmarks count, against a count by hand. What they measure is theirs alone."""

from pathlib import Path

import pytest

WORKLOAD = {"epochs": 2}
PROMPTS, RESPONSES = (5, 9), (4, 2)


@pytest.fixture
def floor(monkeypatch):
    """The floor with one second for each multiplication, so that it counts them."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
    import ppo_floor

    monkeypatch.setattr(ppo_floor, "seconds", lambda rows, inner, columns: rows * inner * columns)
    return ppo_floor


def test_the_floor_counts_the_products_of_one_iteration(floor):
    import models

    (width, layers), vocabulary = models.SMALL, 300
    model = floor.Products.of(models.policy("gpt2", vocabulary, 0.1), layers, width)
    trunk, head = 12 * layers * width**2, width * vocabulary  # a token; GPT-2: 3 + 1 in attention, 4 + 4 in the MLP
    read = [p + r - 1 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    tokens, predicted = sum(read), sum(RESPONSES)

    def attention(lengths):
        return sum(layers * width * length**2 for length in lengths)  # half of Q K' and half of P V

    sampling = (sum(PROMPTS) + predicted - 2) * trunk + predicted * head + attention(PROMPTS)
    reading = (3 * tokens + 2) * trunk + predicted * head + 3 * attention(read)  # reference, critic, reward model
    update = 3 * (2 * tokens * trunk + predicted * head + 2 * attention(read))  # forward, and twice that backward
    lengths = [list(pair) for pair in zip(PROMPTS, RESPONSES, strict=True)]
    counted = floor.iteration(WORKLOAD, model, model, lengths, examples=[])
    assert counted == pytest.approx(sampling + reading + 2 * update)

    examples = [7, 4]  # of which the last token predicts nothing
    pretraining = 3 * (9 * (trunk + head) + attention([6, 3]))
    counted = floor.iteration(WORKLOAD, model, model, lengths, examples)
    assert counted == pytest.approx(sampling + reading + 2 * update + pretraining)


def test_an_adapter_spares_the_gradients_of_the_weights_below_it(floor):
    import models
    from peft import LoraConfig, get_peft_model

    policy = models.policy("gpt2", 300, 0.1)
    width, layers = models.SMALL
    full = floor.Products.of(policy, layers, width)
    lora = get_peft_model(policy, LoraConfig(r=8, target_modules=["c_attn"], fan_in_fan_out=True))
    adapted = floor.Products.of(lora, layers, width)
    adapter = layers * (8 * width + 8 * 3 * width)
    assert floor.forward(adapted.trunk, 1) == pytest.approx(floor.forward(full.trunk, 1) + adapter)
    below = 2 * (floor.forward(full.trunk, 1))  # forward and dX
    assert floor.forward_backward(adapted.trunk, 1) == pytest.approx(below + 3 * adapter)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_responses_end_as_often_as_asked_and_padding_is_never_sampled(floor, architecture):
    import models
    import torch

    model = models.policy(architecture, 512, end_probability=1 / 20)
    with torch.no_grad():
        probabilities = model(torch.randint(2, 512, (4, 40))).logits.softmax(-1).mean((0, 1))
    assert probabilities[models.EOS].item() == pytest.approx(1 / 20, rel=0.25)
    assert probabilities[models.PAD] < 1e-12
