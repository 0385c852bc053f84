"""The data stage: splits that no prompt crosses and no row order moves, counts that add up, and real files."""

import gzip
import json
import random
from pathlib import Path

import pytest

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import data as stage
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
    } | options


def prompts(rows):
    return {" ".join(row["prompt"].lower().split()) for row in rows}


def read(data, seed=0):
    return stage.read_data(Data(**data), seed)[0]


def check_no_leak(tables):
    for name in ("demonstrations", "rankings", "prompts"):
        parts = [prompts(rows) for table, rows in tables.items() if table.startswith(name)]
        assert sum(map(len, parts)) == len(set.union(*parts))
    reserved = prompts(tables["rankings.judge"]) | prompts(tables["rankings.valid"])
    for table in ("demonstrations.train", "demonstrations.valid", "rankings.train", "prompts.train"):
        assert not reserved & prompts(tables[table]), table
    held_out = prompts(tables["prompts.eval"]) | prompts(tables["prompts.valid"])
    for table in ("demonstrations.train", "rankings.train", "rankings.judge", "prompts.train"):
        assert not held_out & prompts(tables[table]), table
    assert not {row["text"] for row in tables["text.train"]} & {row["text"] for row in tables["text.valid"]}


def test_the_same_prompt_never_crosses_splits(tmp_path):
    tables = read(user_data(tmp_path))
    check_no_leak(tables)
    assert all(tables.values())
    assert prompts(tables["prompts.train"]) == prompts(tables["rankings.train"])
    assert prompts(tables["prompts.eval"]) <= prompts(tables["rankings.valid"])


def test_prompts_of_their_own(tmp_path):
    own = [{"prompt": f"Question {n}", "category": "qa"} for n in range(200)] * 2
    tables = read(user_data(tmp_path, prompts=(jsonl(tmp_path / "p.jsonl", own),)))
    check_no_leak(tables)
    assert len(tables["prompts.train"]) > 100
    assert tables["prompts.eval"]
    assert {row["category"] for row in tables["prompts.train"]} == {"qa"}


def test_the_first_prompts_of_eval_are_a_sample_of_all_sources(tmp_path):
    rankings = [
        {"prompt": f"Question {n}", "chosen": "x", "rejected": "y", "source": str(n // 300)} for n in range(900)
    ]
    data = user_data(tmp_path, rankings=(jsonl(tmp_path / "many.jsonl", rankings),))
    first = [row["source"] for row in read(data)["prompts.eval"][:45]]
    assert all(first.count(source) >= 5 for source in "012")


def test_splits_do_not_depend_on_the_order_of_rows_but_on_the_seed(tmp_path):
    before = read(user_data(tmp_path))
    data = user_data(tmp_path)
    for path in tmp_path.glob("*.jsonl"):
        lines = path.read_text().splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        path.write_text("".join(lines))
    after = read(data)
    for table, rows in before.items():
        column = "text" if table.startswith("text") else "prompt"
        assert {row[column] for row in rows} == {row[column] for row in after[table]}
    assert prompts(read(data, seed=1)["demonstrations.valid"]) != prompts(after["demonstrations.valid"])


def test_new_rows_move_no_old_prompt():
    shares = {"valid": 0.2, "judge": 0.3}
    few = stage.split_texts([f"q{n}" for n in range(500)], shares, 0)
    many = stage.split_texts([f"q{n}" for n in range(5000)], shares, 0)
    assert few == {text: many[text] for text in few}
    sizes = [sum(part == name for part in many.values()) / 5000 for name in ("train", "valid", "judge")]
    assert sizes == pytest.approx([0.5, 0.2, 0.3], abs=0.03)


@pytest.mark.parametrize(("count", "expected"), [(1, (1, 0, 0)), (2, (1, 0, 1)), (3, (1, 1, 1))])
def test_few_texts_still_fill_every_part(count, expected):
    """Brute force over seeds: whatever the hashes, training keeps one, then the last part, then the first."""
    for seed in range(50):
        part = list(stage.split_texts([f"q{n}" for n in range(count)], {"valid": 0.01, "judge": 0.01}, seed).values())
        assert (part.count("train"), part.count("valid"), part.count("judge")) == expected
    assert set(stage.split_texts([f"q{n}" for n in range(9)], {"valid": 0.0}, 0).values()) == {"train"}


def test_counts_add_up(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "a", "responses": ["x", "y"], "ranks": [1, 2]},
        {"prompt": "b", "responses": ["x", "y"], "ranks": [1, 1]},
        {"prompt": "c", "responses": ["x", ""], "ranks": [1, 2]},
        {"prompt": "d", "responses": ["x", "y"], "ranks": [2, 1]},
    ]
    source = Source(**jsonl(tmp_path / "r.jsonl", rows), skip_invalid=True)
    found, reading = stage.read_source(source, "rankings", "data.rankings[0]")
    assert reading.dropped == {"repeated": 1, "all responses tied": 1, "invalid": 1}
    assert len(found) + sum(reading.dropped.values()) == len(rows)
    assert reading.kept == len(found) == 2


def test_nothing_left_after_dropping_ties(tmp_path):
    tied = [{"prompt": f"p{n}", "responses": ["x", "y"], "ranks": [1, 1]} for n in range(9)]
    data = user_data(tmp_path) | {"rankings": (jsonl(tmp_path / "r.jsonl", tied),)}
    with pytest.raises(UserError, match="nothing is left after dropping rankings whose responses are all tied"):
        read(data)


def test_no_prompt_left_for_eval(tmp_path):
    demonstrations = [{"prompt": "Question 0", "response": "a"}] + [
        {"prompt": f"p{n}", "response": "b"} for n in range(9)
    ]
    data = {
        "demonstrations": (jsonl(tmp_path / "d.jsonl", demonstrations),),
        "rankings": (jsonl(tmp_path / "r.jsonl", [{"prompt": "Question 0", "chosen": "x", "rejected": "y"}]),),
    }
    with pytest.raises(UserError, match="no prompt is left for eval"):
        read(data)


def everything_of_everything(folder, count):
    """Each prompt is a demonstration, a ranking and a PPO prompt."""
    rows = [{"prompt": f"Question {n}", "response": "a", "chosen": "x", "rejected": "y"} for n in range(count)]
    source = (jsonl(folder / "all.jsonl", rows),)
    return {"demonstrations": source, "rankings": source, "prompts": source}


def test_prompts_of_held_out_rankings_train_no_policy(tmp_path):
    tables, card = stage.read_data(Data(**everything_of_everything(tmp_path, 400)), 0)
    check_no_leak(tables)
    counts = {table: len(rows) for table, rows in tables.items()}
    held_out = counts["rankings.valid"] + counts["rankings.judge"]
    assert held_out > 150
    assert card[stage.HELD_OUT]["demonstrations"] == held_out
    assert counts["demonstrations.train"] + counts["demonstrations.valid"] == counts["rankings.train"] == 400 - held_out
    assert counts["demonstrations.valid"] > 8  # not emptied by the hash that the rankings share
    everyone = counts["prompts.train"] + counts["prompts.eval"] + counts["prompts.valid"]
    assert everyone + card[stage.HELD_OUT]["prompts.train"] == 400
    assert counts["prompts.eval"] > 20


@pytest.mark.parametrize(("kind", "column"), [("demonstrations", "response"), ("prompts", "category")])
def test_nothing_left_to_train_on(tmp_path, kind, column):
    data = everything_of_everything(tmp_path, 40)
    reserved = read(data)["rankings.judge"]
    rows = [{"prompt": row["prompt"], column: "a"} for row in reserved]
    with pytest.raises(UserError, match=rf"data\.{kind}: nothing is left to train on: every prompt is also that of"):
        read(data | {kind: (jsonl(tmp_path / "few.jsonl", rows),)})


def test_blank_text_rows_are_dropped_and_counted(tmp_path):
    source = Source(**jsonl(tmp_path / "t.jsonl", [{"text": ""}, {"text": "One."}, {"text": " \n"}]))
    rows, reading = stage.read_source(source, "text", "data.text[0]")
    assert ([row["text"] for row in rows], reading.dropped) == (["One."], {"empty": 2})


def test_the_stage_writes_every_table_and_says_what_it_dropped(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    recipe = Recipe(data=user_data(tmp_path), ppo_init={"pretraining_share": 0}, ppo_ptx={"ptx_coef": 0})
    metrics = stage.run("data", recipe, {}, folder)
    card = json.loads((folder / "card.json").read_text())
    for table, count in card["rows"].items():
        assert len(read_table(folder / f"{table}.parquet")) == count == metrics[table.replace(".", "_")]
    readings = card["sources"]
    kept = sum(readings[f"data.{kind}[0]"]["kept"] for kind in ("demonstrations", "rankings"))
    fallen = card[stage.HELD_OUT]
    assert fallen["demonstrations"] > 0
    assert metrics["dropped"] == sum(fallen.values()) + sum(sum(r["dropped"].values()) for r in readings.values())
    assert kept == fallen["demonstrations"] + sum(
        count for table, count in card["rows"].items() if table.split(".")[0] in ("demonstrations", "rankings")
    )
    assert readings["data.text[0]"]["files"] == [str(tmp_path / "t.jsonl")]


def test_long_prompts_are_cut_in_whole_words(tmp_path):
    text = "one two  three four"
    cuts = {3: "one", 4: "one", 5: "one", 7: "one two", 9: "one two", 14: "one two  three", 99: text}
    cuts |= {-4: "four", -6: "four", -7: "four", -10: "three four", -12: "three four", -99: text}
    assert {characters: stage.cut(text, characters) for characters in cuts} == cuts
    assert stage.cut("unbroken", 4) == "unbr"
    assert stage.cut("unbroken", -4) == "oken"
    source = Source(**jsonl(tmp_path / "d.jsonl", [{"prompt": text, "response": "a"}]), cut_prompt=-5)
    assert stage.read_source(source, "demonstrations", "k")[0][0]["prompt"] == "four"


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


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_real_files_keep_their_rows():
    """Counts against a plain reading of the same files."""
    comparisons = REAL / "comparisons"
    expected = {"finegrained_rlhf_qa_k4": 4, "summeval_k9": 9, "pandalm_3annotators": 2, "hh_rlhf_harmless_test": 2}
    for name, responses in expected.items():
        path = comparisons / f"{name}.jsonl.gz"
        rows, reading = stage.read_source(Source(path=str(path), skip_invalid=True), "rankings", "k")
        with gzip.open(path, "rt") as stream:
            raw = [json.loads(line) for line in stream]
        assert len(raw) == reading.kept + sum(reading.dropped.values())
        assert {len(row["responses"]) for row in rows} == {responses}
        invalid = sum(not all(response.strip() for response in row["responses"]) for row in raw)
        assert reading.dropped["invalid"] == invalid
    rows, _ = stage.read_source(
        Source(path=str(comparisons / "pandalm_3annotators.jsonl.gz"), skip_invalid=True), "rankings", "k"
    )
    assert all(len(row["annotators"]) == 3 for row in rows)
    agree = sum(ranks == row["ranks"] for row in rows for ranks in row["annotators"]) / (3 * len(rows))
    assert agree > 0.9  # the ranks are the annotators' majority


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_context_goes_before_the_prompt():
    path = str(REAL / "comparisons" / "finegrained_rlhf_qa_k4.jsonl.gz")
    plain, _ = stage.read_source(Source(path=path, limit=5), "rankings", "k")
    joined, _ = stage.read_source(
        Source(path=path, limit=5, columns={"prompt": ("context", "prompt")}), "rankings", "k"
    )
    for short, long in zip(plain, joined, strict=True):
        assert long["prompt"].endswith("\n\n" + short["prompt"])
        assert len(long["prompt"]) > len(short["prompt"]) + 50
