"""Random models of a few thousand weights, and a tokenizer of words w3, w4, ... for the tests of sampling and PPO."""

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

VOCABULARY, EOS, PAD, CONTEXT = 24, 0, 1, 48
ARCHITECTURES = ("gpt2", "llama")  # absolute positions and rotary ones


def tokenizer():
    names = ["<eos>", "<pad>", "<bos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    words = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<bos>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", bos_token="<bos>")


def config(architecture, **options):
    special = {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": 2}
    special |= {"vocab_size": VOCABULARY, "initializer_range": 0.3}
    if architecture == "gpt2":
        size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT}
        return GPT2Config(**size | special | options)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"max_position_embeddings": CONTEXT, "tie_word_embeddings": True}
    return LlamaConfig(**size | special | options)


def policy(architecture, seed=0, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    kind = GPT2LMHeadModel if architecture == "gpt2" else LlamaForCausalLM
    return kind(config(architecture, **options)).to(dtype).eval()


def reward_model(architecture, seed=1, dtype=torch.float32, **options):
    torch.manual_seed(seed)
    kind = GPT2ForSequenceClassification if architecture == "gpt2" else LlamaForSequenceClassification
    return kind(config(architecture, num_labels=1, **options)).to(dtype).eval()


def sequences(count, shortest, longest, seed=0):
    """Random ids, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
