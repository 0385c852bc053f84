"""Every format reads the same, and every kind of broken input is one sentence that says where."""

import csv
import gzip
import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from instructrl.config import Data, Recipe, Source
from instructrl.errors import UserError
from instructrl.stages import sources
from instructrl.stages.data import read_source

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
    assert "columns: {response: NAME}" in error_of(
        "demonstrations", jsonl(tmp_path / "f.jsonl", [ROWS[0], {"prompt": "a"}])
    )
    path = jsonl(tmp_path / "g.jsonl", [{"prompt": "a", "responses": ["b", "c"], "ranking": [1, 2]}])
    assert "no column 'ranks'" in error_of("rankings", path)
    assert "columns: {ranks: ranking}" in error_of("rankings", path)


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
        ({"ranks": [1, None]}, "ranks holds None"),
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
