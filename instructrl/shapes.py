"""A model's shape from its config.json: what it holds and computes, without its weights and without torch."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructrl.config import LoRA, Pretrain, Recipe
from instructrl.errors import UserError

ARCHITECTURES = ("gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3")

LLAMA_3 = {"model_type": "llama", "vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8}
LLAMA_3 |= {"max_position_embeddings": 131_072}
KNOWN: dict[str, dict[str, Any]] = {
    "openai-community/gpt2": {"model_type": "gpt2"},
    "openai-community/gpt2-xl": {"model_type": "gpt2", "n_embd": 1600, "n_layer": 48, "n_head": 25},
    "meta-llama/Llama-3.2-1B": LLAMA_3
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "tie_word_embeddings": False},
    "EleutherAI/pythia-1b-deduped": {"model_type": "gpt_neox", "vocab_size": 50_304, "hidden_size": 2048}
    | {"intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 8, "max_position_embeddings": 2048},
}
"""What config.json says of the models in conf/model, so that the Hub is not asked, where some of them are gated."""


@dataclass(frozen=True)
class Matrix:
    """A linear layer of a transformer's block."""

    name: str
    inputs: int
    outputs: int
    bias: bool

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """A causal language model of one of `ARCHITECTURES`."""

    architecture: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    inner: int
    """Of the MLP."""
    context: int
    tied: bool
    """The unembedding is the embedding."""
    attention_bias: bool = False
    mlp_bias: bool = False
    dropout: bool = False
    """Attention weights are dropped in training, which a CPU computes without its fast attention."""

    def matrices(self) -> Iterator[Matrix]:
        """Those of one block."""
        width, queries, states = self.width, self.heads * self.head_size, self.kv_heads * self.head_size
        if self.architecture == "gpt2":
            yield from (Matrix("c_attn", width, 3 * width, True), Matrix("c_proj", width, width, True))
            yield from (Matrix("c_fc", width, self.inner, True), Matrix("c_proj", self.inner, width, True))
        elif self.architecture == "gpt_neox":
            yield from (
                Matrix("query_key_value", width, 3 * width, self.attention_bias),
                Matrix("dense", width, width, self.attention_bias),
            )
            yield Matrix("dense_h_to_4h", width, self.inner, True)
            yield Matrix("dense_4h_to_h", self.inner, width, True)
        else:
            yield Matrix("q_proj", width, queries, self.attention_bias)
            yield from (Matrix(name, width, states, self.attention_bias) for name in ("k_proj", "v_proj"))
            yield Matrix("o_proj", queries, width, self.attention_bias and self.architecture != "qwen2")
            yield from (Matrix(name, width, self.inner, self.mlp_bias) for name in ("gate_proj", "up_proj"))
            yield Matrix("down_proj", self.inner, width, self.mlp_bias)

    @property
    def matrix_weights(self) -> int:
        """Of all blocks: what every token is multiplied with."""
        return self.layers * sum(matrix.weights for matrix in self.matrices())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.width

    @property
    def trunk(self) -> int:
        """Parameters below the head."""
        biases = sum(matrix.outputs for matrix in self.matrices() if matrix.bias)
        norm = (2 if self.architecture in ("gpt2", "gpt_neox") else 1) * self.width
        block = 2 * norm + biases + (2 * self.head_size if self.architecture == "qwen3" else 0)
        positions = self.context * self.width if self.architecture == "gpt2" else 0
        return self.embedding + positions + self.matrix_weights + self.layers * block + norm

    @property
    def policy(self) -> int:
        """Parameters of the language model."""
        return self.trunk + (0 if self.tied else self.embedding)

    @property
    def scalar(self) -> int:
        """Parameters of the same trunk under a scalar head: reward model and critic."""
        return self.trunk + self.width

    @property
    def state(self) -> int:
        """Numbers that a KV cache keeps of each token."""
        return 2 * self.layers * self.kv_heads * self.head_size

    def adapter(self, lora: LoRA) -> int:
        """Parameters of an adapter. The head of a reward model is trained beside it."""
        wanted = [m for m in self.matrices() if not lora.target_modules or m.name in lora.target_modules]
        return self.layers * sum(lora.r * (matrix.inputs + matrix.outputs) for matrix in wanted)

    def adapted(self, lora: LoRA) -> int:
        """Parameters that an adapter changes."""
        wanted = [m for m in self.matrices() if not lora.target_modules or m.name in lora.target_modules]
        return self.layers * sum(matrix.weights for matrix in wanted)


def shape_of(config: Mapping[str, Any], where: str = "config.json") -> Shape:
    """The shape that a config.json describes. What it leaves out has transformers' default.

    Raises:
        UserError: an architecture that is not known here, or a number is missing.
    """
    kind = config.get("model_type")
    try:
        if kind == "gpt2":
            return _gpt2(config)
        if kind in ARCHITECTURES:
            return _rotary(config, str(kind))
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: {error} is missing, so nothing can be estimated of this model.") from None
    raise UserError(
        f"{where}: nothing is known here of a {kind} model; estimates are for {', '.join(ARCHITECTURES)} models."
    )


def _gpt2(config: Mapping[str, Any]) -> Shape:
    width, heads = config.get("n_embd", 768), config.get("n_head", 12)
    return Shape(
        "gpt2",
        config.get("vocab_size", 50_257),
        width,
        config.get("n_layer", 12),
        heads,
        heads,
        width // heads,
        config.get("n_inner") or 4 * width,
        config.get("n_positions", 1024),
        config.get("tie_word_embeddings", True),
        attention_bias=True,
        mlp_bias=True,
        dropout=bool(config.get("attn_pdrop", 0.1)),
    )


def _rotary(config: Mapping[str, Any], kind: str) -> Shape:
    width, heads = config["hidden_size"], config["num_attention_heads"]
    bias = {"qwen2": True, "gpt_neox": config.get("attention_bias", True), "mistral": False}
    return Shape(
        kind,
        config["vocab_size"],
        width,
        config["num_hidden_layers"],
        heads,
        (config.get("num_key_value_heads") or heads) if kind != "gpt_neox" else heads,
        config.get("head_dim") or (128 if kind == "qwen3" else width // heads),
        config["intermediate_size"],
        config.get("max_position_embeddings", 2048),
        config.get("tie_word_embeddings", False),
        attention_bias=bias.get(kind, config.get("attention_bias", False)),
        mlp_bias=kind == "llama" and config.get("mlp_bias", False),
        dropout=bool(config.get("attention_dropout", 0.0)),
    )


def from_scratch(settings: Pretrain) -> Shape:
    """The Llama that `pretrain` makes, as `stages.pretrain.make_model` does."""
    return Shape(
        "llama",
        settings.vocab_size,
        settings.hidden_size,
        settings.layers,
        settings.heads,
        settings.heads,
        settings.hidden_size // settings.heads,
        8 * settings.hidden_size // 3,
        settings.context_length,
        tied=True,
        attention_bias=True,
    )


def shape(recipe: Recipe, fetch: bool = False) -> Shape:
    """The shape of the recipe's base model: from its folder, from what is known of it, or from the Hub's cache.

    Args:
        fetch: ask the Hub for config.json, a file of a kilobyte, if it is nowhere here.

    Raises:
        UserError: it is not to be had, or nothing is known of its architecture.
    """
    path = recipe.model.path
    if path is None:
        return from_scratch(recipe.pretrain)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return _read(folder / "config.json", f"model.path={path}")
    if path in KNOWN:
        return shape_of(KNOWN[path], path)
    cached = _cached(path, recipe.model.revision)
    if cached is None and fetch and not recipe.runtime.offline:
        cached = _fetched(path, recipe.model.revision)
    if cached is None:
        raise UserError(
            f"model.path={path}: there is no such folder, and its config.json is not in the Hub's cache; give a folder."
        )
    return _read(cached, f"model.path={path}")


def _read(file: Path, where: str) -> Shape:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{where}: {file} cannot be read, so nothing can be estimated of this model.") from None
    return shape_of(config, where)


def _cached(repository: str, revision: str | None) -> Path | None:
    """config.json in the Hub's cache, whose layout is documented; its library takes longer to import than a plan.

    https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    folder = cache / f"models--{repository.replace('/', '--')}"
    try:
        commit = revision or (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    file = folder / "snapshots" / commit / "config.json"
    return file if file.is_file() else None


def _fetched(repository: str, revision: str | None) -> Path | None:
    """config.json from the Hub; None if it does not answer, has none, or does not give it."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "config.json", revision=revision, etag_timeout=1))
    except Exception:  # whatever the HTTP client of the day raises
        return None
