"""Tokenizers of a few hundred tokens in the forms that real models have: GPT-2, Qwen, Llama 3, Llama 2 (SentencePiece).

The chat templates are those of the real models, shortened.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["The cat sat on the mat. What is 2 plus 3? It is 5. Say hello to my friend, please."] * 4

CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% if date_string is not defined %}{% if strftime_now is defined %}\
{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{% endif %}<|start_header_id|>system<|end_header_id|>

Today Date: {{ date_string }}<|eot_id|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>

{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
LLAMA2 = """{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]\
{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"""


def byte_level(special, vocabulary=330):
    """A byte-level BPE with these special tokens first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def gpt2():
    """BOS is EOS, and there is no padding token."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=byte_level([end]), bos_token=end, eos_token=end, unk_token=end)


def qwen(chat=True):
    """No BOS; a base model's EOS ends a document and is its padding, a chat model's ends a turn."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>"]
    end = "<|im_end|>" if chat else "<|endoftext|>"
    made = PreTrainedTokenizerFast(tokenizer_object=byte_level(special), eos_token=end, pad_token="<|endoftext|>")
    made.chat_template = CHATML
    return made


def llama3(chat=True):
    """Adds BOS itself; no padding token, but spare ones."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = byte_level([*special, "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    end = "<|eot_id|>" if chat else "<|end_of_text|>"
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token=end)
    if chat:
        made.chat_template = LLAMA3
    return made


def llama2(chat=True):
    """SentencePiece's form: a space before every text, unknown characters as bytes."""
    letters = sorted({letter for text in TEXT for letter in text.replace(" ", "\u2581")} | set("[]/INST<>|_"))
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters, "\u2581t", "\u2581th"]
    vocabulary = {name: number for number, name in enumerate(names)}
    merges = [("\u2581", "t"), ("\u2581t", "h")]
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(names[:3])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    if chat:
        made.chat_template = LLAMA2
    return made
