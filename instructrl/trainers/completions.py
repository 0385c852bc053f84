"""Tables of sampled completions: what the policy says, which no curve shows."""

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from instructrl.trainers.experience import Episodes
from instructrl.trainers.losses import kl_k1

SHOWN = 300  # characters of a prompt's end and of a completion's beginning


def completion_rows(episodes: Episodes, tokenizer: PreTrainedTokenizerBase, count: int) -> list[dict[str, Any]]:
    """The first `count` episodes: prompt, completion (special tokens left out), score (bias subtracted), reward (with
    the penalty for a missing EOS and for KL), kl (nats), length (tokens, EOS included), ended (with EOS)."""
    mask = episodes.mask
    kl = kl_k1(episodes.old_logprobs, episodes.ref_logprobs).mul(mask).sum(1).tolist()
    rewards = (episodes.final_scores - episodes.kl_coef * episodes.kl.mul(mask).sum(1)).tolist()
    prompts = tokenizer.batch_decode(episodes.prompts[:count], skip_special_tokens=True)
    completions = tokenizer.batch_decode(episodes.responses[:count], skip_special_tokens=True)
    return [
        {
            "prompt": prompt,
            "completion": completion,
            "score": episodes.scores[row].item(),
            "reward": rewards[row],
            "kl": kl[row],
            "length": int(mask[row].sum()),
            "ended": bool(episodes.ended[row]),
        }
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
    ]


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print them as a table."""
    table = Table("prompt", "completion", "score", "KL", "length", title=title)
    for row in rows:
        end = "" if row["ended"] else " ..."
        texts = [plain(row["prompt"][-SHOWN:]), plain(row["completion"][:SHOWN] + end)]
        table.add_row(*texts, f"{row['score']:.2f}", f"{row['kl']:.2f}", str(row["length"]))
    Console().print(table)


def plain(said: str) -> Text:
    """A model may say what looks like markup, or what would move the cursor."""
    return Text(
        "".join(letter if letter.isprintable() or letter == "\n" else "\N{REPLACEMENT CHARACTER}" for letter in said)
    )
