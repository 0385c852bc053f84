"""Every format reads the same, and every kind of broken input is one sentence that says where."""

import csv
import gc
import gzip
import json
import re
import subprocess
import sys
import tracemalloc

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from one_source import read_source

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import readers, sources
from instructrl.stages.mixture import quotas

ROWS = [
    {"prompt": "Name a fish.", "response": "A carp.\nOr a pike."},
    {"prompt": 'Say "hi", please', "response": "hi, \u00e4nd \u2603"},
    {"prompt": "Count to two.", "response": " one two "},
]


def write(path, text):
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_bytes(text.encode())
    return path


def jsonl(path, rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def demonstrations(path, **options):
    return read_source(Source(path=str(path), **options), "demonstrations", "data.demonstrations[0]")[0]


def error_of(kind, path, **options):
    with pytest.raises(UserError) as caught:
        read_source(Source(path=str(path), **options), kind, f"data.{kind}[0]")
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value).replace("\\n", "")
    return str(caught.value)


def texts(rows):
    return [(row["prompt"], row["response"]) for row in rows]


@pytest.mark.parametrize("compressed", ["", ".gz"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "parquet"])
def test_every_format_reads_the_same(tmp_path, form, compressed):
    path = tmp_path / f"demos.{form}{compressed}"
    if form == "parquet":
        plain = tmp_path / "plain.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), plain)
        path.write_bytes(gzip.compress(plain.read_bytes()) if compressed else plain.read_bytes())
    elif form == "csv":
        plain = tmp_path / "plain.csv"
        with plain.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, ["prompt", "response"])
            writer.writeheader()
            writer.writerows(ROWS)
        path.write_bytes(gzip.compress(plain.read_bytes()) if compressed else plain.read_bytes())
    else:
        write(path, json.dumps(ROWS) if form == "json" else "\n\n".join(json.dumps(row) for row in ROWS))
    assert texts(demonstrations(path)) == texts(ROWS)
    assert {row["source"] for row in demonstrations(path)} == {"demos"}


def test_rankings_in_csv_are_those_in_jsonl(tmp_path):
    rows = [{"prompt": "a", "responses": ["x", "y", "z"], "ranks": [1, 2, 2]}]
    written = [{key: value if key == "prompt" else json.dumps(value) for key, value in row.items()} for row in rows]
    with (tmp_path / "r.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(written)
    one, _ = read_source(Source(path=str(tmp_path / "r.csv")), "rankings", "k")
    other, _ = read_source(Source(path=str(jsonl(tmp_path / "r.jsonl", rows))), "rankings", "k")
    assert one == other
    assert one[0]["ranks"] == [1, 2, 2]


def test_a_csv_with_a_column_for_each_response(tmp_path):
    path = write(tmp_path / "r.csv", "q,a,b,ra,rb\nwhy?,because,so,2,1.0\n")
    columns = {"prompt": "q", "responses": ("a", "b"), "ranks": ("ra", "rb")}
    rows, _ = read_source(Source(path=str(path), columns=columns), "rankings", "k")
    assert (rows[0]["responses"], rows[0]["ranks"]) == (["because", "so"], [2, 1])


def test_a_folder_is_all_its_files_in_order(tmp_path):
    for name, row in zip(("b.jsonl", "a/z.jsonl.gz", "c.csv"), ROWS, strict=True):
        if name == "c.csv":
            write(tmp_path / name, "prompt,response\nCount to two., one two \n")
        else:
            jsonl(tmp_path / name, [row])
    write(tmp_path / "README.md", "not data")
    write(tmp_path / ".hidden.jsonl", "not data either")
    assert texts(demonstrations(tmp_path)) == texts([ROWS[1], ROWS[0], ROWS[2]])


def test_paragraphs_of_a_text_file(tmp_path):
    path = write(tmp_path / "book.txt.gz", "\n\nOne\ntwo.\r\n \t\nThree.\n\n\n")
    rows, _ = read_source(Source(path=str(path)), "text", "data.text[0]")
    assert [row["text"] for row in rows] == ["One\ntwo.", "Three."]
    assert {row["kind"] for row in rows} == {"book"}


def test_renamed_and_joined_columns(tmp_path):
    rows = [
        {"instruction": "Sum up.", "context": "A story.", "output": "Short."},
        {"instruction": "Hi", "context": "", "output": "Yo"},
    ]
    path = jsonl(tmp_path / "d.jsonl", rows)
    found = demonstrations(path, columns={"prompt": ("context", "instruction"), "response": "output"})
    assert texts(found) == [("A story.\n\nSum up.", "Short."), ("Hi", "Yo")]


def test_chats_become_text(tmp_path):
    ask, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
    more, last = {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"}
    path = jsonl(
        tmp_path / "d.jsonl", [{"prompt": [ask], "response": [answer]}, {"messages": [ask, answer, more, last]}]
    )
    multi = "User: Hi\n\nAssistant: Hello\n\nUser: Bye"
    assert texts(demonstrations(path)) == [("Hi", "Hello"), (multi, "See you")]
    worse = {"role": "assistant", "content": "Go away"}
    implicit = {"chosen": [ask, answer, more, last], "rejected": [ask, answer, more, worse]}
    explicit = {"prompt": "Hi", "chosen": [ask, answer], "rejected": [ask, worse]}
    dialogue = {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello there", "rejected": "\n\nHuman: Hi\n\nAssistant: Hey"}
    path = jsonl(tmp_path / "r.jsonl", [implicit, explicit, dialogue])
    rows, _ = read_source(Source(path=str(path)), "rankings", "k")
    assert [row["prompt"] for row in rows] == [multi, "Hi", "Human: Hi\n\nAssistant:"]
    assert [row["responses"] for row in rows] == [["See you", "Go away"], ["Hello", "Go away"], ["Hello there", "Hey"]]
    assert all(row["ranks"] == [1, 2] for row in rows)


def test_annotators_as_choices_or_as_ranks(tmp_path):
    pair = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}
    path = jsonl(
        tmp_path / "r.jsonl", [pair | {"annotators": [0, 1, 2]}, pair | {"annotators": [[2, 1], [1, 1]], "labeler": 7}]
    )
    rows, _ = read_source(Source(path=str(path)), "rankings", "k")
    assert rows[0]["annotators"] == [[1, 1], [1, 2], [2, 1]]
    assert (rows[1]["annotators"], rows[1]["labeler"]) == ([[2, 1], [1, 1]], "7")


def test_limit_keeps_the_first_rows_and_reads_no_further(tmp_path):
    path = write(tmp_path / "d.jsonl", "".join(json.dumps(row) + "\n" for row in ROWS[:2]) + "this is no JSON\n")
    assert texts(demonstrations(path, limit=2)) == texts(ROWS[:2])


# ---- what is wrong, and where


def test_a_missing_file_names_its_neighbour(tmp_path):
    jsonl(tmp_path / "demos.jsonl", ROWS)
    message = error_of("demonstrations", tmp_path / "demo.jsonl")
    assert message == (
        f"data.demonstrations[0].path: there is no file or folder {tmp_path}/demo.jsonl; "
        f"did you mean {tmp_path}/demos.jsonl?"
    )
    assert "nor a folder" in error_of("demonstrations", tmp_path / "no" / "demo.jsonl")


def test_empty_files(tmp_path):
    assert f"{tmp_path}/a.jsonl is empty" in error_of("text", write(tmp_path / "a.jsonl", ""))
    assert f"{tmp_path}/a.jsonl.gz is empty" in error_of("text", write(tmp_path / "a.jsonl.gz", ""))
    assert f"{tmp_path}/a.csv is empty" in error_of("text", write(tmp_path / "a.csv", "text\n"))
    (tmp_path / "folder").mkdir()
    assert "holds no .jsonl, .json, .csv, .parquet or .txt file" in error_of("text", tmp_path / "folder")


def test_an_unknown_ending(tmp_path):
    assert "is no .jsonl, .json, .csv, .parquet or .txt file" in error_of("text", write(tmp_path / "a.xlsx", "x"))


def test_a_line_that_is_no_json(tmp_path):
    path = write(tmp_path / "d.jsonl.gz", json.dumps(ROWS[0]) + "\n\n{'prompt': 1}\n")
    assert f"{path} line 3 is no JSON" in error_of("demonstrations", path)
    assert "line 1 is an array, but must be an object" in error_of(
        "demonstrations", write(tmp_path / "e.jsonl", "[1]\n")
    )
    assert "is no JSON" in error_of("demonstrations", jsonl(tmp_path / "f.json", ROWS))
    assert "is an object, but must be an array" in error_of("demonstrations", jsonl(tmp_path / "g.json", ROWS[:1]))


def test_broken_files(tmp_path):
    whole = gzip.compress("\n".join(json.dumps(row) for row in ROWS * 100).encode())
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "is no complete gzip file" in error_of("demonstrations", tmp_path / "cut.jsonl.gz")
    (tmp_path / "not.jsonl.gz").write_bytes(b"plain text")
    assert "is no complete gzip file" in error_of("demonstrations", tmp_path / "not.jsonl.gz")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "caf\u00e9"}'.encode("latin-1"))
    assert "is not UTF-8 text (byte 15" in error_of("demonstrations", tmp_path / "latin.jsonl")
    (tmp_path / "d.parquet").write_bytes(b"PAR1 no")
    assert "is no Parquet file" in error_of("demonstrations", tmp_path / "d.parquet")
    assert "line 3 does not have as many cells" in error_of(
        "demonstrations", write(tmp_path / "d.csv", "prompt,response\na,b\na,b,c\n")
    )


def test_a_missing_column_names_those_there_and_the_line_to_write(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "output": "b"}])
    assert error_of("demonstrations", path) == (
        f"data.demonstrations[0]: {path} line 1 has no column 'response'; its columns are 'prompt', 'output'. "
        "Say which it is with this line beside `path:`:  columns: {response: output}"
    )
    path = jsonl(tmp_path / "e.jsonl", [{"Questoin": "a", "responsse": "b"}])
    assert "columns: {prompt: NAME, response: responsse}" in error_of("demonstrations", path)
    path = jsonl(tmp_path / "f.jsonl", [{"prompt": "a"}])
    assert "columns: {response: NAME}" in error_of("demonstrations", path)
    path = jsonl(tmp_path / "g.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2]}])
    assert "no column 'ranks'" in error_of("rankings", path)
    assert "columns: {ranks: ranking}" in error_of("rankings", path)


def test_rows_of_json_may_lack_what_is_null_in_them(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b", "who": {"id": 7}, "lang": "en"}, {"prompt": "c", "lang": "fr"}]
    path = jsonl(tmp_path / "p.jsonl", rows)
    source = Source(path=str(path), columns={"user": "who.id"}, where={"lang": {"not": "fr"}})
    found, reading = read_source(source, "prompts")
    assert [(row["prompt"], row["user"]) for row in found] == [("a", ""), ("b", "7")]
    assert reading.dropped == {"left out by `where`": 1}
    message = error_of("prompts", path, columns={"user": "who.name"})  # there, and not what was meant
    assert f"{path} line 2: who.name: there is no 'name' in {{'id': 7}}. Correct the row" in message
    assert "has no column 'whom' (did you mean 'who'?)" in error_of("prompts", path, where={"whom": 1})


def test_a_row_that_lacks_a_column_is_a_wrong_row(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [ROWS[0], {"prompt": "a", "output": "b"}, {}, ROWS[1]])
    message = error_of("demonstrations", path)
    assert f"{path} line 2: there is no 'response'; its columns are 'prompt', 'output'. Correct the row" in message
    found, reading = read_source(Source(path=str(path), skip_invalid=True), "demonstrations")
    assert (texts(found), reading.dropped) == (texts(ROWS[:2]), {"invalid": 2})


def test_csv_that_is_damaged(tmp_path):
    path = write(tmp_path / "d.csv", 'prompt,response\na,b\n"c,d\ne,f\n')
    assert f"{path} line 3 is no CSV (unexpected end of data)" in error_of("demonstrations", path)
    path = write(tmp_path / "e.csv", "prompt,response,response,,\na,b,c,,\n")
    assert f"{path} has two columns 'response'; rename one" in error_of("demonstrations", path)
    path = write(tmp_path / "f.csv", "prompt\ra\r")
    assert f"{path} line 1 is no CSV (new-line character seen in unquoted field" in error_of("prompts", path)


def test_columns_that_rename_nothing(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "output": "b"}])
    message = error_of("demonstrations", path, columns={"response": "outputs"})
    assert "has no column 'outputs' (did you mean 'output'?); its columns are 'prompt', 'output'" in message
    message = error_of("demonstrations", path, columns={"reponse": "output"})
    assert "reponse is no column of demonstrations (did you mean 'response'?)" in message


@pytest.mark.parametrize(
    ("kind", "columns", "problem"),
    [
        (
            "rankings",
            {"chosen": ("a", "b"), "rejected": "b"},
            "chosen must be the name of one column where there is no",
        ),
        ("rankings", {"chosen": "a", "rejected": ("a", "b")}, "rejected must be the name of one column where there is"),
        ("rankings", {"prompt": "a", "labeler": ("a", "b")}, "labeler must be the name of one column, not a list"),
        ("demonstrations", {"messages": ("a", "b")}, "messages must be the name of one column, not a list"),
        ("labels", {"prompt": "a", "model": "a", "score": ("a", "b")}, "score must be the name of one column, not a"),
    ],
)
def test_columns_that_cannot_be_made_of_several(tmp_path, kind, columns, problem):
    path = jsonl(tmp_path / "rows.jsonl", [{"a": "x", "b": "y"}])
    message = error_of(kind, path, columns=columns)
    assert f"data.{kind}[0].columns: {problem}" in message


def test_chosen_may_be_joined_beside_a_prompt(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "p", "a": "x", "b": "y", "c": "z"}])
    source = Source(path=str(path), columns={"chosen": ("a", "b"), "rejected": "c"})
    assert read_source(source, "rankings", "k")[0][0]["responses"] == ["x\n\ny", "z"]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": 3, "response": "b"}, "prompt is the number 3, but must be a string"),
        ({"prompt": "a", "response": None}, "response is null, but must be a string"),
        ({"prompt": "a", "response": " \n"}, "response is empty"),
        ({"prompt": "", "response": "b"}, "prompt is empty"),
        ({"prompt": ["a"], "response": "b"}, "prompt is a list, but not of messages"),
        ({"prompt": [], "response": "b"}, "prompt is an empty list"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages must end with an assistant's message"),
    ],
)
def test_wrong_demonstrations(tmp_path, row, problem):
    path = jsonl(tmp_path / "d.jsonl", [ROWS[0], row])
    message = error_of("demonstrations", path)
    assert f"{path} line 2: {problem}" in message
    assert "skip_invalid: true" in message
    rows, reading = read_source(Source(path=str(path), skip_invalid=True), "demonstrations", "k")
    assert (texts(rows), reading.dropped) == (texts(ROWS[:1]), {"invalid": 1})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"ranks": [1, 2, 3]}, "ranks has 3 entries, but there are 2 responses"),
        ({"ranks": [1, 1.5]}, "ranks holds 1.5, but a rank is a whole number"),
        ({"ranks": [1, float("nan")]}, "ranks holds nan"),
        ({"ranks": [1, float("inf")]}, "ranks holds inf"),
        ({"ranks": [1, None]}, "ranks holds null"),
        ({"ranks": [1, True]}, "ranks holds True"),
        ({"ranks": [1, "second"]}, "ranks holds 'second'"),
        ({"ranks": 1}, "ranks is the number 1, but must be a list"),
        ({"responses": "x, y"}, "responses is a string, but must be a list"),
        ({"responses": ["x"], "ranks": [1]}, "a ranking needs two responses or more, but there is 1"),
        ({"responses": ["x", ""]}, "response 2 is empty"),
        ({"responses": ["x", "x"]}, "all responses are the same"),
        ({"responses": ["x", 7]}, "response 2 is the number 7, but must be a string"),
        ({"annotators": [[1, 2, 3]]}, "annotators entry 1 has 3 entries"),
        ({"annotators": [{"rank": 1}]}, "annotators must be a list of ranks for each annotator"),
        ({"annotators": [[1, 2], 1]}, "annotators entry 2 is the number 1, but must be a list of ranks"),
        ({"annotators": [3]}, "annotators must be a list of ranks for each annotator"),
    ],
)
def test_wrong_rankings(tmp_path, change, problem):
    right = {"prompt": "a", "responses": ["x", "y"], "ranks": [2, 1]}
    path = jsonl(tmp_path / "r.jsonl", [right, right | change])
    message = error_of("rankings", path)
    assert f"data.rankings[0]: {path} line 2: {problem}" in message


def test_chosen_and_rejected_without_a_shared_prompt(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", [{"chosen": "yes", "rejected": "no"}])
    assert "do not begin with the same conversation" in error_of("rankings", path)


def test_nothing_left_says_what_was_dropped(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "response": ""}] * 2)
    assert "nothing is left" in error_of("demonstrations", path, skip_invalid=True)
    assert "dropped: 2 invalid" in error_of("demonstrations", path, skip_invalid=True)


# ---- the Hub


def test_what_is_a_path_and_what_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    local = ("./a", "../a", "/a", "~/a", "a.jsonl", "data/a.CSV.gz", "owner/name.parquet", "folder")
    assert all(map(sources.is_local, local))
    assert not any(map(sources.is_local, ("owner/name", "name", "owner/name-v1.5")))


def test_no_network_is_one_sentence_that_says_how_to_go_on(monkeypatch):
    import datasets

    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = error_of("demonstrations", "owner/name")
    assert message.startswith(
        "data.demonstrations[0].path: the Hub data set 'owner/name' cannot be loaded, there is no network"
    )
    assert "set path to the local file or folder" in message


def test_a_real_hub_id_offline():
    """The library itself, in a process of its own that may not use the network."""
    program = (
        "from instructrl.config import Source\n"
        "from instructrl.errors import UserError\n"
        "from instructrl.stages import sources\n"
        "try:\n"
        "    list(sources.rows(Source(path='some-owner/some-data', revision='0' * 40), 'data.text[0]'))\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "HF_HOME": "/nonexistent",
        "PYTHONPATH": ":".join(sys.path),
    }
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("data.text[0].path: ")
    assert "some-owner/some-data" in done.stdout
    assert "set path to the local file or folder" in done.stdout
    assert done.stdout.count("\n") == 1


# ---- while planning


def recipe(**data):
    return Recipe(data=Data(**data), ppo_init={"pretraining_share": 0}, ppo_ptx={"ptx_coef": 0})


def test_check_finds_what_is_wrong_without_reading_everything(tmp_path):
    good = jsonl(tmp_path / "d.jsonl", ROWS)
    ranked = jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}])
    files = {"demonstrations": ({"path": str(good)},), "rankings": ({"path": str(ranked)},)}
    sources.check(recipe(**files))
    with pytest.raises(UserError, match="no column 'responses'"):
        sources.check(recipe(**files | {"rankings": ({"path": str(good)},)}))
    with pytest.raises(UserError, match=r"data\.rankings is empty, and reward_model learns from it"):
        sources.check(recipe(demonstrations=files["demonstrations"]))
    with pytest.raises(UserError, match="judge_ranking_share is 0"):
        sources.check(recipe(**files, judge_ranking_share=0))
    with pytest.raises(UserError, match=r"data\.evaluation_sets\[0\]: .*e\.jsonl line 1 is no JSON"):
        sources.check(recipe(**files, evaluation_sets=({"path": str(write(tmp_path / "e.jsonl", "no"))},)))


def test_check_imports_neither_torch_nor_datasets(tmp_path):
    path = jsonl(tmp_path / "d.jsonl", ROWS)
    ranked = jsonl(tmp_path / "r.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y"}])
    program = (
        "import sys\n"
        "from instructrl.config import Recipe\n"
        "from instructrl.stages import sources\n"
        f"data = {{'demonstrations': [{{'path': {str(path)!r}}}], 'rankings': [{{'path': {str(ranked)!r}}}]}}\n"
        "sources.check(Recipe(data=data, ppo_init={'pretraining_share': 0}, ppo_ptx={'ptx_coef': 0}))\n"
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'numpy') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path)},
    )
    assert done.stdout == "[]\n"


# ---- few-shot prompts


SHOTS = {
    "instruction": "Name the capital.",
    "examples": [
        {"query": "France", "response": "Paris"},
        {"query": "Peru", "response": "Lima"},
        {"query": "Kenya", "response": "Nairobi"},
    ],
    "user": 12,
    "category": "Extract",
}


def test_a_few_shot_prompt_gives_an_example_for_each_pair(tmp_path):
    """Ouyang et al. 2022, App. A.1: with K pairs, K examples, each with the other K - 1 as context."""
    rows = demonstrations(jsonl(tmp_path / "d.jsonl", [SHOTS]))
    assert texts(rows) == [
        ("Name the capital.\n\nPeru\nLima\n\nKenya\nNairobi\n\nFrance", "Paris"),
        ("Name the capital.\n\nFrance\nParis\n\nKenya\nNairobi\n\nPeru", "Lima"),
        ("Name the capital.\n\nFrance\nParis\n\nPeru\nLima\n\nKenya", "Nairobi"),
    ]
    assert {(row["kind"], row["user"], row["category"]) for row in rows} == {("few_shot", "12", "Extract")}
    renamed = {"task": "Name the capital.", "shots": [{"q": x["query"], "a": x["response"]} for x in SHOTS["examples"]]}
    columns = {"instruction": "task", "examples": {"each": "shots", "as": {"query": "q", "response": "a"}}}
    found = demonstrations(jsonl(tmp_path / "e.jsonl", [renamed]), columns=columns)
    assert texts(found) == texts(rows)


@pytest.mark.parametrize(
    ("examples", "problem"),
    [
        ([SHOTS["examples"][0]], "a few-shot prompt needs two examples or more, but there is 1"),
        ([SHOTS["examples"][0], {"query": "x"}], "example 2 is no object {query, response}"),
        ([SHOTS["examples"][0], {"query": "x", "response": ""}], "the response of example 2 is empty"),
        ("none", "examples is a string, but must be a list"),
    ],
)
def test_wrong_few_shot_prompts(tmp_path, examples, problem):
    path = jsonl(tmp_path / "d.jsonl", [SHOTS | {"examples": examples}])
    assert f"{path} line 1: {problem}" in error_of("demonstrations", path)


# ---- what is known of a prompt


@pytest.mark.parametrize("kind", ["demonstrations", "rankings", "prompts"])
def test_every_table_keeps_what_is_known_of_a_prompt(tmp_path, kind):
    notes = {"category": "Chat", "kind": "user_based", "user": 7.0, "language": ["en", "fr"], "source": None}
    row = {"prompt": "a", "response": "b", "chosen": "x", "rejected": "y"}
    path = jsonl(tmp_path / "d.jsonl", [row | notes, row | {"prompt": "b", "user": {"name": "x"}, "kind": True}])
    (one, two), _ = read_source(Source(path=str(path)), kind, "k")
    expected = {"category": "Chat", "kind": "user_based", "user": "7", "language": "en, fr", "source": "d"}
    assert expected.items() <= one.items()
    assert (two["user"], two["kind"], two["category"]) == ("", "true", "")


def test_ranks_may_begin_at_any_number(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y", "z"], "ranks": [0, 2, 2]}
    rows, _ = read_source(Source(path=str(jsonl(tmp_path / "r.jsonl", [row]))), "rankings", "k")
    assert rows[0]["ranks"] == [1, 3, 3]


# ---- weights


@pytest.mark.parametrize(
    ("counts", "weights", "expected"),
    [
        ([1000, 1000, 50], [2, 1, 1], [100, 50, 50]),
        ([10, 10], [1, 1], [10, 10]),
        ([100, 1000], [0.1, 0.9], [100, 900]),
        ([3, 1000], [0.1, 0.3], [3, 9]),
        ([0, 5], [1, 1], [0, 0]),
        ([7], [0.25], [7]),
        ([], [], []),
    ],
)
def test_the_largest_mix_that_honours_the_weights(counts, weights, expected):
    assert quotas(counts, weights) == expected


@given(st.lists(st.tuples(st.integers(0, 10**9), st.floats(1e-6, 1e6)), min_size=1, max_size=6))
def test_a_mix_repeats_no_row_and_is_off_by_less_than_one(pairs):
    counts, weights = zip(*pairs, strict=True)
    found = quotas(counts, weights)
    assert all(0 <= taken <= count for taken, count in zip(found, counts, strict=True))
    assert any(taken == count for taken, count in zip(found, counts, strict=True))
    scale = min(count / weight for count, weight in pairs)
    assert all(abs(taken - scale * weight) <= 1 + 1e-6 * taken for taken, weight in zip(found, weights, strict=True))


def test_wrong_weights():
    with pytest.raises(ValueError, match="weights must be above 0"):
        quotas([1, 2], [1, 0])
    with pytest.raises(ValueError, match=r"data\.prompts\[1\]\.weight is missing: give all of data\.prompts one"):
        Data(prompts=[{"path": "a.jsonl", "weight": 1}, {"path": "b.jsonl"}])
    with pytest.raises(ValueError, match="greater than 0"):
        Data(prompts=[{"path": "a.jsonl", "weight": 0}])


# ---- damaged sources


def raw(path, data):
    path.write_bytes(data)
    return path


def test_a_gzip_file_that_ends_too_early_gives_the_rows_before(tmp_path):
    listed = [json.dumps({"prompt": f"{n} {n**9}"}) for n in range(5000)]
    for name, text in (("p.json.gz", f"[{','.join(listed)}]"), ("p.jsonl.gz", "\n".join(listed))):
        whole = gzip.compress(text.encode())
        path = raw(tmp_path / name, whole[: len(whole) // 2])
        message = error_of("prompts", path)
        assert f"data.prompts[0]: {path} is no complete gzip file" in message
    reached = re.search(r"gzip file after line (\d+) \(", message)
    assert 2000 < int(reached[1]) < 3500
    read = sources.rows(Source(path=str(tmp_path / "p.jsonl.gz")), "k")
    assert next(read).values == {"prompt": "0 0"}
    path = raw(tmp_path / "crc.jsonl.gz", whole[:-8] + b"\0\0\0\0" + whole[-4:])
    assert "is no complete gzip file after line 4999 (CRC check failed" in error_of("prompts", path)


def test_parquet_that_is_damaged_in_the_middle(tmp_path):
    rows = [{"prompt": f"prompt {n**7}"} for n in range(2000)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", compression="gzip")
    data = (tmp_path / "p.parquet").read_bytes()
    path = raw(tmp_path / "p.parquet", data[:200] + b"\xff" * 400 + data[600:])
    assert str(path) in error_of("prompts", path)
    path = raw(tmp_path / "q.parquet", data[:-100])
    assert f"{path} is no Parquet file" in error_of("prompts", path)
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"fine", b"caf\xe9"]).buffers())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), tmp_path / "r.parquet")
    assert "r.parquet is not UTF-8 text in rows 1 to 2" in error_of("prompts", tmp_path / "r.parquet")


def test_wrong_encodings(tmp_path):
    good = '{"prompt": "a"}\n' * 100_000
    path = raw(tmp_path / "latin.jsonl", good.encode() + '{"prompt": "caf\u00e9"}\n'.encode("latin-1"))
    message = error_of("prompts", path)
    assert f"{path} line 100001 is not UTF-8 text (byte 15 of the line: invalid continuation byte)" in message
    for name in ("u.jsonl", "u.json", "u.csv", "u.txt"):
        path = raw(tmp_path / name, '{"prompt": "a"}'.encode("utf-16"))
        assert f"{path} is UTF-16 text; save it as UTF-8" in error_of("prompts", path)
    path = raw(tmp_path / "latin.json", '[{"prompt": "caf\u00e9"}]'.encode("latin-1"))
    assert f"{path} is not UTF-8 text (near byte 16: invalid continuation byte)" in error_of("prompts", path)
    path = raw(tmp_path / "latin.csv", "prompt\na\ncaf\u00e9\n".encode("latin-1"))
    assert f"{path} line 3 is not UTF-8 text" in error_of("prompts", path)


def test_a_byte_order_mark_and_windows_line_ends(tmp_path):
    rows = [{"prompt": "a\r\nb"}, {"prompt": "c"}]
    text = "\r\n".join(json.dumps(row) for row in rows)
    for name, written in (
        ("p.jsonl", text),
        ("p.json", f"[{text.replace('}', '},', 1)}]"),
        ("p.csv", 'prompt\r\n"a\r\nb"\r\nc\r\n'),
    ):
        path = raw(tmp_path / name, b"\xef\xbb\xbf" + written.encode())
        found, _ = read_source(Source(path=str(path)), "prompts", "k")
        assert [row["prompt"] for row in found] == ["a\r\nb", "c"], name


def test_mixed_types_in_a_column(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": 7}, {"prompt": ["x"]}, {"prompt": {"text": "x"}}])
    assert f"{path} line 2: prompt is the number 7, but must be a string" in error_of("prompts", path)
    rows, reading = read_source(Source(path=str(path), skip_invalid=True), "prompts", "k")
    assert ([row["prompt"] for row in rows], reading.dropped) == (["a"], {"invalid": 3})


def test_a_line_of_fifty_megabytes_is_read(tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [{"prompt": "ab " * (50 * 2**20 // 3)}, {"prompt": "short"}])
    rows, _ = read_source(Source(path=str(path)), "prompts", "k")
    assert [len(row["prompt"]) for row in rows] == [50 * 2**20 // 3 * 3, 5]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**20)
    path = raw(tmp_path / "p.jsonl", b'{"prompt": "a"}\n{"prompt": "' + b"a" * 2**21)
    assert f"{path} line 2 is longer than 1 MB" in error_of("prompts", path)
    path = raw(tmp_path / "p.json", b'[{"prompt": "a"}, {"prompt": "' + b"a" * 2**22)
    message = error_of("prompts", path)
    assert f"{path} row 2 is no JSON (Unterminated string starting at), or is longer than 1 MB" in message


def test_equal_ids_mean_nothing(tmp_path):
    """What makes two rows one is their text, in the pool."""
    rows = [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": 2, "prompt": "a"}]
    found, reading = read_source(Source(path=str(jsonl(tmp_path / "p.jsonl", rows))), "prompts", "k")
    assert ([row["prompt"] for row in found], reading.dropped) == (["a", "b", "a"], {})


@pytest.mark.parametrize(
    "prompt",
    [
        "\u0634\u0643\u0631\u0627 \u05e9\u05dc\u05d5\u05dd \u202etxet\u202c",  # right to left, and an override
        "a\u200bb\u200d\ufeffc",  # zero width, inside a text
        "  spaces \t stay\n ",
        "nul \x00 inside",
        "ends <|endoftext|> here </s> <|im_end|>",
        "\U0001f469\u200d\U0001f52c e\u0301 \u00e9",  # joined, and not normalized
    ],
)
def test_text_is_kept_as_it_is(tmp_path, prompt):
    for name in ("p.jsonl", "p.json", "p.csv", "p.parquet"):
        path = tmp_path / name
        if name == "p.parquet":
            pyarrow.parquet.write_table(pyarrow.table({"prompt": [prompt]}), path)
        elif name == "p.csv":
            with path.open("w", newline="", encoding="utf-8") as stream:
                csv.writer(stream).writerows([["prompt"], [prompt]])
        else:
            path.write_text(json.dumps([{"prompt": prompt}] if name == "p.json" else {"prompt": prompt}))
        found, _ = read_source(Source(path=str(path)), "prompts", "k")
        assert [row["prompt"] for row in found] == [prompt], name


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"prompt": "\u200b\u200d \ufeff\u2060", "response": "b"}, "prompt is empty"),
        ({"prompt": "\x00", "response": "b"}, "prompt is empty"),
        ({"prompt": "a", "response": "\u200e"}, "response is empty"),
        ({"prompt": "a \ud800", "response": "b"}, "prompt holds \\ud800 at character 3, half of a surrogate pair"),
        ({"prompt": "a", "response": "b", "user": "\udfff"}, "user holds \\udfff at character 1, half of a"),
        ({"prompt": float("nan"), "response": "b"}, "prompt is the number nan, but must be a string"),
        (
            {"messages": [{"role": "user", "content": " "}, {"role": "assistant", "content": "b"}]},
            "message 1 of messages is empty",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
            "messages is a list, but not of messages",
        ),
    ],
)
def test_texts_that_are_none(tmp_path, row, problem):
    path = jsonl(tmp_path / "d.jsonl", [ROWS[0], row])
    assert f"{path} line 2: {problem}" in error_of("demonstrations", path)
    assert texts(demonstrations(path, skip_invalid=True)) == texts(ROWS[:1])


def test_system_messages_are_kept_and_empty_ones_left_out(tmp_path):
    ask, answer = {"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}
    rows = [{"messages": [{"role": "system", "content": said}, ask, answer]} for said in ("Be curt.", " ")]
    found = demonstrations(jsonl(tmp_path / "d.jsonl", rows))
    assert texts(found) == [("System: Be curt.\n\nUser: Hi", "Yo"), ("Hi", "Yo")]


def test_ranks_as_text_and_not_a_number(tmp_path):
    row = {"prompt": "a", "responses": ["x", "y"]}
    path = raw(
        tmp_path / "r.jsonl",
        (
            json.dumps(row | {"ranks": ["2", "1"]}) + '\n{"prompt": "a", "responses": ["x", "y"], "ranks": [1, NaN]}\n'
        ).encode(),
    )
    assert f"{path} line 2: ranks holds nan, but a rank is a whole number" in error_of("rankings", path)
    rows, _ = read_source(Source(path=str(path), skip_invalid=True), "rankings", "k")
    assert [row["ranks"] for row in rows] == [[2, 1]]
    odd = ("Infinity", "-Infinity", "true", '"first"', "null", "[1]", "{}", '"nan"', "1e308", "-9223372036854775809")
    for written in odd:
        line = f'{{"prompt": "a", "responses": ["x", "y"], "ranks": [1, {written}]}}\n'
        assert "line 1: ranks holds" in error_of("rankings", raw(tmp_path / "q.jsonl", line.encode()))


def test_json_that_is_nested_too_deeply(tmp_path):
    deep = "[" * 200_000 + "]" * 200_000
    path = raw(tmp_path / "p.jsonl", f'{{"prompt": "a"}}\n{{"prompt": {deep}}}\n'.encode())
    assert f"{path} line 2 is nested too deeply" in error_of("prompts", path)
    path = raw(tmp_path / "p.json", f'[{{"prompt": {deep}}}]'.encode())
    assert f"{path} row 1 is nested too deeply" in error_of("prompts", path)
    digits = "1" * 5000
    path = raw(tmp_path / "q.jsonl", f'{{"prompt": "a"}}\n{{"prompt": {digits}}}\n'.encode())
    assert f"{path} line 2 is no JSON we read" in error_of("prompts", path)
    path = raw(tmp_path / "q.json", f'[{{"prompt": "a"}}, {{"prompt": {digits}}}]'.encode())
    assert f"{path} row 2 is no JSON we read" in error_of("prompts", path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"prompt": "a"} {"prompt": "b"}]', "is no JSON: '{' follows after row 1, where ',' or ']' must be"),
        ('[{"prompt": "a"}', "is no JSON: the file ends after row 1, where ',' or ']' must be"),
        ('[{"prompt": "a"},]', "row 2 is no JSON (Expecting value)"),
        ('[{"prompt": "a"}] x', "is no JSON: 'x' follows the array"),
        ('[{"prompt": "a"}, 3]', "row 2 is a number, but must be an object"),
        ('[{"prompt": "a"}, {"prompt": "b', "row 2 is no JSON (Unterminated string starting at)"),
        (" [ ] ", "is empty"),
        ('{"prompt": "a"}\n{"prompt": "b"}', "is no JSON (extra data); if it has one object a line, name it .jsonl"),
        ("prompt: a", "is no JSON (Expecting value)"),
    ],
)
def test_arrays_that_are_none(tmp_path, text, problem):
    path = raw(tmp_path / "p.json", text.encode())
    assert f"{path} {problem}" in error_of("prompts", path)


# ---- memory


@pytest.mark.parametrize(
    "name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.json.gz", "p.csv", "p.parquet", "p.parquet.gz", "p.txt"]
)
def test_no_format_is_held_in_memory(tmp_path, name):
    """40 MB of text is read in less than a tenth of that (Parquet: a row group and its pages are decoded at a time)."""
    prompts = [f"{n} " + "word " * 2000 for n in range(4000)]
    path = tmp_path / name
    if ".parquet" in name:
        plain = tmp_path / "plain.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"prompt": prompts}), plain, row_group_size=200)
        path.write_bytes(gzip.compress(plain.read_bytes(), 1) if name.endswith(".gz") else plain.read_bytes())
    elif ".csv" in name:
        write(path, "prompt\n" + "\n".join(prompts))
    elif ".txt" in name:
        write(path, "\n\n".join(prompts))
    else:
        listed = [json.dumps({"prompt": prompt}) for prompt in prompts]
        text = "[" + ",\n".join(listed) + "]" if ".json." in name or name.endswith(".json") else "\n".join(listed)
        path.write_bytes(gzip.compress(text.encode(), 1) if name.endswith(".gz") else text.encode())
    del prompts
    read = sources.rows(Source(path=str(path)), "k")
    next(read)  # what is imported for the format
    gc.collect()
    arrow = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    try:
        count = 1 + sum(1 for _ in read)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 4000
    limit = 8 if name == "p.json" or name == "p.json.gz" else 4
    assert peak < limit * 2**20, f"{peak / 2**20:.1f} MB"
    assert pyarrow.total_allocated_bytes() - arrow < 4 * 2**20
