"""Tables survive the way to the disk and back, ragged lists and empty columns included."""

import pytest

from instructrl.stages.tables import DEMONSTRATIONS, RANKINGS, TASKS, read_table, write_table


def test_rankings_of_mixed_length_come_back_as_written(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y", "z"], "ranks": [1, 2, 2], "annotators": [[1, 2, 3], [2, 1, 1]]},
        {"prompt": "b", "responses": ["x", "y"], "ranks": [2, 1], "gold": [2, 1], "labeler": "7", "source": "s"},
    ]
    assert write_table(tmp_path / "rankings.parquet", rows, RANKINGS) == 2
    notes = {"category": "", "kind": "", "user": "", "language": "", "source": ""}
    empty = {"annotators": [], "held_out": [], "gold": [], "labeler": ""} | notes
    assert read_table(tmp_path / "rankings.parquet") == [empty | row for row in rows]


def test_an_empty_table_keeps_its_columns(tmp_path):
    assert write_table(tmp_path / "tasks.parquet", [], TASKS) == 0
    assert read_table(tmp_path / "tasks.parquet") == []


def test_text_is_kept_character_by_character(tmp_path):
    row = {"prompt": "  tabs\tand\r\nlines \u2603 \x00", "response": "\n", "source": "", "spec": "{}"}
    write_table(tmp_path / "demonstrations.parquet", [row], DEMONSTRATIONS)
    (read,) = read_table(tmp_path / "demonstrations.parquet")
    assert row.items() <= read.items()


def test_a_column_outside_the_schema_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no column \['answer'\]"):
        write_table(tmp_path / "d.parquet", [{"prompt": "a", "answer": "b"}], DEMONSTRATIONS)
