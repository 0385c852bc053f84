"""What two text contracts have in common, and the first token in which they do not."""

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase


def meaning(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The parts of a tokenizer that decide which ids a text becomes, whatever its files are called."""
    parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    added = tokenizer.added_tokens_decoder
    parts["special_tokens"] = {str(token): id_ for id_, token in added.items() if token.special}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        whole = json.loads(backend.to_str())
        merges = whole["model"].get("merges") or []
        parts["merges"] = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
        parts |= {name: whole[name] for name in ("normalizer", "pre_tokenizer")}
    return parts


def difference(there: dict, here: dict, name: str, mine: str) -> str | None:
    """How two cards differ, in words: the first token of the probe text, or else the parts that do. None: not at all.

    name, mine: whose cards they are.
    """
    if there["fingerprint"] == here["fingerprint"]:
        return None
    probes = [list(zip(card["probe"]["ids"], card["probe"]["tokens"], strict=True)) for card in (there, here)]
    for position in range(max(map(len, probes))):
        one, other = (f"{p[position][1]!r} ({p[position][0]})" if position < len(p) else "the end" for p in probes)
        if one != other:
            return f"token {position + 1} of the same text is {one} for {name} and {other} for {mine}"
    parts = [part for part in here if part not in ("fingerprint", "probe", "tokenizer") and there[part] != here[part]]
    told = [f"{part} is {there[part]!r} for {name} and {here[part]!r} for {mine}" for part in parts]
    inner = here["tokenizer"].keys() | there["tokenizer"].keys()
    other = sorted(part for part in inner if there["tokenizer"].get(part) != here["tokenizer"].get(part))
    if other:
        told.append(f"the tokenizers' {' and '.join(other)} differ, though not on the text that they were compared on")
    return "; ".join(told)


def digest(value: Any) -> str:
    """A short hash of JSON, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
