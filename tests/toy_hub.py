"""What the shipped recipes name on the Hub, in small: random models of the same architecture with tokenizers that have
the same special tokens, and data files with the same columns."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, PreTrainedTokenizerFast

TEXT = "the a dog cat house tree river small big old blue ran sat saw made gave to of in on with and not very"
WORDS = TEXT.split()

# Vocabulary, depth, width and so on of the models themselves, from the config.json beside their weights.
LLAMA_1B = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False}
LLAMA = {"vocab_size": 128_256, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072}
PYTHIA_1B = {"vocab_size": 50_304, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
CONFIGS = {
    "gpt2": GPT2Config(),
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "llama-1b": LlamaConfig(**LLAMA_1B | LLAMA),
    "llama-8b": LlamaConfig(**LLAMA_8B | LLAMA),
    "pythia-1b": GPTNeoXConfig(**PYTHIA_1B, num_attention_heads=8, max_position_embeddings=2048),
}
"""By their names in conf/model."""


def meta_model(name: str) -> torch.nn.Module:
    """The model at its full size, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIGS[name])


def write_model(name: str, folder: Path) -> None:
    """A random model of 2 layers and its tokenizer. None of the tokenizers has a padding token, and only Llama's has a
    BOS of its own, which it puts before every text."""
    begin, end = ("<|begin_of_text|>", "<|end_of_text|>") if "llama" in name else ("<|endoftext|>", "<|endoftext|>")
    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = list(dict.fromkeys((begin, end)))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator([TEXT] * 20, trainer)
    if begin != end:
        words.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token=begin, eos_token=end)
    real = CONFIGS[name]
    small = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if real.model_type == "gpt2":
        small |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 256}
    else:
        small |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        small |= {"max_position_embeddings": 256, "tie_word_embeddings": real.tie_word_embeddings}
        small |= {"num_key_value_heads": 1} if real.model_type == "llama" else {}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(real)(**small)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def sentence(chance: random.Random, words: int) -> str:
    return " ".join(chance.choices(WORDS, k=words))


def dolly(chance: random.Random) -> dict:
    context = sentence(chance, 4) if chance.random() < 0.5 else ""
    return {
        "instruction": sentence(chance, 6),
        "context": context,
        "response": sentence(chance, 5),
        "category": "open_qa",
    }


def hh_rlhf(chance: random.Random) -> dict:
    shared = f"\n\nHuman: {sentence(chance, 6)}\n\nAssistant: {sentence(chance, 3)}\n\nHuman: {sentence(chance, 3)}"
    return {name: f"{shared}\n\nAssistant: {sentence(chance, 4)}" for name in ("chosen", "rejected")}


def wikitext(chance: random.Random) -> dict:
    return {"text": f" {sentence(chance, 12)} . \n" if chance.random() < 0.7 else ""}


def post(chance: random.Random) -> str:
    return (
        f"SUBREDDIT: r/{chance.choice(WORDS)}\n\nTITLE: {sentence(chance, 3)}\n\nPOST: {sentence(chance, 8)}\n\nTL;DR:"
    )


def tldr(chance: random.Random) -> dict:
    return {"prompt": post(chance), "completion": f" {sentence(chance, 5)}"}


def tldr_preference(chance: random.Random) -> dict:
    return {"prompt": post(chance)} | {name: f" {sentence(chance, 4)}" for name in ("chosen", "rejected")}


DATA = {
    "databricks/databricks-dolly-15k": dolly,
    "Anthropic/hh-rlhf": hh_rlhf,
    "Salesforce/wikitext": wikitext,
    "trl-lib/tldr": tldr,
    "trl-lib/tldr-preference": tldr_preference,
}
"""A row of each."""


def write_data(name: str, folder: Path, rows: int = 60) -> Path:
    """A file with the columns that the data set has on the Hub."""
    chance, path = random.Random(name), folder / f"{name.replace('/', '--')}.jsonl"
    path.write_text("".join(json.dumps(DATA[name](chance)) + "\n" for _ in range(rows)), encoding="utf-8")
    return path
