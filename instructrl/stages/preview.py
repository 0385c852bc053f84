"""Examples of each set of the data as the models read them: the same functions that sft, reward_model and ppo use.

What comes out is JSON for `instructrl.preview` to show, so that the terminal needs no torch.
"""

import sys
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow.parquet

from instructrl.config import Recipe
from instructrl.stages import models, pretrain, reward_model
from instructrl.stages.contract import Contract, Limits
from instructrl.stages.ppo import short_enough
from instructrl.stages.ppo_init import document_row
from instructrl.stages.sft import joined, trained_on
from instructrl.stages.tables import read_table

CONTEXT, TRAINED = "context", "trained on"
NOTES = ("category", "kind", "language", "source")


def examples(recipe: Recipe, data: Path, count: int) -> dict[str, Any]:
    """Up to `count` examples of each training set, evenly over the table.

    Returns:
        contract: what it tells of itself. sets: a list of {name, rows, says, examples}; an example is {row, notes, says
        (what becomes of it), parts}; a part is {label, pieces}, a piece [text, whether it is a special token].

    Raises:
        UserError: the tokenizer cannot be loaded, or does not fit the recipe.
    """
    contract, limits = reader(recipe, data)
    shown = {
        "demonstrations": lambda row: demonstration(row, contract, limits, recipe.sft.completion_only_loss),
        "rankings": lambda row: ranking(row, contract, limits),
        "prompts": lambda row: prompt(row, contract, limits, recipe),
        "text": lambda row: document(row, contract, min(recipe.ppo_ptx.ptx_max_length, limits.both)),
    }
    sets = []
    for kind, show in shown.items():
        name = f"{kind}.train"
        total, rows = sample(data / f"{name}.parquet", count)
        made = [{"row": number + 1, "notes": notes(row), **show(row)} for number, row in rows]
        sets.append({"name": name, "rows": total, "says": "" if total else nothing(kind, recipe), "examples": made})
    return {"contract": contract.told(), "sets": sets}


def reader(recipe: Recipe, data: Path) -> tuple[Contract, Limits]:
    """The contract that `sft` would train under. A model from scratch has the tokenizer that `pretrain` would make."""
    path = recipe.model.path
    if path is None:
        texts = [row["text"] for row in read_table(data / "text.train.parquet")]
        tokenizer = pretrain.make_tokenizer(texts, recipe.pretrain.vocab_size)
        contract, context = Contract.of(tokenizer, recipe), recipe.pretrain.context_length
    else:
        contract = models.contract_of(path, models.load_tokenizer(path, recipe), recipe)
        context = models.load_context(path, recipe)
    return contract, Limits(recipe.data.max_prompt_tokens, recipe.data.max_response_tokens, context or sys.maxsize)


def sample(path: Path, count: int) -> tuple[int, list[tuple[int, dict]]]:
    """How many rows a table has, and `count` of them with their numbers, evenly spaced. Reads only what it shows."""
    if not path.exists():
        return 0, []
    file = pyarrow.parquet.ParquetFile(path)
    total = file.metadata.num_rows
    wanted = [total * number // count for number in range(count)] if count < total else list(range(total))
    rows, first = [], 0
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        here = [number for number in wanted if first <= number < first + size]
        if here:
            table = file.read_row_group(group)
            rows += [(number, table.slice(number - first, 1).to_pylist()[0]) for number in here]
        first += size
    return total, rows


def nothing(kind: str, recipe: Recipe) -> str:
    """Why a set has no rows."""
    if kind == "rankings" and recipe.data.world:
        return "made by label, from the answers of SFT"
    return f"none: the recipe has no data.{kind}, or nothing was left of it"


def notes(row: dict) -> dict[str, str]:
    return {name: row[name] for name in NOTES if row.get(name)}


def demonstration(row: dict, contract: Contract, limits: Limits, completion_only: bool) -> dict[str, Any]:
    """As `sft` trains on it."""
    asked, answer = contract.prompt(row["prompt"]), contract.response(row["response"])
    trained = joined(asked, answer)
    mask = trained_on(trained, completion_only)
    says = [f"{len(mask)} tokens, {sum(mask)} trained on", *cut(row["prompt"], contract)]
    return {
        "says": says + dropped(limits.problem(asked, answer)),
        "parts": masked(contract, trained["input_ids"], mask),
    }


def ranking(row: dict, contract: Contract, limits: Limits) -> dict[str, Any]:
    """As `reward_model` trains on it, best first."""
    counts: Counter = Counter()
    kept = reward_model.encode([row], contract, limits, counts)
    before = contract.prompt(row["prompt"])
    parts = [{"label": CONTEXT, "pieces": spelled(contract, before)}]
    for rank, ids in sorted(zip(kept[0]["ranks"], kept[0]["completion_ids"], strict=True)) if kept else []:
        parts.append({"label": f"rank {rank}", "pieces": spelled(contract, ids[len(before) :])})
    says = [f"{len(row['responses'])} responses, each scored at its last token", *cut(row["prompt"], contract)]
    return {"says": says + [f"dropped: {count} {reason}" for reason, count in counts.items()], "parts": parts}


def prompt(row: dict, contract: Contract, limits: Limits, recipe: Recipe) -> dict[str, Any]:
    """As `ppo` reads it."""
    ids, room = contract.prompt(row["prompt"]), recipe.ppo.response_length
    longest = min(limits.prompt, limits.both - room)
    problem = None if short_enough([row], contract, longest) else f"with a prompt above {longest} tokens"
    says = [f"{len(ids)} tokens, then up to {room} of the policy's", *cut(row["prompt"], contract)]
    return {"says": says + dropped(problem), "parts": [{"label": CONTEXT, "pieces": spelled(contract, ids)}]}


def document(row: dict, contract: Contract, longest: int) -> dict[str, Any]:
    """As PPO-ptx and `ppo_init` train on it."""
    whole, trained = contract.document(row["text"]), document_row(contract, row["text"], longest)
    kept, mask = trained["input_ids"], trained["completion_mask"]
    says = [f"{len(kept)} tokens, {sum(mask)} trained on"]
    if len(kept) < len(whole):
        says.append(f"cut at {longest} of {len(whole)} tokens")
    return {"says": says, "parts": masked(contract, kept, mask)}


def cut(text: str, contract: Contract) -> list[str]:
    """What truncation takes from a prompt."""
    kept = contract.kept(text)
    if contract.max_prompt_tokens is None or len(kept) >= len(text.strip() if contract.frame.strips else text):
        return []
    lost = "beginning" if contract.truncation == "left" else "end"
    return [f"the prompt's {lost} is cut off: {len(kept):,} of {len(text):,} characters are left"]


def dropped(problem: str | None) -> list[str]:
    return [f"dropped: {problem}"] if problem else []


def masked(contract: Contract, ids: list[int], mask: list[int]) -> list[dict[str, Any]]:
    """Runs of tokens that are trained on, and of those that are not."""
    runs = groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1])
    return [
        {"label": TRAINED if counts else CONTEXT, "pieces": spelled(contract, [token for token, _ in run])}
        for counts, run in runs
    ]


def spelled(contract: Contract, ids: list[int]) -> list[tuple[str, bool]]:
    """Ids as text, each special token by itself."""
    tokenizer = contract.tokenizer
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    found: list[tuple[str, bool]] = []
    for is_special, run in groupby(ids, key=special.__contains__):
        tokens = list(run)
        if is_special:
            found += [(token, True) for token in tokenizer.convert_ids_to_tokens(tokens)]
        else:
            found.append((tokenizer.decode(tokens, clean_up_tokenization_spaces=False), False))
    return found
