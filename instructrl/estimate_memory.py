"""The memory that each phase of a stage takes at most, from the recipe and the shape of its model alone.

A phase is a time at which a stage holds most of something: the backward pass of a minibatch, the optimizer's step, a
batch of responses that is decoded. What it holds is counted tensor by tensor, as the trainers hold it; tests compare
the counts with what autograd keeps, and `make bench-estimate` the sums with processes that are measured.

Sizes are bytes, and for the longest rows that the recipe allows: rows shorter than that take less.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from instructrl.config import PPO, SFT, Recipe, Runtime
from instructrl.pipeline import stages
from instructrl.shapes import Shape

Device = Literal["cpu", "cuda"]

LIBRARIES = {"cpu": 650 * 10**6, "cuda": 600 * 10**6}
"""Of a stage's process without its models. CPU: measured, torch, transformers and TRL. CUDA: the context and cuBLAS's
workspaces, not measured."""
HEAP = 0.2
"""Of activations and gradients on a CPU: what malloc keeps of blocks that were freed, which do not fit those that
follow. Measured. A GPU's allocator is given `estimate.ROOM`."""
FREED = ("activations", "gradients")
CAST = "weights in bfloat16"
BUCKETS = "gradients in buckets"
GATHERED = "gathered weights"
COPY = "copy of the weights"
MOMENTS, GRADIENTS = ("Adam's moments", COPY), ("gradients",)
WEIGHTS = ("weights", "policy", "critic", "reward model", "reference", "moving average")
SHARDED = {0: WEIGHTS + MOMENTS + GRADIENTS, 1: MOMENTS, 2: MOMENTS + GRADIENTS, 3: WEIGHTS + MOMENTS + GRADIENTS}
"""Of these each process holds a part, by the stage of DeepSpeed's ZeRO; 0 is `runtime.sharding=fsdp`."""
BUCKET = 50_000_000 * 4
"""Bytes in which DeepSpeed collects gradients before it sends them: `zero.settings`."""
CHUNK = 1024
"""Padded tokens of a forward pass on a CPU, in sft and reward_model: `FastSFTTrainer.max_tokens`."""
FLOAT = 4
NF4 = (4 + 0.127) / 8
"""Bytes of a number of a base model in 4 bits (`model.lora.quantization`), its constants included (QLoRA,
arXiv 2305.14314, section 3)."""


@dataclass(frozen=True)
class Phase:
    """What is in memory at one time, by what it is."""

    stage: str
    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Network:
    """One of the models of a stage."""

    shape: Shape
    recipe: Recipe
    head: Literal["words", "scalar"]
    trained: bool = True
    muon: bool = False
    """Matrices have a momentum in place of Adam's two moments."""

    @property
    def weights(self) -> int:
        """Parameters without an adapter."""
        return self.shape.policy if self.head == "words" else self.shape.scalar

    @property
    def learnt(self) -> int:
        """Parameters that are trained."""
        lora = self.recipe.model.lora
        if not self.trained:
            return 0
        if lora is None:
            return self.weights
        return self.shape.adapter(lora) + (self.shape.width if self.head == "scalar" else 0)

    @property
    def weight_bytes(self) -> int:
        if self.recipe.model.lora is None or not self.trained:  # what is only read has been merged
            return self.weights * self.precision
        packed = int(self.shape.matrix_weights * (self.precision - NF4)) if self.recipe.model.lora.quantization else 0
        return self.weights * self.precision - packed + self.adapter_bytes

    @property
    def adapter_bytes(self) -> int:
        """An adapter, and the scalar head beside it, without the base model; 0 in a recipe that has none."""
        lora = self.recipe.model.lora
        head = self.shape.width if self.head == "scalar" else 0
        return (self.shape.adapter(lora) + head) * FLOAT if lora else 0

    @property
    def precision(self) -> int:
        return 2 if self.recipe.model.dtype == "bfloat16" else FLOAT

    @property
    def gradient(self) -> int:
        """Bytes; an adapter is float32 whatever the model is."""
        return self.learnt * (FLOAT if self.recipe.model.lora else self.precision)

    @property
    def moments(self) -> int:
        matrices = self.shape.matrix_weights * self.precision if self.muon else 0
        return 2 * self.gradient - matrices

    @property
    def buckets(self) -> int:
        """Bytes in which the gradients of several processes are summed, by DDP or DeepSpeed."""
        runtime = self.recipe.runtime
        if runtime.zero:
            return min(self.gradient, BUCKET)
        return self.gradient if runtime.ranks > 1 and not runtime.shares else 0

    @property
    def gathered(self) -> int:
        """Bytes that FSDP, or stage 3 of ZeRO, gathers in a forward and a backward pass: all but the blocks, this block
        and the next; and their gradients before those are shared out."""
        block = self.shape.matrix_weights // self.shape.layers
        weights = (self.weights - self.shape.matrix_weights + 2 * block) * self.precision
        return weights * (1 if self.recipe.model.lora else 2) if self.recipe.runtime.sharded else 0

    @property
    def tied_gradient(self) -> int:
        """Of the embedding, computed once more while another one is held: it is a matrix like no other."""
        full = self.trained and self.recipe.model.lora is None
        return self.shape.embedding * self.precision if full else 0


@dataclass(frozen=True)
class Passes:
    """How a stage computes: what its forward pass keeps for the backward pass."""

    recipe: Recipe
    device: Device
    packed: bool
    """Our trainers' rows without padding, or the padded rows of TRL's."""
    dropout: float = 0.0
    """Of the residual stream."""

    @property
    def compute(self) -> int:
        """Bytes of a number within a layer."""
        return 2 if self.recipe.runtime.bf16 or self.recipe.model.dtype == "bfloat16" else FLOAT

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream, which autocast leaves as the weights are."""
        return 2 if self.recipe.model.dtype == "bfloat16" else FLOAT

    def layer(self, shape: Shape, length: int) -> int:
        """Bytes a token that one layer keeps, of sequences of that length."""
        width, states = shape.width, shape.kv_heads * shape.head_size
        queries, inner = shape.heads * shape.head_size, shape.inner
        inside, stream = 0, 0
        if shape.architecture in ("gpt2", "gpt_neox"):
            inside += 2 * width + 3 * width + queries  # what the norms give, q, k and v, and what attention gives
            stream += (2 if shape.architecture == "gpt2" else 1) * width  # what the norms are given
        else:
            stream += 4 * width  # what the norms are given, and that divided by its root mean square
            inside += 2 * width + 2 * queries + 2 * states
        if shape.architecture == "gpt_neox":  # rotated q and k beside the q, k and v that v is a part of
            inside += 2 * width if self.packed else 3 * width
        dropped = 0
        if self.dropout:
            dropped += 2 * width * (1 if self.device == "cuda" else self.compute)
        if shape.dropout and not self.packed and self.device == "cpu":
            dropped += 3 * shape.heads * length * self.compute  # softmax, what is dropped of it, and what is left
        else:
            inside += queries  # attention's output, in the order of the rows again
        if not self.packed and shape.kv_heads < shape.heads:
            inside += 2 * (queries - states)  # k and v, repeated for the mask's sake
        inside += self.mlp(shape) * inner
        lora = self.recipe.model.lora
        if lora:
            inside += sum(lora.r for _ in shape.matrices())
        return inside * self.compute + stream * self.residual + dropped

    def mlp(self, shape: Shape) -> int:
        """Numbers that the MLP keeps for each of its inner ones."""
        if shape.architecture == "gpt2":  # transformers' GELU is eight operations; PPO puts one in its place
            return 3 if self.packed else 5
        return 2 if shape.architecture == "gpt_neox" else 4

    def activations(self, shape: Shape, tokens: int, length: int) -> int:
        """Bytes that a forward pass keeps for the backward pass, head excluded."""
        ends = 2 * shape.width * self.residual * tokens
        layer = self.layer(shape, length) * tokens
        if not self.recipe.runtime.gradient_checkpointing:
            return ends + shape.layers * layer
        return ends + shape.layers * shape.width * self.residual * tokens + layer

    def cast(self, network: Network) -> int:
        """Bytes of the weights in bfloat16 that autocast keeps for the backward pass."""
        return 2 * network.weights if self.compute < network.precision else 0

    def logits(self, shape: Shape, tokens: int, copies: int = 3) -> int:
        """Bytes of the head's backward pass: log-probabilities, their gradient, and that of the logits."""
        cast = self.compute if self.compute < FLOAT else 0
        return tokens * shape.vocabulary * (copies * FLOAT + cast)

    def state(self, shape: Shape) -> int:
        """Bytes a token of a KV cache. Under autocast rotated keys are float32 beside values in bfloat16."""
        rotated = FLOAT if shape.architecture != "gpt2" and self.residual == FLOAT else self.compute
        return shape.state // 2 * (rotated + self.compute)

    def transient(self, shape: Shape, tokens: int) -> int:
        """Bytes of a forward pass that keeps nothing: about a layer's."""
        widest = max(3 * shape.width, 2 * shape.inner)
        return tokens * (2 * shape.width * self.residual + widest * self.compute)


def phases(stage: str, recipe: Recipe, shape: Shape, device: Device) -> list[Phase]:
    """What a stage holds in each of its phases; `data` has no model, and none.

    Of several processes it is what one holds on its GPU, or what those of this machine hold together in its memory.
    """
    of = {
        "pretrain": _pretrain,
        "sft": _sft,
        "ppo_init": _sft,
        "label": _label,
        "reward_model": _reward_model,
        "judge": _reward_model,
        "ppo": _ppo,
        "ppo_ptx": _ppo,
        "eval": _eval,
    }
    distributed = stages(recipe)[stage].distributed
    own = own_share(stage, recipe) if distributed else recipe.model_copy(update={"runtime": alone(recipe.runtime)})
    beside = recipe.runtime.num_processes if distributed and device == "cpu" else 1
    shares = own.runtime.shares and stage != "eval"  # which reads one whole model at a time
    found = of[stage](stage, own, shape, device) if stage in of else ()
    every = [(phase, shared(phase, own, shape) if shares else phase.parts) for phase in found]
    return [Phase(phase.stage, phase.name, whole(parts, device, beside)) for phase, parts in every]


def shared(phase: Phase, recipe: Recipe, shape: Shape) -> dict[str, int]:
    """What one of the processes holds, where they share some of it.

    DeepSpeed steps a copy of the weights, and has room for the gradients of its third stage as long as it is there.
    """
    parts, stage = phase.parts, recipe.runtime.zero
    if stage:
        policy, scorer = Network(shape, recipe, "words").gradient, Network(shape, recipe, "scalar").gradient
        trained = {"ppo": policy + scorer, "ppo_ptx": policy + scorer, "reward_model": scorer, "judge": scorer}
        weights = trained.get(phase.stage, policy)
        kept = {"gradients": max(weights, parts.get("gradients", 0))} if stage == 3 else {}
        parts = parts | {COPY: weights} | kept
    return {part: size // recipe.runtime.ranks if part in SHARDED[stage] else size for part, size in parts.items()}


def own_share(stage: str, recipe: Recipe) -> Recipe:
    """The recipe with the batches that one process has of the stage."""
    name, ranks = "reward_model" if stage == "judge" else stage, recipe.runtime.ranks
    section = getattr(recipe, name)
    if ranks == 1 or not hasattr(section, "batch_size"):
        return recipe
    return recipe.model_copy(
        update={name: section.model_copy(update={"batch_size": max(1, section.batch_size // ranks)})}
    )


def alone(runtime: Runtime) -> Runtime:
    """The runtime of a stage that is one process whatever the others are."""
    return runtime.model_copy(update={"num_processes": 1, "nodes": 1})


def whole(parts: dict[str, int], device: Device, processes: int) -> dict[str, int]:
    """What that many processes hold, and what comes to it whatever a stage does."""
    heap = int(HEAP * sum(parts.get(part, 0) for part in FREED)) if device == "cpu" else 0
    every = {"libraries": LIBRARIES[device]} | parts | {"heap": heap}
    return {part: processes * size for part, size in every.items() if size}


def peak(found: list[Phase]) -> Phase:
    """The phase that takes the most."""
    return max(found, key=lambda phase: phase.total)


def _trained(
    stage: str, network: Network, passes: Passes, activations: int, head: int, accumulates: bool
) -> Iterator[Phase]:
    """The phases of one network that is trained, on a micro-batch."""
    held = {"weights": network.weight_bytes, "Adam's moments": network.moments, BUCKETS: network.buckets}
    earlier = network.gradient if accumulates else 0
    earlier += network.tied_gradient if network.head == "words" else 0  # the unembedding's, the first of all
    more = {"gradients": earlier, "activations": activations, "logits": head, CAST: passes.cast(network)}
    more[GATHERED] = network.gathered
    yield Phase(stage, "forward", held | more)
    yield Phase(stage, "backward", held | {"gradients": network.gradient + network.tied_gradient})


def _pretrain(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    tokens = recipe.pretrain.tokens_per_step
    full = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})
    passes = Passes(full, device, packed=False)
    network = Network(shape, full, "words", muon=True)
    activations = passes.activations(shape, tokens, shape.context)
    yield from _trained(stage, network, passes, activations, passes.logits(shape, tokens), False)


def _label(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    weights = {"policy": Network(shape, recipe, "words", trained=False).weight_bytes}
    together = recipe.runtime.generation_batch_size
    yield _decoding(stage, "sampling", weights, recipe, shape, device, together, recipe.label.response_length)


def _eval(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    section = recipe.eval
    policy = {"policy": Network(shape, recipe, "words", trained=False).weight_bytes}
    scalar = Network(shape, recipe, "scalar", trained=False).weight_bytes
    judges = {"reward model": scalar} | ({"judge": scalar} if section.judge == "reward_model" else {})
    held = policy | (judges if section.best_of_n else {})
    asked = section.num_prompts * max(1, section.best_of_n)
    together = min(recipe.runtime.generation_batch_size, asked)
    yield _decoding(stage, "sampling", held, recipe, shape, device, together, section.response_length)
    passes, limit = Passes(recipe, device, packed=True), recipe.runtime.max_tokens
    yield Phase(
        stage,
        "held-out text",
        policy | {"logits": passes.logits(shape, limit, copies=2), "activations": passes.transient(shape, limit)},
    )


def _decoding(
    stage: str, name: str, held: dict[str, int], recipe: Recipe, shape: Shape, device: Device, rows: int, response: int
) -> Phase:
    """Sampling answers to a batch of the longest prompts."""
    passes = Passes(recipe, device, packed=True)
    response = min(response, shape.context)
    prompt = max(1, min(recipe.data.max_prompt_tokens, shape.context - response))
    cache = passes.state(shape)
    prefilled = batch(rows, prompt, recipe.runtime.max_tokens) * prompt
    more = {
        "KV cache": rows * (prompt + response + ROOM) * cache + prefilled * cache,
        "logits": rows * shape.vocabulary * FLOAT * 4,
        "activations": passes.transient(shape, prefilled),
    }
    return Phase(stage, name, held | more)


def _sft(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    section: SFT = getattr(recipe, stage)
    rows = largest_divisor(section.batch_size, recipe.runtime.micro_batch_size)
    response = min(recipe.data.max_response_tokens, shape.context)
    length = min(recipe.data.max_prompt_tokens + response, shape.context)
    passes = Passes(recipe, device, packed=False, dropout=section.residual_dropout)
    network = Network(shape, recipe, "words", muon=bool(section.muon_learning_rate))
    counted = rows * (response if section.completion_only_loss else length)
    head = passes.logits(shape, counted if device == "cpu" else min(counted, CHUNK))
    activations = passes.activations(shape, rows * length, length)
    yield from _trained(stage, network, passes, activations, head, rows < section.batch_size)
    if device == "cpu":
        yield _saved(stage, network)


def _reward_model(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    rows = largest_divisor(recipe.reward_model.batch_size, recipe.runtime.micro_batch_size) * ranked(recipe)
    length = min(recipe.data.max_prompt_tokens + recipe.data.max_response_tokens, shape.context)
    passes = Passes(recipe, device, packed=False)
    network = Network(shape, recipe, "scalar", muon=bool(recipe.reward_model.muon_learning_rate))
    activations = passes.activations(shape, rows * length, length)
    accumulates = recipe.runtime.micro_batch_size < recipe.reward_model.batch_size
    yield from _trained(stage, network, passes, activations, 0, accumulates)
    if device == "cpu":
        yield _saved(stage, network)


def _saved(stage: str, network: Network) -> Phase:
    """At the end: an adapter is merged into a second model, in main memory."""
    lora = network.recipe.model.lora
    merged = network.shape.adapted(lora) * network.precision if lora else 0
    return Phase(
        stage,
        "saving",
        {"weights": network.weight_bytes, "Adam's moments": network.moments, "merged weights": merged},
    )


def _ppo(stage: str, recipe: Recipe, shape: Shape, device: Device) -> Iterator[Phase]:
    section: PPO = getattr(recipe, stage)
    policy, critic = Network(shape, recipe, "words"), Network(shape, recipe, "scalar")
    # All four are adapters on the policy's base model, unless each is in parts of its own.
    one_base = recipe.model.lora is not None and not recipe.runtime.sharded
    held = {
        "policy": policy.weight_bytes,
        "critic": critic.adapter_bytes if one_base else critic.weight_bytes,
        "reward model": critic.adapter_bytes if one_base else critic.weight_bytes,
        "reference": policy.adapter_bytes if one_base else policy.weight_bytes,
        "moving average": policy.learnt * FLOAT if section.ema_decay else 0,
        "Adam's moments": policy.moments + critic.moments,
        BUCKETS: policy.buckets + critic.buckets,
    }
    passes, limit = Passes(recipe, device, packed=True), recipe.runtime.max_tokens
    prompt = min(recipe.data.max_prompt_tokens, shape.context - section.response_length)
    length = prompt + section.response_length
    decoded = min(recipe.runtime.generation_batch_size, section.batch_size)
    gathered = policy.weight_bytes if recipe.runtime.sharded else 0  # one model at a time, and whole
    sampling = held | {GATHERED: gathered}
    yield _decoding(stage, "rollout", sampling, recipe, shape, device, decoded, section.response_length)
    rows = batch(section.batch_size, length, limit)
    logits = passes.logits(shape, rows * section.response_length, copies=2)
    more = {"logits": logits, "activations": passes.transient(shape, rows * length), GATHERED: gathered}
    yield Phase(stage, "scoring", held | more)
    yield from _updates(stage, held, policy, critic, passes, length)
    if recipe.model.lora and device == "cpu":
        yield Phase(stage, "saving", held | {"merged weights": shape.adapted(recipe.model.lora) * policy.precision})


def _updates(
    stage: str, held: dict[str, int], policy: Network, critic: Network, passes: Passes, length: int
) -> Iterator[Phase]:
    """One minibatch of PPO: the pretraining gradient and a copy of it, the policy's, the critic's, and the step."""
    recipe, shape = policy.recipe, policy.shape
    section: PPO = getattr(recipe, stage)
    episodes, limit = section.batch_size // section.num_mini_batches, recipe.runtime.max_tokens
    rows = batch(episodes, length, limit)
    copied = section.ptx_coef and not recipe.runtime.zero  # DeepSpeed keeps gradients for itself
    copy = policy.gradient if copied else 0
    activations, cast = passes.activations(shape, rows * length, length), passes.cast(policy)
    if section.ptx_coef:
        documents, cut = round(section.ptx_ratio * episodes), min(section.ptx_max_length, shape.context)
        together = batch(documents, cut, limit)
        more = {
            "gradients": policy.tied_gradient + (policy.gradient if together < documents else 0),
            "activations": passes.activations(shape, together * cut, cut),
            "logits": passes.logits(shape, together * (cut - 1)),
            CAST: cast,
            GATHERED: policy.gathered,
        }
        yield Phase(stage, "ptx", held | more)
    earlier = policy.gradient if section.ptx_coef or rows < episodes else 0
    more = {
        "gradients": copy + earlier + policy.tied_gradient,
        "activations": activations,
        "logits": passes.logits(shape, rows * section.response_length),
        CAST: cast,
        GATHERED: policy.gathered,
    }
    yield Phase(stage, "update of the policy", held | more)
    earlier = critic.gradient if rows < episodes else 0
    more = {"gradients": copy + policy.gradient + earlier, "activations": activations, CAST: passes.cast(critic)}
    more[GATHERED] = critic.gathered
    yield Phase(stage, "update of the critic", held | more)
    # Of the policy's gradients a third is computed, PPO's own, to log its size beside the pretraining gradient's.
    gradients = policy.gradient + critic.gradient + (2 * copy or critic.tied_gradient)
    yield Phase(stage, "step", held | {"gradients": gradients})


ROOM = 32
"""Tokens for which the cache has room at once (`trainers/cache.py`)."""


PAIRS = ("Anthropic/hh-rlhf", "trl-lib/tldr-preference")
"""Sets whose rankings are of two answers."""


def ranked(recipe: Recipe) -> int:
    """Answers of a ranking: those of the world's, two where all sets are pairs, else 4, the least of the paper's."""
    if recipe.data.world:
        return recipe.label.responses_per_prompt
    return 2 if all(source.path in PAIRS for source in recipe.data.rankings) and recipe.data.rankings else 4


def batch(rows: int, length: int, max_tokens: int) -> int:
    """Rows of that length that go through a model together: as many as `max_tokens` allows, and one at least."""
    return max(1, min(rows, max_tokens // max(length, 1)))


def largest_divisor(number: int, at_most: int) -> int:
    """As `stages.arguments`: how many rows of an optimizer step's are a micro-batch."""
    return max(divisor for divisor in range(1, min(number, at_most) + 1) if number % divisor == 0)
