"""The floor of `bench_ppo.py`: how long the matrix products that an iteration of PPO cannot do without take here.

Counted are products over real tokens only: no padding, the head only where a response's token is predicted, attention
only to what came before (and none while decoding), nothing twice. Timed are torch.matmul at the layers' own shapes,
with as many rows as a batch of tokens has, and when decoding as many as there are unfinished responses. All else
(softmax, normalisation, activations, memory traffic between products, Python) is left out, so no trainer gets down to
this.

Started by the driver with {workload, lengths: for each iteration [[prompt tokens, response tokens], ...]}.
"""

import time
from dataclasses import dataclass
from functools import cache
from statistics import mean

import torch
from torch import nn
from turns import Player

ROWS = 1024
"""Tokens multiplied at once, outside decoding."""


@dataclass(frozen=True)
class Products:
    """A transformer's matrix products for one token: (inputs, outputs, whether the weight is trained) of each."""

    trunk: tuple[tuple[int, int, bool], ...]
    head: tuple[tuple[int, int, bool], ...]
    layers: int
    width: int

    @classmethod
    def of(cls, model: nn.Module, layers: int, width: int) -> "Products":
        """Read off a causal language model, with an adapter or without."""
        trunk, head = [], []
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if weight is None or weight.dim() != 2 or isinstance(module, nn.Embedding):
                continue
            inputs, outputs = weight.shape if type(module).__name__ == "Conv1D" else reversed(weight.shape)
            if not hasattr(module, "base_layer"):  # a PEFT layer, whose parts come by themselves
                part = head if name.endswith("lm_head") else trunk
                part.append((inputs, outputs, weight.requires_grad))
        return cls(tuple(trunk), tuple(head), layers, width)


def forward(products: tuple, rows: float, at_once: int = ROWS) -> float:
    """Seconds for `rows` tokens, `at_once` of them together."""
    return sum(seconds(at_once, inputs, outputs) for inputs, outputs, _ in products) * rows / at_once


def forward_backward(products: tuple, rows: float) -> float:
    """And the gradients: of the inputs dY W', of trained weights X' dY."""
    total = forward(products, rows)
    for inputs, outputs, trained in products:
        total += seconds(ROWS, outputs, inputs) * rows / ROWS
        total += seconds(inputs, ROWS, outputs) * rows / ROWS if trained else 0.0
    return total


def attention(model: Products, lengths: list[int], backward: bool = False) -> float:
    """Seconds for Q K' and P V over causal pairs of positions; backward takes twice as many products."""
    typical = round(mean(lengths))
    a_pair = seconds(typical, model.width, typical) / typical**2
    pairs = sum(length**2 / 2 for length in lengths)
    return model.layers * 2 * pairs * a_pair * (3 if backward else 1)


def decoding(model: Products, prompts: list[int], responses: list[int]) -> float:
    """Seconds to read the prompts, then to decode step by step, all unfinished responses together."""
    total = forward(model.trunk, sum(prompts)) + attention(model, prompts)
    for step in range(max(responses)):
        going = sum(response > step for response in responses)
        total += forward(model.head, going, at_once=going)
        total += forward(model.trunk, going, at_once=going) if step else 0.0  # the first came with the prompt
    return total


def iteration(workload: dict, policy: Products, base: Products, lengths: list[list[int]], examples: list[int]) -> float:
    """Seconds for one iteration of PPO. `base` is a model without adapter, every weight of it trained."""
    prompts, responses = zip(*lengths, strict=True)
    read = [prompt + response - 1 for prompt, response in lengths]  # the last token predicts nothing
    tokens, predicted = sum(read), sum(responses)
    total = decoding(policy, prompts, responses)
    total += forward(base.trunk, tokens) + forward(base.head, predicted) + attention(base, read)  # reference
    total += forward(base.trunk, tokens) + attention(base, read)  # critic
    total += forward(base.trunk, tokens + len(read)) + attention(base, read)  # reward model
    total += workload["epochs"] * (
        forward_backward(policy.trunk, tokens)
        + forward_backward(policy.head, predicted)
        + forward_backward(base.trunk, tokens)  # critic
        + 2 * attention(base, read, backward=True)
    )
    if examples:
        pretraining = [length - 1 for length in examples]
        total += forward_backward(policy.trunk + policy.head, sum(pretraining))
        total += attention(policy, pretraining, backward=True)
    return total


@cache
def seconds(rows: int, inner: int, columns: int) -> float:
    """CPU seconds of [rows, inner] @ [inner, columns] in float32, the best of several rounds."""
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    product = torch.matmul(left, right)  # written over: a fresh one would count page faults too
    repeats = 1 + int(2e8 / (2 * rows * inner * columns))
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        for _ in range(repeats):
            torch.matmul(left, right, out=product)
        best = min(best, (time.process_time() - start) / repeats)
    return best


def main() -> None:
    player = Player()
    workload, iterations = player.arguments["workload"], player.arguments["lengths"]
    torch.set_num_threads(1)
    player.wait()
    import models
    from ppo_worker import models_of, pretraining_of

    size = models.Size(*workload["size"])
    policy = Products.of(models_of(workload)["model"], size.layers, size.width)
    base = models.policy(workload["architecture"], workload["vocabulary"], 0.1, size)
    base = Products.of(base, size.layers, size.width)
    count = round(workload["ptx_ratio"] * workload["episodes"]) * workload["epochs"]
    examples = [len(ids) for ids in (pretraining_of(workload) * 100)[:count]] if count else []
    with torch.no_grad():
        player.report(seconds=mean(iteration(workload, policy, base, lengths, examples) for lengths in iterations))
    player.wait()


if __name__ == "__main__":
    main()
