"""Models, prompts and a tokenizer for the benchmarks, made from a seed: nothing is downloaded or trained.

The weights are random, but a response ends after each token with a chosen probability, as a trained policy's does: its
lengths, on which most of the difference between trainers depends, are geometric. One coordinate of the last hidden
state is constant, and its weights in the head are so a bias on the logits: high for EOS, very low for padding.
"""

import math
import random
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS, PAD = 0, 1
CONTEXT = 256


class Size(NamedTuple):
    """Of a transformer. GPT-2, the one of 124 million weights, has width 768 and 12 layers."""

    width: int = 128
    layers: int = 4

    @property
    def heads(self) -> int:
        return self.width // (32 if self.width < 256 else 64)


SMALL = Size()


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words w2, w3, ...; it pads on the left, which TRL's PPOTrainer needs to generate."""
    words = {"<eos>": EOS, "<pad>": PAD} | {f"w{i}": i for i in range(2, vocabulary)}
    model = Tokenizer(WordLevel(words, unk_token="<eos>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def config(architecture: str, vocabulary: int, size: Size = SMALL, **options):
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": EOS, "vocab_size": vocabulary} | options
    if architecture == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2Config(
            n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=CONTEXT, **dropout, **special
        )
    return LlamaConfig(
        hidden_size=size.width,
        intermediate_size=8 * math.ceil(size.width / 3),  # 8/3 of the width: as many weights as GPT-2's MLP has
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=CONTEXT,
        **special,
    )


def policy(
    architecture: str, vocabulary: int, end_probability: float, size: Size = SMALL, seed: int = 0
) -> PreTrainedModel:
    """A causal language model each of whose tokens is EOS with about that probability."""
    torch.manual_seed(seed)
    kind = GPT2LMHeadModel if architecture == "gpt2" else LlamaForCausalLM
    model = kind(config(architecture, vocabulary, size))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        if architecture == "gpt2":
            model.base_model.ln_f.weight[0], model.base_model.ln_f.bias[0] = 0.0, 1.0
        else:  # RMSNorm has no bias: keep the coordinate constant from the embedding on
            model.base_model.embed_tokens.weight[:, 0] = 1.0
            for layer in model.base_model.layers:
                layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        constant = model.base_model(torch.arange(2, 34)[None]).last_hidden_state[0, :, 0].mean()
        head[:, 0] = 0.0
        head[EOS, 0] = math.log((vocabulary - 2) * end_probability / (1 - end_probability)) / constant
        head[PAD, 0] = -30 / constant
    return model


def scorer(architecture: str, vocabulary: int, seed: int, size: Size = SMALL) -> PreTrainedModel:
    """A reward model or critic."""
    torch.manual_seed(seed)
    kind = GPT2ForSequenceClassification if architecture == "gpt2" else LlamaForSequenceClassification
    return kind(config(architecture, vocabulary, size, num_labels=1))


def sequences(count: int, vocabulary: int, shortest: int, longest: int, seed: int) -> list[list[int]]:
    """Random ids of evenly spread lengths, none of them special."""
    rng = random.Random(seed)
    return [[rng.randrange(2, vocabulary) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def prompts(count: int, vocabulary: int, seed: int) -> list[list[int]]:
    """Random ids of lengths as uneven as the paper's PPO prompts: log-normal, the mean 2.7 times the median (Table 9).

    The median is a third of the paper's, 20 tokens, and none has more than 120 (the paper's limit is 16 medians).
    """
    rng = random.Random(seed)
    spread = math.sqrt(2 * math.log(166 / 62))
    lengths = [min(max(round(rng.lognormvariate(math.log(20), spread)), 1), 120) for _ in range(count)]
    return [[rng.randrange(2, vocabulary) for _ in range(length)] for length in lengths]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [rows, longest], padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)
    return ids, (ids != PAD).long()
