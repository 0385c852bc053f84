"""The data stage: one pool, in the paper's order; splits that no prompt or user crosses and no row order moves; counts
that add up; and real files. Test T17 is `test_the_papers_preparation_by_brute_force`."""

import gzip
import hashlib
import json
import random
import re
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import data as stage
from instructrl.stages import ingest, records, sources
from instructrl.stages.pool import normalized
from instructrl.stages.tables import read_table
from instructrl.world import Prompt, make_world

REAL = Path(__file__).parents[1].parent / "shared" / "data"


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"path": str(path)}


def user_data(folder, count=300, **options):
    """A data section on files that share prompts with each other, with repeats that differ in case and spaces."""
    names = [f"Question {n}" for n in range(count)]
    demonstrations = [{"prompt": name, "response": f"answer {n}"} for n, name in enumerate(names[: count * 2 // 3])]
    rankings = [
        {"prompt": form(name), "responses": [f"a{n}", f"b{n}"], "ranks": [1, 2]}
        for n, name in enumerate(names[count // 3 :])
        for form in (str, str.upper, lambda text: f" {text.replace(' ', '  ')}")
    ]
    return {
        "demonstrations": (jsonl(folder / "d.jsonl", demonstrations),),
        "rankings": (jsonl(folder / "r.jsonl", rankings),),
        "text": (jsonl(folder / "t.jsonl", [{"text": f"Document {n}."} for n in range(100)]),),
        "pii_filter": False,
    } | options


def prompts(rows):
    return {normalized(row["prompt"]) for row in rows}


def with_text(folder, data):
    """Without a model of its own a recipe makes one, from text."""
    return {"text": (jsonl(folder / "some.jsonl", [{"text": f"Some text, {n}."} for n in range(9)]),)} | data


def prepared(folder, data, seed=0, jobs=1):
    """(tables by name, the card), from a run in a new folder."""
    out = folder / f"out-{len(list(folder.glob('out-*')))}"
    out.mkdir(parents=True)
    recipe = Recipe(data=Data(**with_text(folder, data)), model={"path": None}, seed=seed, runtime={"jobs": jobs})
    stage.run("data", recipe, {}, out)
    card = json.loads((out / "card.json").read_text())
    return {table: read_table(out / f"{table}.parquet") for table in card["rows"]}, card


def read(folder, data, seed=0):
    return prepared(folder, data, seed)[0]


def check_no_leak(tables):
    """What trains and what measures have no prompt in common; nor has the judge, with either."""
    train = set.union(*(prompts(tables[f"{name}.train"]) for name in ("demonstrations", "rankings", "prompts")))
    held_out = set.union(
        *(
            prompts(rows)
            for table, rows in tables.items()
            if table.endswith((".valid", ".eval")) and "text" not in table
        )
    )
    judge = prompts(tables["rankings.judge"])
    assert not train & held_out
    assert not judge & (train | held_out)
    assert not prompts(tables["prompts.eval"]) & prompts(tables["prompts.valid"])
    assert not {row["text"] for row in tables["text.train"]} & {row["text"] for row in tables["text.valid"]}


def check_counts(card):
    for kind, count in card["read"].items():
        changes = [source["dropped"] for key, source in card["sources"].items() if f".{kind}[" in key]
        changes = [sum(dropped.values()) for dropped in changes]
        changes += [step.get("removed", {}).get(kind, 0) - step.get("added", {}).get(kind, 0) for step in card["steps"]]
        assert count == card["kept"][kind] + sum(changes), kind
        assert card["kept"][kind] == sum(rows for table, rows in card["rows"].items() if table.startswith(kind))


def test_the_same_prompt_never_crosses_splits(tmp_path):
    tables, card = prepared(tmp_path, user_data(tmp_path))
    check_no_leak(tables)
    check_counts(card)
    assert all(tables.values())
    assert prompts(tables["prompts.train"]) == prompts(tables["rankings.train"])
    assert prompts(tables["prompts.eval"]) | prompts(tables["prompts.valid"]) == prompts(tables["rankings.valid"])
    assert len(tables["prompts.train"]) == len(prompts(tables["prompts.train"]))


def test_prompts_of_their_own(tmp_path):
    own = [{"prompt": f"Question {n}", "category": "qa"} for n in range(200)] * 2
    tables, card = prepared(tmp_path, user_data(tmp_path, prompts=(jsonl(tmp_path / "p.jsonl", own),)))
    check_no_leak(tables)
    check_counts(card)
    assert len(tables["prompts.train"]) > 80
    assert tables["prompts.eval"]
    assert {row["category"] for row in tables["prompts.train"]} == {"qa"}


def test_the_first_prompts_of_eval_are_a_sample_of_all_sources(tmp_path):
    rankings = [
        {"prompt": f"Question {n}", "chosen": "x", "rejected": "y", "source": str(n // 300)} for n in range(900)
    ]
    data = user_data(tmp_path, rankings=(jsonl(tmp_path / "many.jsonl", rankings),))
    first = [row["source"] for row in read(tmp_path, data)["prompts.eval"][:45]]
    assert all(first.count(source) >= 5 for source in "012")


# ---- the paper's preparation


WORDS = [f"{a}{b}{c}" for a in "bcdfghjklmnprstvwz" for b in "aeiou" for c in ("", "n", "st", "l")]


def logged(count, seed=0):
    """A mixed pool as a company has it: prompts by users, a few of whom wrote most; repeats, and shared beginnings."""
    rng = random.Random(seed)
    frames = [" ".join(rng.choices(WORDS, k=40)) for _ in range(40)]
    rows, texts = [], []
    for n in range(count):
        own = " ".join(rng.choices(WORDS, k=rng.randint(3, 60)))
        text = (
            rng.choice(texts) if texts and rng.random() < 0.1 else rng.choice([own, own, f"{rng.choice(frames)} {own}"])
        )
        texts.append(text)
        users = [None, f"user {int(4000 ** rng.random())}", f"user {int(4000 ** rng.random())}"]
        row = {"prompt": text, "user": rng.choice(users), "category": rng.choice(["qa", "chat"])}
        kind = ("prompts", "prompts", "demonstrations", "rankings")[n % 4]
        row |= {"demonstrations": {"response": own[:9]}, "rankings": {"chosen": f"a{n}", "rejected": "b"}}.get(kind, {})
        rows.append((kind, {key: value for key, value in row.items() if value is not None}))
    return rows


def sections(folder, rows, **options):
    """A data section with the rows in a file for each kind."""
    by_kind = defaultdict(list)
    for kind, row in rows:
        by_kind[kind].append(row)
    return (
        {kind: (jsonl(folder / f"{kind}.jsonl", found),) for kind, found in by_kind.items()}
        | {"pii_filter": False}
        | options
    )


def test_the_papers_preparation_by_brute_force(tmp_path):
    """On 20,000 prompts: no user in two splits, at most 200 prompts each, no shared long prefix, and counts add up."""
    tables, card = prepared(tmp_path, sections(tmp_path, logged(20_000)))
    check_no_leak(tables)
    check_counts(card)
    removed = {step["step"]: sum(step["removed"].values()) for step in card["steps"]}
    assert all(removed[step] > 20 for step in ("other users", "prefix", "cap", "reserved")), removed
    assert check_users(tables) > 150
    kept = sorted(set.union(*(prompts(rows) for table, rows in tables.items() if not table.startswith("text"))))
    assert len(kept) > 5000
    assert max(common_prefix(a, b) for a, b in pairwise(kept)) < Data().dedup_prefix  # sorted: neighbours share most


def check_users(tables):
    """No user in two splits, at most 200 prompts each, no shared prefix. Returns the most prompts of a user."""
    split = {"eval": "held out", "valid": "held out", "train": "train", "judge": "judge"}
    splits, per_user = defaultdict(set), defaultdict(set)
    for table, rows in tables.items():
        for row in rows:
            if row.get("user"):
                splits[row["user"]].add(split[table.split(".")[1]])
                per_user[row["user"]].add(normalized(row["prompt"]))
    assert len(splits) > 500
    assert {len(found) for found in splits.values()} == {1}
    most = max(map(len, per_user.values()))
    assert most <= 200
    return most


def common_prefix(a, b):
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def fingerprints(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.parquet")}


def test_neither_the_order_of_rows_nor_the_number_of_processes_changes_a_byte(tmp_path):
    rows = logged(3000)
    rows += [("text", {"text": f"{row['prompt']}."}) for _, row in rows[:300]]
    results = []
    for number, jobs in enumerate((1, 1, 2, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        prepared(folder, sections(folder, rows), jobs=jobs)
        results.append(fingerprints(folder / "out-0"))
        random.Random(number).shuffle(rows)
    assert len(results[0]) == 10
    assert results[1:] == results[:1] * 3


def test_splits_depend_on_the_seed(tmp_path):
    valid = [prompts(read(tmp_path, user_data(tmp_path), seed)["demonstrations.valid"]) for seed in (0, 1)]
    assert valid[0] != valid[1]


def test_what_is_off_removes_nothing(tmp_path):
    rows = [("prompts", {"prompt": "the same beginning of a prompt " * 8 + str(n), "user": "u"}) for n in range(300)]
    rows += [("prompts", {"prompt": f"other {n}"}) for n in range(50)]
    rows += [("demonstrations", {"prompt": f"demonstration {n}", "response": "a"}) for n in range(50)]
    data = sections(tmp_path, rows, dedup_prefix=0, max_prompts_per_user=None, leakage="ignore")
    tables, card = prepared(tmp_path, data)
    assert sum(len(tables[f"prompts.{part}"]) for part in ("train", "valid", "eval")) == 350
    assert {step["step"] for step in card["steps"] if any(step.get("removed", {}).values())} == set()


def test_a_few_shot_example_stays_on_one_side(tmp_path):
    """Its K prompts begin alike and are not deduplicated against each other (App. A.1)."""

    def example(n):
        pairs = [{"query": f"query {n} {k}", "response": f"{k}"} for k in range(4)]
        return {"instruction": f"Instruction number {n}: " + "do what is asked for here " * 8, "examples": pairs}

    data = user_data(tmp_path, demonstrations=(jsonl(tmp_path / "f.jsonl", [example(n) for n in range(60)]),))
    tables, card = prepared(tmp_path, data)
    sides = defaultdict(Counter)
    for part in ("train", "valid"):
        for row in tables[f"demonstrations.{part}"]:
            sides[re.search(r"Instruction number (\d+)", row["prompt"]).group(1)][part] += 1
    assert card["read"]["demonstrations"] == 240
    assert {tuple(found.values()) for found in sides.values()} == {(4,)}
    assert len(sides) == 60
    assert tables["demonstrations.valid"]


# ---- leakage


PASSAGE = "one passage of more than thirteen words that is in training and in an evaluation set at the same time"
ANSWER = f"As it says: {PASSAGE}."


def leaky(folder, **options):
    evaluation = [{"question": "Who wrote this long passage?", "context": PASSAGE, "choices": ["a", "b"]}]
    demonstrations = [{"prompt": f"Question {n}", "response": "yes"} for n in range(40)]
    demonstrations += [{"prompt": "who wrote this LONG passage", "response": "a"}, {"prompt": "p", "response": ANSWER}]
    options |= {"evaluation_sets": (jsonl(folder / "exam.jsonl", evaluation),)}
    return user_data(folder, demonstrations=(jsonl(folder / "leaky.jsonl", demonstrations),), **options)


def test_what_training_shares_with_an_evaluation_set_is_removed_and_reported(tmp_path):
    tables, card = prepared(tmp_path, leaky(tmp_path, valid_share=0.02))
    (exam,) = [leak for leak in card["leakage"] if leak["against"] == "exam"]
    assert (exam["exact"], exam["ngram"]) == (1, 1)
    assert len(exam["examples"]) == 2
    texts = {text for row in tables["demonstrations.train"] for text in (row["prompt"], row["response"])}
    assert not texts & {ANSWER, "who wrote this LONG passage"}
    check_counts(card)


def test_leakage_can_be_reported_only_or_refused(tmp_path):
    tables, card = prepared(tmp_path, leaky(tmp_path, valid_share=0.02, leakage="report"))
    assert ANSWER in {row["response"] for row in tables["demonstrations.train"]}
    assert card["leakage"][-1]["ngram"] == 1
    tables, card = prepared(tmp_path, leaky(tmp_path, valid_share=0.02, leakage="ignore"))
    assert card["leakage"] is None
    with pytest.raises(UserError, match=r"leakage=refuse.*2 rows with exam; one of them begins") as error:
        prepared(tmp_path, leaky(tmp_path, valid_share=0.02, leakage="refuse"))
    assert "\n" not in str(error.value)


def test_splits_share_no_run_of_words(tmp_path):
    rng = random.Random(0)
    common = " ".join(rng.choices(WORDS, k=20))
    rows = [
        ("prompts", {"prompt": f"{n} {common if n % 40 == 0 else ''} " + " ".join(rng.choices(WORDS, k=9))})
        for n in range(400)
    ]
    rows += [("demonstrations", {"prompt": f"demonstration {n}", "response": "a"}) for n in range(40)]
    tables, card = prepared(tmp_path, sections(tmp_path, rows, valid_share=0.3, valid_ranking_share=0.3))
    held_out = [row for part in ("valid", "eval") for row in tables[f"prompts.{part}"] if common in row["prompt"]]
    assert held_out
    assert not any(common in row["prompt"] for row in tables["prompts.train"])
    check_counts(card)


# ---- what is left, and what is said if nothing is


def test_rows_are_counted_by_source(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "b", "responses": ["x", "y"], "ranks": [1, 1]},
        {"prompt": "c", "responses": ["x", ""], "ranks": [1, 2]},
        {"prompt": "d", "responses": ["x", "y"], "ranks": [2, 1]},
    ]
    data = user_data(tmp_path, rankings=(jsonl(tmp_path / "five.jsonl", rows) | {"skip_invalid": True},))
    _, card = prepared(tmp_path, data)
    source = card["sources"]["data.rankings[0]"]
    assert (source["read"], source["kept"]) == (5, 3)
    assert source["dropped"] == {"all responses tied": 1, "invalid": 1}
    (repeated,) = [step["removed"] for step in card["steps"] if step["step"] == "repeated"]
    assert repeated == {"rankings": 1}
    check_counts(card)


def test_a_limit_is_kept_to_the_row(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"prompt": f"p{n}"} for n in range(2000)]) | {"limit": 777}
    _, card = prepared(tmp_path, user_data(tmp_path, prompts=(source,)))
    assert card["sources"]["data.prompts[0]"]["kept"] == 777


def test_nothing_left_after_dropping_ties(tmp_path):
    tied = [{"prompt": f"p{n}", "responses": ["x", "y"], "ranks": [1, 1]} for n in range(9)]
    data = user_data(tmp_path) | {"rankings": (jsonl(tmp_path / "r.jsonl", tied),)}
    with pytest.raises(UserError, match="nothing is left after dropping rankings whose responses are all tied"):
        read(tmp_path, data)


def test_no_prompt_left_for_eval(tmp_path):
    demonstrations = [{"prompt": f"p{n}", "response": "b"} for n in range(9)]
    data = {
        "demonstrations": (jsonl(tmp_path / "d.jsonl", demonstrations),),
        "rankings": (jsonl(tmp_path / "r.jsonl", [{"prompt": "Question 0", "chosen": "x", "rejected": "y"}]),),
        "pii_filter": False,
    }
    with pytest.raises(UserError, match="no prompt is left for eval"):
        read(tmp_path, data)


def test_no_ranking_left_to_train_on(tmp_path):
    """The only prompt that is ranked falls to the judge, while there are prompts enough for all else."""
    prompts = [{"prompt": f"p{n}", "response": "b"} for n in range(300)]
    data = {
        "demonstrations": (jsonl(tmp_path / "d.jsonl", prompts),),
        "rankings": (jsonl(tmp_path / "r.jsonl", [{"prompt": "Question 0", "chosen": "x", "rejected": "y"}]),),
        "prompts": (jsonl(tmp_path / "p.jsonl", prompts),),
        "pii_filter": False,
        "judge_ranking_share": 0.85,
        "valid_ranking_share": 0.1,
    }
    with pytest.raises(UserError, match=r"data\.rankings: nothing is left to train on: all are held out"):
        read(tmp_path, data)


def everything_of_everything(folder, count):
    """Each prompt is a demonstration, a ranking and a PPO prompt."""
    rows = [{"prompt": f"Question {n}", "response": "a", "chosen": "x", "rejected": "y"} for n in range(count)]
    source = (jsonl(folder / "all.jsonl", rows),)
    return {"demonstrations": source, "rankings": source, "prompts": source, "pii_filter": False}


def test_prompts_of_held_out_rankings_train_no_policy(tmp_path):
    tables, card = prepared(tmp_path, everything_of_everything(tmp_path, 400))
    check_no_leak(tables)
    check_counts(card)
    counts = {table: len(rows) for table, rows in tables.items()}
    (reserved,) = [step["removed"] for step in card["steps"] if step["step"] == "reserved"]
    assert counts["rankings.valid"] + counts["rankings.judge"] > 150
    assert counts["demonstrations.train"] == counts["rankings.train"] == counts["prompts.train"]
    assert counts["demonstrations.valid"] == counts["prompts.eval"] + counts["prompts.valid"] > 20
    assert reserved["demonstrations"] == reserved["prompts"]
    assert counts["prompts.eval"] > counts["prompts.valid"] > 0


@pytest.mark.parametrize(("kind", "column"), [("demonstrations", "response"), ("prompts", "category")])
def test_nothing_left_to_train_on(tmp_path, kind, column):
    data = everything_of_everything(tmp_path, 40)
    reserved = read(tmp_path, data)["rankings.judge"]
    rows = [{"prompt": row["prompt"], column: "a"} for row in reserved]
    with pytest.raises(UserError, match=rf"data\.{kind}: nothing is left to train on: \d+ belong to"):
        read(tmp_path, data | {kind: (jsonl(tmp_path / "few.jsonl", rows),)})


def test_blank_text_rows_are_dropped_and_counted(tmp_path):
    texts = jsonl(tmp_path / "blank.jsonl", [{"text": ""}, {"text": "One."}, {"text": " \n"}, {"text": "Two."}])
    tables, card = prepared(tmp_path, user_data(tmp_path, text=(texts,)))
    assert card["sources"]["data.text[0]"]["dropped"] == {"empty": 2}
    assert len(tables["text.train"]) == len(tables["text.valid"]) == 1


def test_the_stage_writes_every_table_and_says_what_it_dropped(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    recipe = Recipe(data=user_data(tmp_path), model={"path": None})
    metrics = stage.run("data", recipe, {}, folder)
    card = json.loads((folder / "card.json").read_text())
    for table, count in card["rows"].items():
        assert len(read_table(folder / f"{table}.parquet")) == count == metrics[table.replace(".", "_")]
    assert metrics["dropped"] == sum(count for step in card["steps"] for count in step.get("removed", {}).values()) > 0
    assert "## " in (folder / "data_card.md").read_text()
    assert card["sources"]["data.text[0]"]["files"] == [str(tmp_path / "t.jsonl")]
    assert not list(folder.glob("pool-*"))


def test_long_prompts_are_cut_in_whole_words(tmp_path):
    text = "one two  three four"
    cuts = {3: "one", 4: "one", 5: "one", 7: "one two", 9: "one two", 14: "one two  three", 99: text}
    cuts |= {-4: "four", -6: "four", -7: "four", -10: "three four", -12: "three four", -99: text}
    assert {characters: ingest.cut(text, characters) for characters in cuts} == cuts
    assert ingest.cut("unbroken", 4) == "unbr"
    assert ingest.cut("unbroken", -4) == "oken"
    prompts = jsonl(tmp_path / "p.jsonl", [{"prompt": f"{text} five{n}"} for n in range(30)]) | {"cut_prompt": -7}
    tables = read(tmp_path, user_data(tmp_path, prompts=(prompts,)))
    assert {row["prompt"][:4] for row in tables["prompts.train"]} == {"five"}


# ---- the built-in world


def test_the_world_fills_every_table_and_leaks_nothing(tmp_path):
    sizes = {"documents": 200, "valid_documents": 20, "demonstrations": 60, "ranked_prompts": 50}
    sizes |= {"valid_ranked_prompts": 20, "ppo_prompts": 60, "eval_prompts": 40}
    recipe = Recipe(data={"world": sizes}, eval={"judge": "gold"})
    metrics = stage.run("data", recipe, {}, tmp_path)
    tables = {path.name.removesuffix(".parquet"): read_table(path) for path in tmp_path.glob("*.parquet")}
    assert {table.replace(".", "_"): len(rows) for table, rows in tables.items()} | {"dropped": 0} == metrics
    expected = {"demonstrations.train": 60, "prompts.rank": 50, "prompts.eval": 40, "text.train": 200, "text.valid": 20}
    assert {table: len(tables[table]) for table in expected} == expected
    training = [tables[name] for name in ("demonstrations.train", "prompts.train", "prompts.rank")]
    assert not prompts(tables["prompts.eval"]) & set.union(*map(prompts, training))
    world = make_world(recipe.data.world, 0)
    for row in tables["prompts.eval"]:
        prompt = Prompt.from_json(row["spec"])
        assert (prompt.text, prompt.use_case) == (row["prompt"], row["category"])
        assert world.judge(prompt, world.reference(prompt, random.Random(0))).correct
    assert all(0 <= row["answer"] < len(row["choices"]) for row in tables["tasks"])


# ---- real data


def listed(source):
    """All records of a source."""
    return [record for row in sources.rows(source, "k") for record in records.record(row, "rankings", source, "k")]


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_real_files_keep_their_rows(tmp_path):
    """Counts against a plain reading of the same files."""
    comparisons = REAL / "comparisons"
    expected = {"finegrained_rlhf_qa_k4": 4, "summeval_k9": 9, "pandalm_3annotators": 2, "hh_rlhf_harmless_test": 2}
    files = [comparisons / f"{name}.jsonl.gz" for name in expected]
    data = user_data(tmp_path, rankings=[{"path": str(file), "skip_invalid": True} for file in files], dedup_prefix=0)
    tables, card = prepared(tmp_path, data)
    check_counts(card)
    for number, (file, responses) in enumerate(zip(files, expected.values(), strict=True)):
        with gzip.open(file, "rt") as stream:
            raw = [json.loads(line) for line in stream]
        source = card["sources"][f"data.rankings[{number}]"]
        assert len(raw) == source["read"] == source["kept"] + sum(source["dropped"].values())
        invalid = sum(not all(response.strip() for response in row["responses"]) for row in raw)
        assert source["dropped"].get("invalid", 0) == invalid
        rows = [row for part in ("train", "valid", "judge") for row in tables[f"rankings.{part}"]]
        assert {len(row["responses"]) for row in rows if row["source"] == raw[0]["source"]} == {responses}
    panda = [row for part in ("train", "valid", "judge") for row in tables[f"rankings.{part}"] if row["annotators"]]
    assert all(len(row["annotators"]) == 3 for row in panda)
    agree = sum(ranks == row["ranks"] for row in panda for ranks in row["annotators"]) / (3 * len(panda))
    assert agree > 0.9  # the ranks are the annotators' majority


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_context_goes_before_the_prompt():
    path = str(REAL / "comparisons" / "finegrained_rlhf_qa_k4.jsonl.gz")
    plain = listed(Source(path=path))[:5]
    joined = listed(Source(path=path, columns={"prompt": ("context", "prompt")}))[:5]
    for short, long in zip(plain, joined, strict=True):
        assert long["prompt"].endswith("\n\n" + short["prompt"])
        assert len(long["prompt"]) > len(short["prompt"]) + 50


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_three_sets_from_a_pool_of_real_rows_with_made_up_users(tmp_path):
    """T17 on real text, the PII filter and a real evaluation set included."""
    rng, kinds = random.Random(0), {"demonstrations": [], "rankings": [], "prompts": []}
    for kind, name, limit in (
        ("demonstrations", "demonstrations/dolly_hhrlhf_small", None),
        ("demonstrations", "demonstrations/gsm8k_train", 3000),
        ("rankings", "comparisons/pandalm_3annotators", None),
        ("rankings", "comparisons/hh_rlhf_harmless_test", None),
        ("prompts", "demonstrations/t0_p3_sample", 7_000),
        ("prompts", "eval/truthfulqa", 100),  # an evaluation set among the prompts: a mistake to be caught
    ):
        with gzip.open(REAL / f"{name}.jsonl.gz", "rt") as stream:
            for row in list(map(json.loads, stream))[:limit]:
                row = row if "prompt" in row else {"prompt": row["Question"]}
                kept = {key: value for key, value in row.items() if key in ("prompt", "response", "responses", "ranks")}
                user = rng.choice(["", f"user {int(5000 ** rng.random())}"])
                kinds[kind].append(kept | {"user": user})
    sources = {kind: [jsonl(tmp_path / f"{kind}.jsonl", rows) | {"skip_invalid": True}] for kind, rows in kinds.items()}
    evaluation = [{"path": str(REAL / "eval" / "truthfulqa.jsonl.gz")}]
    tables, card = prepared(tmp_path, sources | {"evaluation_sets": evaluation})
    check_no_leak(tables)
    check_counts(card)
    check_users(tables)
    removed = {step["step"]: sum(step.get("removed", {}).values()) for step in card["steps"]}
    assert all(removed[step] for step in ("repeated", "prefix", "cap", "reserved", "pii", "leakage")), removed
    assert {leak["against"]: leak["exact"] for leak in card["leakage"]}["truthfulqa"] > 50
    assert all(len(tables[f"{kind}.train"]) > 300 for kind in ("demonstrations", "rankings", "prompts"))
    assert (tmp_path / "out-0" / "data_card.md").stat().st_size > 3000
