"""Demonstrations, rankings, prompts and text: from the built-in world, or read, checked and split from the user's own.

Splits go by prompt, not by row. The hash of a prompt's text decides where it belongs, so the same prompt never crosses
splits, and the order of the rows does not move it. Whitespace and case do not count: 'Hi there' and 'hi  there' are one
prompt. A prompt may be a demonstration, a ranking and one for PPO. Two rules keep what measures apart from what trains:

- A prompt whose ranking trains the judge (`rankings.judge`) or measures the reward model (`rankings.valid`) is taken
  out of the demonstrations and of `prompts.train`: no policy is trained on it.
- A prompt of `prompts.eval` or `prompts.valid` is in no training set, the judge's included.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from instructrl.config import Data, Recipe, Source, World
from instructrl.errors import UserError
from instructrl.progress import Progress
from instructrl.stages import records, sources
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, TASKS, TEXT, write_table
from instructrl.world import world_data

SCHEMAS = {"demonstrations": DEMONSTRATIONS, "rankings": RANKINGS, "prompts": PROMPTS, "text": TEXT, "tasks": TASKS}

EVAL_SHARE = 0.75
"""Of the held-out prompts, the share on which the models are compared (`prompts.eval`). On the others (`prompts.valid`)
the prefix of GPT (prompted) is chosen. Our choice."""

HELD_OUT = "dropped_as_prompts_of_rankings_valid_or_judge"
"""In `card.json`: rows of `demonstrations` and of `prompts.train` that fell away for the first rule above."""


@dataclass
class Reading:
    """What became of one source's rows."""

    source: Source
    files: list[str]
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)

    def card(self) -> dict:
        """JSON for `card.json`."""
        pinned = {
            key: value for key, value in asdict(self)["source"].model_dump().items() if value not in (None, {}, False)
        }
        return {"source": pinned, "files": self.files, "kept": self.kept, "dropped": dict(self.dropped)}


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the tables and `card.json`. Returns the number of rows of each table and of dropped rows.

    Raises:
        UserError: a source cannot be read, a row is wrong, or nothing is left for a table that a stage needs.
    """
    if recipe.data.world:
        tables, card = world_tables(recipe.data.world, recipe.seed, recipe.data.valid_share), {}
    else:
        tables, card = read_data(recipe.data, recipe.seed, Progress(folder))
    counts = {}
    for table, rows in tables.items():
        counts[table] = write_table(folder / f"{table}.parquet", rows, SCHEMAS[table.split(".")[0]])
    card = {"rows": counts} | card
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    dropped = sum(sum(reading["dropped"].values()) for reading in card.get("sources", {}).values())
    dropped += sum(card.get(HELD_OUT, {}).values())
    return {table.replace(".", "_"): count for table, count in counts.items()} | {"dropped": dropped}


def world_tables(world: World, seed: int, valid_share: float) -> dict[str, list[dict]]:
    """The built-in world's tables by name. `prompts.rank` and `.rank_valid` are for `label` to rank."""
    made = world_data(world, seed, valid_share)
    tables: dict[str, list[dict]] = {"tasks": made.tasks}
    for part, answered in made.demonstrations.items():
        rows = [{"prompt": prompt.text, "response": answer, "spec": prompt.to_json()} for prompt, answer in answered]
        tables[f"demonstrations.{part}"] = [row | {"source": "world"} for row in rows]
    for part, prompts in made.prompts.items():
        tables[f"prompts.{part}"] = [
            {"prompt": prompt.text, "category": prompt.use_case, "kind": prompt.kind, "source": "world"}
            | {"spec": prompt.to_json()}
            for prompt in prompts
        ]
    for part, documents in made.text.items():
        tables[f"text.{part}"] = [{"kind": kind, "text": text} for kind, text in documents]
    return tables


def read_data(data: Data, seed: int, progress: Progress | None = None) -> tuple[dict[str, list[dict]], dict]:
    """(tables by name, what the card says of the sources)."""
    listed = list(sources.named_sources(data))
    rows: dict[str, list[dict]] = {kind: [] for kind in sources.KINDS}
    card = {}
    for number, (kind, key, source) in enumerate(listed, 1):
        found, reading = read_source(source, kind, key)
        rows[kind] += found
        card[key] = reading.card()
        if progress:
            progress.update(number, len(listed))
    if rows["rankings"] == [] and data.rankings:
        raise UserError("data.rankings: nothing is left after dropping rankings whose responses are all tied")
    tables, in_training, held_out = split_rows(rows, data, seed)
    for table, key in (("demonstrations", "data.demonstrations"), ("prompts.train", "data.prompts")):
        if held_out[table] and not tables[table if "." in table else f"{table}.train"]:
            raise UserError(
                f"{key}: nothing is left to train on: every prompt is also that of a ranking held out for the judge or "
                "to measure the reward model; add other prompts, or lower data.judge_ranking_share or "
                "data.valid_ranking_share"
            )
    if not tables["prompts.eval"]:
        raise UserError(
            "no prompt is left for eval: every held-out prompt is also a training prompt, or there are too few; "
            "add more data.prompts, or raise data.valid_share or data.valid_ranking_share"
        )
    return tables, {
        "sources": card,
        "held_out_prompts_dropped_as_training_prompts": in_training,
        HELD_OUT: held_out,
    }


def read_source(source: Source, kind: str, key: str) -> tuple[list[dict], Reading]:
    """The source's rows as ours, without repeated ones, and what was dropped and why."""
    reading = Reading(source, [str(file) for file in sources.files(source, key)])
    label = short_name(source.path)
    rows, seen = [], set()
    for row in sources.rows(source, key):
        if kind == "text" and _is_blank(row, source):
            reading.dropped["empty"] += 1
            continue
        try:
            found = records.record(row, kind, source, key)
        except records.Invalid as problem:
            if not source.skip_invalid:
                raise records.invalid(row, problem, key) from None
            reading.dropped["invalid"] += 1
            continue
        if source.cut_prompt and "prompt" in found:
            found["prompt"] = cut(found["prompt"], source.cut_prompt)
        naming = "kind" if kind == "text" else "source"
        found[naming] = found.get(naming) or label
        if kind == "rankings" and len(set(found["ranks"])) == 1:
            reading.dropped["all responses tied"] += 1  # no pair to learn from (paper, 3.5: ties are dropped)
            continue
        identity = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).digest()
        if identity in seen:
            reading.dropped["repeated"] += 1
            continue
        seen.add(identity)
        rows.append(found)
        if len(rows) == source.limit:
            break
    reading.kept = len(rows)
    if not rows and not reading.dropped["all responses tied"]:
        raise UserError(f"{key}: nothing is left of {source.path}; dropped: {_counted(reading.dropped)}")
    return rows, reading


def cut(text: str, characters: int) -> str:
    """The text's beginning, or with a negative number its end, in whole words."""
    if len(text) <= abs(characters):
        return text
    if characters > 0:
        kept, beyond = text[:characters], text[characters]
        return kept.rstrip() if beyond.isspace() else re.sub(r"\s+\S*$", "", kept)
    kept, beyond = text[characters:], text[characters - 1]
    return kept.lstrip() if beyond.isspace() else re.sub(r"^\S*\s+", "", kept)


def short_name(path: str) -> str:
    """`hh` for `some/where/hh.jsonl.gz`; the name of a Hub data set without its owner."""
    name = Path(path).name
    for suffix in (".gz", *sources.ENDINGS):
        name = name.removesuffix(suffix)
    return name


def split_rows(rows: dict[str, list[dict]], data: Data, seed: int) -> tuple[dict[str, list[dict]], int, dict[str, int]]:
    """Tables by name (`demonstrations.train`, ...), and what fell away.

    First how many prompts of `prompts.valid` and `.eval`, as training prompts; then how many rows of `demonstrations`
    and `prompts.train`, as prompts of `rankings.valid` or `.judge`.
    """
    valid, judge = data.valid_share, data.judge_ranking_share
    ranked_shares = {"valid": data.valid_ranking_share, "judge": judge}
    rankings = _split(rows["rankings"], "prompt", ranked_shares, seed)
    reserved = {normalized(row["prompt"]) for part in ("valid", "judge") for row in rankings[part]}
    shown = _without(rows["demonstrations"], reserved)
    demonstrations = _split_demonstrations(shown, rankings["train"], valid, seed)
    fallen = {"demonstrations": len(rows["demonstrations"]) - len(shown), "prompts.train": 0}
    trained_on = (demonstrations["train"], rankings["train"], rankings["judge"])
    if rows["prompts"]:
        shares = {"eval": valid * EVAL_SHARE, "valid": valid * (1 - EVAL_SHARE)}
        prompts = _split(_unique(rows["prompts"]), "prompt", shares, seed)
        allowed = _without(prompts["train"], reserved)
        fallen["prompts.train"] = len(prompts["train"]) - len(allowed)
        prompts["train"] = allowed
        trained_on += (prompts["train"],)
    else:
        prompts = _split(_unique(rankings["valid"]), "prompt", {"valid": 1 - EVAL_SHARE}, f"{seed} prompts")
        prompts = {"eval": prompts["train"], "valid": prompts["valid"], "train": _unique(rankings["train"])}
    known = {normalized(row["prompt"]) for table in trained_on for row in table}
    held_out = len(prompts["valid"]) + len(prompts["eval"])
    for name in ("valid", "eval"):
        kept = _without(prompts[name], known)
        # By hash, so that the first so many (eval.num_prompts) are a sample of all sources.
        prompts[name] = sorted(kept, key=lambda row: place(normalized(row["prompt"]), f"{seed} order"))
    dropped = held_out - len(prompts["valid"]) - len(prompts["eval"])
    text = _split(rows["text"], "text", {"valid": valid}, seed)
    tables = {"demonstrations": demonstrations, "rankings": rankings, "prompts": prompts, "text": text}
    named = {f"{table}.{part}": found for table, parts in tables.items() for part, found in parts.items()}
    return named, dropped, fallen


def _split_demonstrations(rows: list[dict], ranked: list[dict], share: float, seed: int | str) -> dict[str, list[dict]]:
    """Demonstrations of prompts that also train the reward model are split by another hash than all other prompts.

    By the same hash they would nearly all be in `train`: the beginning of the line is that of `rankings.valid`. The
    others go by the hash of `prompts`, so that few prompts of `prompts.eval` are training demonstrations.
    """
    known = {normalized(row["prompt"]) for row in ranked}
    apart = _without(rows, known)
    both = [row for row in rows if normalized(row["prompt"]) in known]
    parts = (
        _split(apart, "prompt", {"valid": share}, seed),
        _split(both, "prompt", {"valid": share}, f"{seed} demonstrations"),
    )
    return {name: parts[0][name] + parts[1][name] for name in ("train", "valid")}


def _without(rows: list[dict], prompts: set[str]) -> list[dict]:
    return [row for row in rows if normalized(row["prompt"]) not in prompts]


def _split(rows: list[dict], column: str, shares: dict[str, float], seed: int | str) -> dict[str, list[dict]]:
    part = split_texts({normalized(row[column]) for row in rows}, shares, seed)
    tables: dict[str, list[dict]] = {name: [] for name in ("train", *shares)}
    for row in rows:
        tables[part[normalized(row[column])]].append(row)
    return tables


def split_texts(texts: Iterable[str], shares: dict[str, float], seed: int | str) -> dict[str, str]:
    """Each text's part: one of `shares`, or `train` for the rest.

    A text's hash is its place on [0, 1); the first share of that line is the first part, and so on. A part whose share
    is not 0 gets at least one text as long as one stays for `train`: with ten rows and a share of .1, chance would
    leave it empty every third time.
    """
    placed = sorted((place(text, seed), text) for text in texts)
    part, names, start, bound = {}, list(shares), 0, 0.0
    for index, name in enumerate(names):
        bound += shares[name]
        end = sum(where < bound for where, _ in placed)
        if shares[name]:
            end = max(end, start + 1)
        kept_for_others = 1 + sum(shares[other] > 0 for other in names[index + 1 :])
        end = max(start, min(end, len(placed) - kept_for_others))
        part |= {text: name for _, text in placed[start:end]}
        start = end
    return {text: part.get(text, "train") for _, text in placed}


def place(text: str, seed: int | str) -> float:
    """The text's place on [0, 1), from its hash and the seed."""
    digest = hashlib.sha256(f"{seed}\n{text}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:7]) / 2**56


def normalized(text: str) -> str:
    """The text without what does not make it another prompt: case and whitespace."""
    return " ".join(text.split()).casefold()


def _unique(rows: list[dict]) -> list[dict]:
    """One row of PROMPTS for each prompt. Of several spellings the first by alphabet, whatever the order of rows."""
    found: dict[str, dict] = {}
    for row in rows:
        same = normalized(row["prompt"])
        if same not in found or row["prompt"] < found[same]["prompt"]:
            found[same] = {name: row[name] for name in PROMPTS.names if name in row}
    return list(found.values())


def _is_blank(row: sources.Row, source: Source) -> bool:
    column = source.columns.get("text", "text")
    value = row.values.get(column) if isinstance(column, str) else None
    return isinstance(value, str) and not value.strip()


def _counted(dropped: Counter) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing (there was no row)"
