"""How much a stage has to do: the tokens it reads and writes, their floating-point operations, and the disk it takes.

What trains is known from the recipe; how many rows there are, and how long they are, is known before the data is made
only for the built-in world and roughly for files, so each such number says where it comes from.
"""

import math
from dataclasses import dataclass, replace

from instructrl.config import PPO, SFT, Recipe
from instructrl.data_size import Amounts
from instructrl.estimate_memory import Network
from instructrl.shapes import Shape

START = 8.0
"""Seconds that a stage's process takes to import and load what it needs."""
TEXT_DOCUMENTS = 512


@dataclass(frozen=True)
class Work:
    """What a stage does."""

    tokens: float = 0.0
    """Read or written by some model, each as often as it is."""
    flops: float = 0.0
    steps: float = 0.0
    """Of decoding: one token of every sequence in a batch."""
    step_bytes: float = 0.0
    """Read from memory in such a step: the weights, and a full batch's cache."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens,
            self.flops + other.flops,
            self.steps + other.steps,
            max(self.step_bytes, other.step_bytes),
        )


def forward(shape: Shape, tokens: float, length: float, predicted: float = 0.0) -> float:
    """FLOPs of reading tokens: two a weight of the blocks, the attention that a causal mask leaves, and two a weight of
    the head where a token is predicted."""
    attention = 2 * shape.layers * shape.heads * shape.head_size * length
    return tokens * (2 * shape.matrix_weights + attention) + predicted * 2 * shape.embedding


def learning(recipe: Recipe, shape: Shape, tokens: float, length: float, predicted: float = 0.0) -> float:
    """FLOPs of a forward and a backward pass: twice the forward pass for the gradients of inputs and weights, of which
    an adapter spares the weights'; and once more what is computed again."""
    read = forward(shape, tokens, length)
    head = forward(shape, 0, 0, predicted)
    again = read if recipe.runtime.gradient_checkpointing else 0.0
    lora = recipe.model.lora
    if lora is None:
        return 3 * (read + head) + again
    adapter = 2 * shape.adapter(lora) * tokens
    return 2 * (read + head) + 3 * adapter + again


def work(stage: str, recipe: Recipe, shape: Shape, amounts: Amounts) -> Work:
    """What the stage does; nothing that is worth counting in `data`."""
    if stage == "pretrain":
        tokens = recipe.pretrain.steps * recipe.pretrain.tokens_per_step
        return Work(tokens, 3 * forward(shape, tokens, min(shape.context, recipe.pretrain.tokens_per_step), tokens))
    if stage in ("sft", "ppo_init"):
        return _sft(stage, recipe, shape, amounts)
    if stage == "label":
        rows = amounts.labelled * recipe.label.responses_per_prompt
        return sampling(recipe, shape, rows, amounts.prompt, min(amounts.response, recipe.label.response_length))
    if stage in ("reward_model", "judge"):
        rankings = amounts.rankings if stage == "reward_model" else amounts.judged
        length = amounts.prompt + amounts.answer
        tokens = rankings * recipe.reward_model.epochs * amounts.ranked * length
        return Work(tokens, learning(recipe, shape, tokens, length))
    if stage in ("ppo", "ppo_ptx"):
        return _ppo(stage, recipe, shape, amounts)
    if stage == "eval":
        return _eval(recipe, shape, amounts)
    return Work()


def sampling(recipe: Recipe, shape: Shape, rows: float, prompt: float, response: float) -> Work:
    """Answering so many prompts."""
    together = recipe.runtime.generation_batch_size
    network = Network(shape, recipe, "words", trained=False)
    cache = min(rows, together) * (prompt + response) * shape.state * network.precision
    tokens = rows * (prompt + response)
    flops = forward(shape, tokens, prompt + response, rows * response)
    return Work(tokens, flops, math.ceil(rows / together) * response, network.weight_bytes + cache)


def _sft(stage: str, recipe: Recipe, shape: Shape, amounts: Amounts) -> Work:
    section: SFT = getattr(recipe, stage)
    rows = amounts.demonstrations * section.epochs
    length = amounts.demonstration_prompt + amounts.demonstration
    tokens = rows * length
    predicted = rows * (amounts.demonstration if section.completion_only_loss else length)
    found = Work(tokens, learning(recipe, shape, tokens, length, predicted))
    if stage == "ppo_init":
        share = recipe.ppo_init.pretraining_share
        document = min(amounts.document, recipe.ppo_init.ptx_max_length)
        read = rows * share / (1 - share) * document
        found += Work(read, learning(recipe, shape, read, document, read))
    return found


def _ppo(stage: str, recipe: Recipe, shape: Shape, amounts: Amounts) -> Work:
    section: PPO = getattr(recipe, stage)
    iterations = math.ceil(section.total_episodes / section.batch_size)
    episodes = iterations * section.batch_size
    response = min(amounts.response, section.response_length)
    length = amounts.prompt + response
    tokens, written = episodes * length, episodes * response
    one = sampling(recipe, shape, section.batch_size, amounts.prompt, response)
    # Rows that have ended leave the batch, and the longest decides when it ends.
    own = section.batch_size / recipe.runtime.ranks
    longest = math.ceil(own / recipe.runtime.generation_batch_size) * section.response_length
    rollouts = Work(tokens, iterations * one.flops, iterations * longest, one.step_bytes)
    again = in_bf16(recipe) or recipe.runtime.rollouts == "vllm"  # the policy's log-probabilities, anew
    scoring = (1 + again) * forward(shape, tokens, length, written) + 2 * forward(shape, tokens, length)
    update = learning(recipe, shape, tokens, length, written) + learning(recipe, shape, tokens, length)
    epochs = section.num_ppo_epochs
    found = rollouts + Work((3 + again + 2 * epochs) * tokens, scoring + epochs * update)
    if section.ptx_coef:
        document = min(amounts.document, section.ptx_max_length)
        read = episodes * epochs * section.ptx_ratio * document
        found += Work(read, learning(recipe, shape, read, document, read))
    return found


def _eval(recipe: Recipe, shape: Shape, amounts: Amounts) -> Work:
    """Five models, each at two temperatures; the best of n; snapshots at one. Then rewards and a judge of all, the
    held-out text of four models, and SFT's log-probabilities of what two policies said."""
    section = recipe.eval
    prompts = min(section.num_prompts, amounts.evaluated)
    response = min(amounts.response, section.response_length)
    snapshots = recipe.ppo.snapshots + recipe.ppo_ptx.snapshots
    answers = prompts * (5 * 2 + section.best_of_n + snapshots)
    found = sampling(recipe, shape, answers, amounts.prompt, response)
    found = replace(found, steps=found.steps / recipe.runtime.ranks)  # each process has some of the models
    read = answers * (amounts.prompt + response) * 2
    text = 4 * min(section.num_prompts, TEXT_DOCUMENTS) * amounts.document
    found += Work(read, forward(shape, read, amounts.prompt + response))
    return found + Work(text, forward(shape, text, amounts.document, text))


def in_bf16(recipe: Recipe) -> bool:
    """Whether matrix products are in bfloat16."""
    return recipe.runtime.bf16 or recipe.model.dtype == "bfloat16"


# ---- disk


def disk(stage: str, recipe: Recipe, shape: Shape) -> int:
    """Bytes of a stage's artifact: the models in it, merged weights beside an adapter where there are adapters."""
    precision = 2 if recipe.model.dtype == "bfloat16" else 4
    beside = Network(shape, recipe, "words").adapter_bytes if stage != "pretrain" else 0
    policy, scalar = shape.policy * precision + beside, shape.scalar * precision + beside
    if stage in ("pretrain", "sft", "ppo_init"):
        return policy
    if stage in ("reward_model", "judge"):
        return scalar
    if stage in ("ppo", "ppo_ptx"):
        section: PPO = getattr(recipe, stage)
        return policy * (1 + bool(section.ema_decay)) + (policy - beside) * section.snapshots + scalar
    return 0


def checkpoints(stage: str, recipe: Recipe, shape: Shape) -> int:
    """Bytes of the two checkpoints that a stage keeps while it trains."""
    policy, scalar = Network(shape, recipe, "words"), Network(shape, recipe, "scalar")
    lora = recipe.model.lora is not None

    def saved(network: Network) -> int:
        weights = network.gradient if lora else network.weights * network.precision
        return weights + network.moments

    if stage in ("pretrain", "sft", "ppo_init"):
        return 2 * saved(policy)
    if stage in ("reward_model", "judge"):
        return 2 * saved(scalar)
    if stage in ("ppo", "ppo_ptx"):
        average = policy.learnt * 4 if getattr(recipe, stage).ema_decay else 0
        return 2 * (saved(policy) + saved(scalar) + average)
    return 0
