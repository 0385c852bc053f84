"""Demonstrations, rankings, prompts and text: from the built-in world, or prepared as the paper prepares its own.

The user's own data goes through one pool (`pool.py`), in the paper's order (section 3.2): prompts that share a long
prefix are deduplicated, a user has at most so many, users are split, and personal data leaves the training split. What
the paper leaves out comes last: what training shares with anything that measures (`leakage.py`).

Splits. Every unit (a user with all their prompts; without a user, a prompt) has a place on [0, 1), from its hash:

    0 ... eval ... valid ............. valid_ranking .............. + judge ............................ 1
    held out of everything             its rankings measure the     its rankings train   trains policy and
                                       reward model                 the judge            reward model

A unit between the two whose rankings measure or judge trains nothing else; one without rankings trains. So no prompt
and no user is on both sides, whatever kinds of rows they have, and the order of rows does not matter.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from instructrl.config import Data, Recipe, World
from instructrl.errors import UserError
from instructrl.progress import Progress
from instructrl.stages import leakage, sources
from instructrl.stages.card import write_card
from instructrl.stages.ingest import Reading, RowWork, entries, short_name
from instructrl.stages.mixture import quotas
from instructrl.stages.pool import KINDS, Pool
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, TASKS, TEXT, write_table
from instructrl.world import Prompt, world_data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMAS = {"demonstrations": DEMONSTRATIONS, "rankings": RANKINGS, "prompts": PROMPTS, "text": TEXT, "tasks": TASKS}
PARTS = {
    "demonstrations": ("train", "valid"),
    "rankings": ("train", "valid", "judge"),
    "prompts": ("train", "valid", "eval"),
    "text": ("train", "valid"),
}
HELD_OUT_PARTS = {"demonstrations": ("valid",), "rankings": ("valid",), "prompts": ("valid", "eval")}
TRAINING_PARTS = (
    ("demonstrations", "train"),
    ("rankings", "train"),
    ("rankings", "judge"),
    ("prompts", "train"),
    ("text", "train"),
)

EVAL_SHARE = 0.75
"""Of the held-out prompts, the share on which the models are compared (`prompts.eval`). On the others (`prompts.valid`)
the prefix of GPT (prompted) is chosen. Our choice."""


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Write the tables, `card.json`, and for the user's own data `data_card.md`. Returns the number of rows of each
    table, and of rows that fell away.

    Raises:
        UserError: a source cannot be read, a row is wrong, or nothing is left for a table that a stage needs.
    """
    if recipe.data.world:
        made = world_tables(recipe.data.world, recipe.seed, recipe.data.valid_share)
        counts = {table: write(folder, table, rows) for table, rows in made.items()}
        card: dict = {"rows": counts}
    else:
        counts, card = prepare(recipe, folder)
    (folder / "card.json").write_text(json.dumps(card, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if not recipe.data.world:
        contract = RowWork(recipe).contract
        write_card(folder, card, contract and counter(contract.tokenizer))
    return {table.replace(".", "_"): count for table, count in counts.items()} | {"dropped": fallen(card)}


def counter(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[str]], list[int]]:
    """Texts -> how many tokens each has."""
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]


def write(folder: Path, table: str, rows) -> int:
    return write_table(folder / f"{table}.parquet", rows, SCHEMAS[table.split(".")[0]])


def world_tables(world: World, seed: int, valid_share: float) -> dict[str, list[dict]]:
    """The built-in world's tables by name. `prompts.rank` and `.rank_valid` are for `label` to rank."""
    made = world_data(world, seed, valid_share)
    tables: dict[str, list[dict]] = {"tasks": made.tasks}
    for part, answered in made.demonstrations.items():
        tables[f"demonstrations.{part}"] = [world_prompt(prompt) | {"response": answer} for prompt, answer in answered]
    for part, prompts in made.prompts.items():
        tables[f"prompts.{part}"] = [world_prompt(prompt) for prompt in prompts]
    for part, documents in made.text.items():
        tables[f"text.{part}"] = [{"kind": kind, "text": text} for kind, text in documents]
    return tables


def world_prompt(prompt: Prompt) -> dict:
    notes = {"category": prompt.use_case, "kind": prompt.kind, "source": "world"}
    return {"prompt": prompt.text, **notes, "spec": prompt.to_json()}


def prepare(recipe: Recipe, folder: Path) -> tuple[dict[str, int], dict]:
    """Write the tables of the user's own data. (rows of each table, the card)."""
    data = recipe.data
    with (
        TemporaryDirectory(dir=folder, prefix="pool-") as scratch,
        closing(Pool(Path(scratch) / "pool.db", recipe.seed)) as pool,
    ):
        readings = fill(pool, recipe, Progress(folder))
        clean(pool, data)
        split(pool, data)
        if data.pii_filter:
            remove_personal(pool)
        leaks, phrases = remove_leaks(pool, data)
        check_parts(pool, data)
        tables = {f"{kind}.{part}": rows for kind, part, rows in table_rows(pool, data)}
        counts = {table: write(folder, table, rows()) for table, rows in tables.items()}
        found = None if data.leakage == "ignore" else [leak.card() for leak in leaks]
        return counts, card_of(pool, data, readings, counts) | {"leakage": found, "phrases": phrases}


def fill(pool: Pool, recipe: Recipe, progress: Progress) -> list[Reading]:
    """Read all sources into the pool."""
    readings: list[Reading] = []
    work = RowWork(recipe)
    count = 0
    for found in entries(recipe.data, work, readings, recipe.runtime.jobs):
        count += pool.add(found, recipe.data.dedup_prefix)
        progress.update(count, count + 1)
    pool.gather()
    return readings


def clean(pool: Pool, data: Data) -> None:
    """What goes before the split, in the paper's order."""
    pool.remove_repeated()
    pool.remove_other_owners()
    if data.dedup_prefix:
        pool.remove_shared_prefixes(data.dedup_prefix)
    if data.max_prompts_per_user:
        pool.remove_above_cap(data.max_prompts_per_user)
    pool.remove_same_prompts()
    mix(pool, data)


def mix(pool: Pool, data: Data) -> None:
    """Keep of each source what its `weight` asks for."""
    numbers: dict[str, list[int]] = {}
    for number, (kind, _, _) in enumerate(sources.named_sources(data)):
        numbers.setdefault(kind, []).append(number)
    for kind, its in numbers.items():
        weights = [source.weight for source in getattr(data, kind)]
        if all(weights):
            counts = pool.counts(kind, "source")
            pool.remove_beyond_quotas(
                kind, dict(zip(its, quotas([counts.get(n, 0) for n in its], weights), strict=True))
            )


def split(pool: Pool, data: Data) -> None:
    """Give every row its part, and take out those whose unit's rankings are held out: see above."""
    valid, judge = data.valid_share, data.judge_ranking_share
    ranked = max(valid, data.valid_ranking_share)
    eval_, rest = valid * EVAL_SHARE, ranked + judge
    pool.move("rankings", 0, ranked)
    pool.move("rankings", ranked, rest)
    pool.move("demonstrations", 0, valid)
    pool.move("prompts", 0, eval_)
    pool.move("prompts", eval_, valid)
    pool.move("text", 0, valid)
    pool.assign("rankings", "valid", 0, ranked)
    pool.assign("rankings", "judge", ranked, rest)
    pool.assign("demonstrations", "valid", 0, valid)
    pool.assign("prompts", "eval", 0, eval_)
    pool.assign("prompts", "valid", eval_, valid)
    pool.assign("text", "valid", 0, valid)
    pool.remove_reserved(valid, rest)
    for kind in KINDS:
        pool.assign(kind, "train", 0, 1)


def remove_personal(pool: Pool) -> None:
    """Prompts with personal data leave the training split, and only that (paper, 3.2)."""
    says = "have a prompt with personal data, and would be trained on"
    chosen = "SELECT number FROM rows WHERE personal AND part IN ('train', 'judge')"
    pool.remove("pii", says, chosen, "data.pii_filter", True)


def remove_leaks(pool: Pool, data: Data) -> tuple[list[leakage.Leak], dict]:
    """Compare what trains with what measures, and take out or refuse what they share. (leaks, `phrase_card`)."""
    length = data.leakage_ngram
    if data.leakage == "ignore":
        return [], {}
    leaks, held_out = leakage.find(lambda: training_texts(pool), lambda: held_out_sets(pool, data), length)
    found = {leak.against: len(leak.rows) for leak in leaks if leak.rows}
    if found and data.leakage == "refuse":
        listed = ", ".join(f"{count} rows with {name}" for name, count in found.items())
        example = next(leak.examples[0] for leak in leaks if leak.examples)
        raise UserError(
            f"data.leakage=refuse: training data shares texts, or {length} words in a row, with what measures: "
            f"{listed}; one of them begins {example[:80]!r}; set data.leakage=remove to take such rows out of training"
        )
    says = f"share a text, or {length} words in a row, with what measures"
    numbers = set().union(*(leak.rows for leak in leaks)) if data.leakage == "remove" else ()
    pool.remove_numbers("leakage", says, numbers, "data.leakage", data.leakage)
    return leaks, {"length": length, **held_out.phrase_card()}


def held_out_sets(pool: Pool, data: Data) -> Iterator[tuple[str, Iterator[str]]]:
    """(name, texts) of all that measures: our own held-out prompts, and the evaluation sets."""
    for kind, parts in HELD_OUT_PARTS.items():
        for part in parts:
            yield f"{kind}.{part}", (record["prompt"] for _, record in pool.read(kind, part))
    for number, source in enumerate(data.evaluation_sets):
        rows = sources.rows(source, f"data.evaluation_sets[{number}]")
        yield short_name(source.path), (text for row in rows for text in leakage.strings(row.values))


def training_texts(pool: Pool) -> Iterator[tuple[int, list[str]]]:
    """(number, texts) of every row that trains."""
    for kind, part in TRAINING_PARTS:
        for number, record in pool.read(kind, part):
            texts = [record[name] for name in ("prompt", "response", "text") if record.get(name)]
            yield number, texts + list(record.get("responses", ()))


def table_rows(pool: Pool, data: Data) -> Iterator[tuple[str, str, Callable[[], Iterator[dict]]]]:
    """(kind, part, what yields its rows). Without prompts of their own, PPO and evaluation take those of rankings."""
    own = bool(data.prompts)
    for kind, parts in PARTS.items():
        for part in parts:
            if kind == "prompts" and not own:
                yield (
                    kind,
                    part,
                    lambda part=part: ranked_prompts(pool, part, max(data.valid_share, data.valid_ranking_share)),
                )
            else:
                yield kind, part, lambda kind=kind, part=part: (record for _, record in pool.read(kind, part))


def ranked_prompts(pool: Pool, part: str, held_out: float) -> Iterator[dict]:
    """The prompts of the rankings, each once."""
    seen = None
    for prompt, place, record in pool.read_by_prompt("rankings", "train" if part == "train" else "valid"):
        wanted = part == "train" or (place < held_out * EVAL_SHARE) == (part == "eval")
        if wanted and prompt != seen:
            seen = prompt
            yield {name: record[name] for name in PROMPTS.names if name in record}


def check_parts(pool: Pool, data: Data) -> None:
    """Something must be left to train on and to measure with."""
    if data.rankings and not pool.count("rankings"):
        raise UserError("data.rankings: nothing is left after dropping rankings whose responses are all tied")
    for kind in ("demonstrations", "rankings", "prompts"):
        if getattr(data, kind) and not pool.count(kind, "part = 'train'"):
            removed = "; ".join(f"{step.removed[kind]} {step.says}" for step in pool.steps if step.removed.get(kind))
            raise UserError(
                f"data.{kind}: nothing is left to train on: {removed or 'all are held out'}; add others, or lower "
                "data.judge_ranking_share or data.valid_ranking_share"
            )
    kind = "prompts" if data.prompts else "rankings"
    part = "eval" if data.prompts else "valid"
    if not pool.count(kind, f"part = '{part}'"):
        raise UserError(
            "no prompt is left for eval: there are too few; add more data.prompts, or raise data.valid_share or "
            "data.valid_ranking_share"
        )


def card_of(pool: Pool, data: Data, readings: list[Reading], counts: dict[str, int]) -> dict:
    """`card.json`: what was read, what every step took out, and what is left; the counts add up (`flow.py`)."""
    read: Counter = Counter()
    cards = {}
    for (kind, key, _), reading in zip(sources.named_sources(data), readings, strict=True):
        read[kind] += reading.read
        cards[key] = reading.card()
    steps, kept = [step.card() for step in pool.steps], {kind: pool.count(kind) for kind in KINDS}
    if not data.prompts:
        kept["prompts"] = sum(count for table, count in counts.items() if table.startswith("prompts."))
        says = "are the prompts of rankings, each once"
        steps.append({"step": "ranked", "says": says, "added": {"prompts": kept["prompts"]}})
    return {
        "rows": counts,
        "sources": cards,
        "steps": steps,
        "read": {kind: read[kind] for kind in KINDS},
        "kept": kept,
    }


def fallen(card: dict) -> int:
    """Rows that were read and are in no table."""
    dropped = sum(sum(source["dropped"].values()) for source in card.get("sources", {}).values())
    return dropped + sum(sum(step.get("removed", {}).values()) for step in card.get("steps", ()))
