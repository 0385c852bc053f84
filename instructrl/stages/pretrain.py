"""A small Llama and its byte-level BPE tokenizer, from scratch, on the data's pretraining text."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from instructrl.config import Pretrain, Recipe
from instructrl.errors import UserError
from instructrl.stages.checkpoints import FOLDER, train
from instructrl.stages.contract import PAD, Contract
from instructrl.stages.divergence import Rows
from instructrl.stages.models import device, save_base
from instructrl.stages.tables import read_table
from instructrl.trainers.muon import MuonAdamW, parameter_groups

END = "<|endoftext|>"  # begins and ends every document
TOKENIZER_CHARACTERS = 20_000_000  # of text are enough to learn merges from
BUCKET = 1024  # documents sorted by length together, so that a batch has little padding
FINAL_LEARNING_RATE_SHARE = 0.03


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the base model and its tokenizer to `folder/model`.

    Returns:
        parameters; tokens (real ones trained on); train_loss, valid_loss: nats a token.

    Raises:
        UserError: there is no text to train on.
    """
    settings = recipe.pretrain
    texts = [row["text"] for row in read_table(inputs["data"] / "text.train.parquet")]
    if not any(texts):
        raise UserError("pretrain has no text: set data.text, or data.world.")
    held_out = [row["text"] for row in read_table(inputs["data"] / "text.valid.parquet")]

    contract = Contract(make_tokenizer(texts, settings.vocab_size))
    set_seed(recipe.seed)
    model = make_model(settings, contract.tokenizer)
    cut = [pieces(contract.document(text), settings.context_length) for text in texts]
    documents = [piece for of_text in cut for piece in of_text]
    batches = Batches(documents, settings.tokens_per_step, settings.steps, recipe.seed, contract.tokenizer.pad_token_id)
    trainer = LanguageModelTrainer(
        model=model,
        args=arguments(recipe, folder / FOLDER),
        train_dataset=batches,
        data_collator=lambda rows: rows[0],  # a row is a batch already
        optimizers=(
            MuonAdamW(
                parameter_groups(
                    model, settings.learning_rate, settings.muon_learning_rate, weight_decay=settings.weight_decay
                )
            ),
            None,
        ),
    )
    numbers = [number for number, of_text in enumerate(cut) for _ in of_text]
    tables = [Rows(inputs["data"] / "text.train.parquet", numbers)]
    train_loss = train(trainer, folder, recipe.runtime.save_minutes, tables)
    save_base(model, contract.tokenizer, folder / "model")
    return {
        "parameters": model.num_parameters(),
        "tokens": batches.tokens,
        "train_loss": train_loss,
        "valid_loss": mean_loss(model, [contract.document(text)[: settings.context_length] for text in held_out]),
    }


def arguments(recipe: Recipe, checkpoints: Path) -> TrainingArguments:
    """One row of `Batches` a step; warm-up, then cosine."""
    found = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.pretrain.steps,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": FINAL_LEARNING_RATE_SHARE},
        warmup_steps=recipe.pretrain.warmup_steps,
        max_grad_norm=1.0,
        seed=recipe.seed,
        use_cpu=device(recipe).type == "cpu",
        logging_steps=recipe.runtime.logging_steps,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    found._n_gpu = min(found.n_gpu, 1)  # DataParallel would split a batch that is one row
    return found


def make_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose `<|endoftext|>` is BOS and EOS: it puts one before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        first(texts, TOKENIZER_CHARACTERS),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", pair=f"{END} $A $B", special_tokens=[(END, tokenizer.token_to_id(END))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=PAD)


def first(texts: list[str], characters: int) -> list[str]:
    """The first texts, up to so many characters, and at least one."""
    kept, total = [], 0
    for text in texts:
        kept.append(text)
        total += len(text)
        if total >= characters:
            break
    return kept


def make_model(settings: Pretrain, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama with tied embeddings; its gated MLP has as many parameters as a plain one four times the width."""
    if settings.hidden_size % (2 * settings.heads):
        raise UserError(
            f"pretrain.hidden_size={settings.hidden_size} must be an even multiple of pretrain.heads={settings.heads}."
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=8 * settings.hidden_size // 3,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        max_position_embeddings=settings.context_length,
        attention_bias=True,  # by which a head can look at the previous token whatever the tokens are
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    initialise(model)
    if settings.mimetic:
        mimetic(model)
    return model


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Matrices at .6 / sqrt(inputs), those that write to the residual stream divided by sqrt(2 layers) (GPT-2)."""
    config = model.config
    model.model.embed_tokens.weight.normal_(std=0.02)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            linear.weight.normal_(std=0.6 * linear.in_features**-0.5)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.normal_(std=0.6 * (linear.in_features * 2 * config.num_hidden_layers) ** -0.5)


@torch.no_grad()
def mimetic(
    model: LlamaForCausalLM,
    query_key: float = 2.0,
    value_output: float = 0.3,
    previous_token: float = 4.0,
    embedding: float = 0.1,
) -> None:
    """The structure of trained transformers as a start (Trockman & Kolter 2023, arXiv 2305.09828).

    Value times output is a multiple of the identity: attention copies. Query times key is, too, above the first layer:
    tokens attend to similar ones. And head 0 of layer 0 attends to the previous token (`attend_to_previous`).
    """
    width = model.config.hidden_size
    model.model.embed_tokens.weight.normal_(std=embedding)
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        rotation = orthogonal(width)
        attention.v_proj.weight.copy_(rotation * value_output**0.5)
        attention.o_proj.weight.copy_(rotation.T * value_output**0.5)
        if number > 0:
            rotation = orthogonal(width)
            attention.q_proj.weight.copy_(rotation * query_key**0.5)
            attention.k_proj.weight.copy_(rotation * query_key**0.5)
    attend_to_previous(model, previous_token)


@torch.no_grad()
def attend_to_previous(model: LlamaForCausalLM, amplitude: float) -> None:
    """Biases by which head 0 of layer 0 attends to the previous token, whatever the tokens are.

    RoPE turns the pair (i, i + half) of a key at position s by s w_i and of a query at t by t w_i. With a key bias of
    (a, 0) and a query bias turned back by one step, (a cos w_i, -a sin w_i), their product is a^2 cos((t - s - 1) w_i):
    at its largest for s = t - 1. Slow pairs tell neighbours apart too little to help, so they get none.
    """
    attention = model.model.layers[0].self_attn
    size = attention.head_dim
    half = size // 2
    frequency = model.model.rotary_emb.inv_freq.to(attention.q_proj.bias)  # [half]
    strength = amplitude * (frequency > 0.02)
    for linear, turn in ((attention.q_proj, frequency), (attention.k_proj, torch.zeros_like(frequency))):
        linear.weight[:size] *= 0.1  # what the tokens are matters less
        linear.bias[:half] = strength * torch.cos(turn)
        linear.bias[half:size] = -strength * torch.sin(turn)


def orthogonal(size: int) -> Tensor:
    """A random orthogonal matrix [size, size]."""
    return torch.linalg.qr(torch.randn(size, size))[0]


def pieces(ids: list[int], length: int) -> list[list[int]]:
    """A document cut so that each piece fits the context; a piece of one token teaches nothing."""
    return [ids[start : start + length] for start in range(0, len(ids), length) if len(ids) - start > 1]


class Batches(Dataset):
    """Whole documents in batches of about equal size: each row of a batch is a document, padded to the longest.

    Documents are shuffled, sorted by length within buckets, cut into batches of at most `tokens` padded tokens, and the
    batches are shuffled; passes over the text follow each other until there are `steps` batches.
    """

    def __init__(self, documents: list[list[int]], tokens: int, steps: int, seed: int, pad: int) -> None:
        self.documents, self.pad = documents, pad
        self.rows: list[list[int]] = []
        shuffle = random.Random(seed)
        while len(self.rows) < steps:
            self.rows += self._epoch(tokens, shuffle)
        self.rows = self.rows[:steps]

    def _epoch(self, tokens: int, shuffle: random.Random) -> list[list[int]]:
        order = list(range(len(self.documents)))
        shuffle.shuffle(order)
        batches = []
        for start in range(0, len(order), BUCKET):
            batch: list[int] = []
            for number in sorted(order[start : start + BUCKET], key=lambda i: len(self.documents[i])):
                if batch and (len(batch) + 1) * (len(self.documents[number]) - 1) > tokens:
                    batches.append(batch)
                    batch = []
                batch.append(number)
            batches.append(batch)
        shuffle.shuffle(batches)
        return batches

    @property
    def tokens(self) -> int:
        """Tokens predicted over all steps."""
        return sum(len(self.documents[number]) - 1 for row in self.rows for number in row)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        return {"input_ids": padded([self.documents[number] for number in self.rows[step]], self.pad)}


class LanguageModelTrainer(Trainer):
    """Next-token loss over the real tokens of right-padded rows, without the logits of padding."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return language_model_loss(model, inputs["input_ids"])

    def batch_rows(self, step: int) -> list[int]:
        """The documents that an optimizer step reads, from step 1 on."""
        return self.train_dataset.rows[step - 1]


def language_model_loss(model: LlamaForCausalLM, ids: Tensor, reduction: str = "mean") -> Tensor:
    """-log p(next token) over real tokens. ids [rows, length], right-padded: causal attention needs no mask."""
    targets = ids[:, 1:]
    real = targets != model.config.pad_token_id  # [rows, length - 1]
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [rows, length - 1, width]
    logits = model.lm_head(hidden[real])  # [tokens, vocabulary]
    return F.cross_entropy(logits.float(), targets[real], reduction=reduction)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, documents: list[list[int]], rows: int = 64) -> float | None:
    """Nats a token over documents; None without any."""
    model.eval()
    documents = sorted((ids for ids in documents if len(ids) > 1), key=len)
    total, tokens = 0.0, 0
    for start in range(0, len(documents), rows):
        batch = documents[start : start + rows]
        ids = padded(batch, model.config.pad_token_id).to(model.device)
        total += language_model_loss(model, ids, reduction="sum").item()
        tokens += sum(len(ids) - 1 for ids in batch)
    return total / tokens if tokens else None


def padded(rows: list[list[int]], pad: int) -> Tensor:
    """[rows, longest], padded on the right."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
