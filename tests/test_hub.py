"""Hub data sets with the network off, from a folder in the layout of the Hub's cache.

In processes of their own: the libraries read `HF_HOME` and `HF_HUB_OFFLINE` once, when they are imported.
"""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

OLD, NEW = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"

PROGRAM = """
import json, sys
from instructrl.config import Data
from instructrl.errors import UserError
from instructrl.stages import records, sources
kind, key = sys.argv[1], f"data.{sys.argv[1]}[0]"
for given in json.loads(sys.argv[2]):
    (source,) = getattr(Data(**{kind: [given]}), kind)
    found = []
    try:
        for row in sources.rows(source, key):
            for record in records.record(row, kind, source, key):
                found.append([row.where, record.get("response") or record.get("ranks")])
    except UserError as error:
        found.append(["error", str(error)])
    print(json.dumps(found))
"""


@pytest.fixture
def hub(tmp_path):
    """Puts files of a data set's commit into the cache."""

    def put(owner_name, commit, files, main=False):
        repository = tmp_path / "hub" / f"datasets--{owner_name.replace('/', '--')}"
        for name, content in files.items():
            path = repository / "snapshots" / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        if main:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / "main").write_text(commit)

    return put


@pytest.fixture
def read(tmp_path):
    """Of each source a list: [where, response] of each row, and last ["error", the sentence] if there is one."""

    def run(*given, kind="demonstrations"):
        environment = {
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(sys.path),
        }
        command = [sys.executable, "-c", PROGRAM, kind, json.dumps(given)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    return run


def error_of(found):
    where, message = found[-1]
    assert where == "error"
    assert "\n" not in message
    return message


def rows(*responses):
    return "".join(json.dumps({"prompt": "a", "response": response}) + "\n" for response in responses)


def test_a_pinned_commit_that_is_in_the_cache_is_read(hub, read):
    hub("owner/name", OLD, {"data/train-00000-of-00001.jsonl": rows("old"), "README.md": "---\nlicense: mit\n---\n"})
    new = {"data/train-00000-of-00001.jsonl": rows("new", "newer"), "data/test-00000-of-00001.jsonl": rows("held out")}
    hub("owner/name", NEW, new, main=True)
    source = {"path": "owner/name"}
    assert read(source | {"revision": OLD}, source | {"revision": NEW}, source | {"split": "test"}) == [
        [["owner/name row 1", "old"]],
        [["owner/name row 1", "new"], ["owner/name row 2", "newer"]],
        [["owner/name row 1", "held out"]],
    ]


def test_a_commit_that_is_not_in_the_cache_is_one_sentence(hub, read):
    hub("owner/name", OLD, {"train.jsonl": rows("old")}, main=True)
    commit, other, no_id = read({"path": "owner/name", "revision": NEW}, {"path": "owner/other"}, {"path": "no hub id"})
    assert error_of(commit) == (
        f"data.demonstrations[0].path: the Hub data set 'owner/name' at commit {NEW} is not in the cache on this disk, "
        "and the network is switched off: download it where there is a network and set path to the local file or "
        "folder, or set runtime.offline=false"
    )
    assert "path: the Hub data set 'owner/other' is not in the cache on this disk" in error_of(other)
    assert "path: 'no hub id' is no file, no folder and no Hub id (" in error_of(no_id)


def test_configurations_and_splits_are_those_of_the_card(hub, read):
    card = "---\nconfigs:\n- config_name: a\n  data_files: a/*.jsonl\n- config_name: b\n  data_files: b/*.jsonl\n---\n"
    hub("owner/name", OLD, {"README.md": card, "a/x.jsonl": rows("of a"), "b/x.jsonl": rows("of b")}, main=True)
    names = ({"name": "b"}, {"name": "c"}, {"name": "a", "split": "dev"})
    found, no_configuration, no_split = read(*({"path": "owner/name"} | given for given in names))
    assert found == [["owner/name row 1", "of b"]]
    for failed, problem in ((no_configuration, "'c' not found"), (no_split, "dev")):
        assert error_of(failed).startswith("data.demonstrations[0]: the Hub data set 'owner/name' cannot be ")
        assert problem in error_of(failed)


def test_a_set_of_which_a_part_is_missing_is_refused(hub, read):
    hub("owner/name", OLD, {f"data/train-0000{part}-of-00003.jsonl": rows(str(part)) for part in (0, 2)}, main=True)
    (found,) = read({"path": "owner/name"})
    assert "[0].path: of data/train-*-of-00003.jsonl only 2 of 3 files are in " in error_of(found)


def test_nested_parquet_by_its_adapter(hub, read, tmp_path):
    answers = [{"answer": f"answer {rank}", "model": "m", "rank": float(rank)} for rank in (2, 1, 3, 4, 5, 6, 7)]
    listed = [{"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": answers, "source": ["flan"], "turns": 1}] * 3
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(listed), tmp_path / "rows.parquet")
    files = {"data/train-00000-of-00001.parquet": (tmp_path / "rows.parquet").read_bytes()}
    hub("berkeley-nest/Nectar", OLD, files, main=True)
    (found,) = read({"adapter": "nectar"}, kind="rankings")
    assert found == [[f"berkeley-nest/Nectar row {number}", [2, 1, 3, 4, 5, 6, 7]] for number in (1, 2, 3)]


def test_single_files_are_read_as_they_are_and_a_script_never_runs(hub, read, tmp_path):
    script = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    sft = json.dumps([{"instruction": "Add.", "input": "1 1", "output": "2"}])
    hub("tatsu-lab/alpaca_farm", OLD, {"alpaca_farm.py": script, "alpaca_instructions/sft.json": sft}, main=True)
    adapter = {"adapter": "alpaca_farm"}
    files = (["alpaca_instructions/val.json"], ["alpaca_farm.py"])
    columns = {"prompt": "instruction", "response": "output"}
    found, not_there, no_data, whole = read(
        adapter,
        *(adapter | {"files": listed} for listed in files),
        {"path": "tatsu-lab/alpaca_farm", "columns": columns},
    )
    ((where, response),) = found
    assert where.endswith(f"snapshots/{OLD}/alpaca_instructions/sft.json row 1")
    assert response == "2"
    assert "[0].path: the file alpaca_instructions/val.json of the Hub data set 'tatsu-lab/a" in error_of(not_there)
    assert "[0].files: 'alpaca_farm.py' is no .jsonl, .json, " in error_of(no_data)
    if whole[0][0] == "error":  # `datasets` refuses a set that has a script, or, since 5.2, reads what else it has
        assert error_of(whole).startswith("data.demonstrations[0]")
    else:
        assert [response for _, response in whole] == ["2"]
    assert not (tmp_path / "ran").exists()


def test_a_damaged_file_of_a_set_is_one_sentence(hub, read):
    hub("owner/name", OLD, {"train.jsonl": rows("a") + "no JSON\n"}, main=True)
    hub("owner/cut", OLD, {"train.jsonl.gz": b"\x1f\x8b\x08\x00\x00"}, main=True)
    for found, name in zip(read({"path": "owner/name"}, {"path": "owner/cut"}), ("name", "cut"), strict=True):
        assert error_of(found).startswith(f"data.demonstrations[0]: the Hub data set 'owner/{name}' cannot be ")
