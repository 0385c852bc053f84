"""The data card: every number in it is that of a count by brute force, and no text of the user's is markup."""

import random
import re
import statistics
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from instructrl.stages import card, card_tables, flow, paper_data, plots, tally
from instructrl.stages.paper_data import Summary
from instructrl.stages.tables import DEMONSTRATIONS, PROMPTS, RANKINGS, TEXT, write_table

SCHEMAS = {"demonstrations": DEMONSTRATIONS, "rankings": RANKINGS, "prompts": PROMPTS, "text": TEXT}
HOSTILE = "| a | `b` <script>alert(1)</script>\n# Title\n[x](javascript:y) ![i](http://e) $x$ \u202e\x1b[31m**b**"


def write(folder: Path, tables: dict[str, list[dict]]) -> dict:
    """The tables, and a card of rows that were all kept."""
    rows = {}
    for name, found in tables.items():
        rows[name] = write_table(folder / f"{name}.parquet", found, SCHEMAS[name.partition(".")[0]])
    kept = {kind: sum(count for name, count in rows.items() if name.startswith(kind)) for kind in SCHEMAS}
    return {"rows": rows, "read": kept, "kept": kept, "sources": {}, "steps": [], "leakage": []}


def made(folder: Path, tables: dict[str, list[dict]], count=None, **more) -> str:
    """The text of the card of these tables."""
    card.write_card(folder, write(folder, tables) | more, count)
    return (folder / "data_card.md").read_text()


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.partition(f"## {title}")[2], flags=re.MULTILINE)[0]


def grid(text: str) -> list[list[str]]:
    """The cells of a section's table, without emphasis, a list a row; the head is the first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[part.strip().strip("*") for part in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(row) for row in cells}) == 1, "a row has another number of cells"
    return [row for number, row in enumerate(cells) if number != 1]


def drawn(seed: int, rows: int, kind: str, people: int = 7) -> list[dict]:
    """Random rows of a table."""
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choices(["a", "bb", "ccc"], k=rng.randint(1, 60)))

    made = []
    for _ in range(rows):
        row = {
            "prompt": text(),
            "category": rng.choice(["open_qa", "Chat", "generation", "", "coding"]),
            "kind": rng.choice(["plain", "few-shot"]),
            "user": rng.choice(["", *(f"u{number}" for number in range(people))]),
            "language": rng.choice(["en", "en", "de", ""]),
            "source": rng.choice(["labelers", "customers"]),
        }
        if kind == "demonstrations":
            row["response"] = text()
        if kind == "rankings":
            row |= {"responses": ["x"] * (k := rng.randint(2, 9)), "ranks": list(range(1, k + 1))}
        made.append(row)
    return made


def number(value: float) -> str:
    return f"{value:,.1f}".removesuffix(".0")


def described(lengths: list[int]) -> list[str]:
    """The eight numbers of Tables 9 to 11, by other means than the card's."""
    spread = statistics.stdev(lengths) if len(lengths) > 1 else 0.0
    quartiles = [float(np.quantile(lengths, share)) for share in (0.25, 0.5, 0.75)]
    numbers = [len(lengths), statistics.fmean(lengths), spread, min(lengths), *quartiles, max(lengths)]
    return [number(value) for value in numbers]


def words(rows: list[dict], column: str = "prompt") -> list[int]:
    return [len(row[column].split()) for row in rows]


@pytest.fixture(params=[0, 1, 2])
def tables(request: pytest.FixtureRequest) -> dict[str, list[dict]]:
    sizes = {"demonstrations.train": 90, "demonstrations.valid": 1, "rankings.train": 70, "rankings.judge": 5}
    sizes |= {"prompts.train": 2100, "prompts.valid": 33, "prompts.eval": 40}
    found = {
        name: drawn(10 * request.param + n, rows, name.partition(".")[0])
        for n, (name, rows) in enumerate(sizes.items())
    }
    return found | {"text.train": [{"text": "abc", "kind": "books"}] * 4}


def test_every_number_is_a_brute_force_count(tmp_path: Path, tables: dict[str, list[dict]]):
    text = made(tmp_path, tables)
    prompts = {name: rows for name, rows in tables.items() if not name.startswith("text")}
    everything = [row for rows in prompts.values() for row in rows]
    of = {
        kind: [row for name, rows in prompts.items() if name.startswith(kind) for row in rows]
        for kind in card_tables.SETS
    }

    sizes = grid(section(text, "Sizes"))
    expected = []
    for name, rows in tables.items():
        expected.append((name.replace("_", r"\_"), "all", f"{len(rows):,}"))
        by = Counter(row["kind" if name.startswith("text") else "source"] for row in rows)
        expected += [("", source, f"{count:,}") for source, count in sorted(by.items(), key=lambda x: (-x[1], x[0]))]
    assert [tuple(row[:3]) for row in sizes[1:]] == expected

    shown = {row[0]: row[1:4] for row in grid(section(text, "Use cases"))[1:]}
    for category in ("open_qa", "Chat", "generation", "coding"):
        for place, rows in enumerate(of.values()):
            count, known = sum(row["category"] == category for row in rows), sum(row["category"] != "" for row in rows)
            assert shown[category.replace("_", r"\_")][place] == f"{count:,} ({100 * count / known:.1f} %)"

    shown = {row[0]: row[1:] for row in grid(section(text, "Kinds of prompts"))[1:]}
    for kind in ("plain", "few-shot"):
        assert shown[kind] == [f"{sum(row['kind'] == kind for row in rows):,}" for rows in of.values()]

    shown = {row[0]: row[1:6] for row in grid(section(text, "Prompts a user"))[1:]}
    for name, rows in prompts.items():
        by = Counter(row["user"] for row in rows if row["user"])
        unknown = f"{sum(not row['user'] for row in rows):,}"
        if by:
            counts = by.values()
            mean, median = f"{statistics.fmean(counts):.2f}", number(statistics.median(counts))
            assert shown[name] == [f"{len(by):,}", mean, median, f"{max(counts):,}", unknown]
        else:
            assert shown[name] == ["0", "-", "-", "-", unknown]

    shown = {row[0]: row[2:] for row in grid(section(text, "Prompt lengths (Table 9)"))[1:] if row[1] == "here"}
    assert shown == {name: described(words(rows)) for name, rows in prompts.items()}

    shown = {row[0]: row[2:] for row in grid(section(text, "Prompt lengths by use case"))[1:] if row[1] == "here"}
    for category in ("open_qa", "Chat", "generation", "coding"):
        rows = [row for row in everything if row["category"] == category]
        assert shown[category.replace("_", r"\_")] == described(words(rows))

    shown = {tuple(row[:3]): row[3:] for row in grid(section(text, "Prompts and demonstrations"))[1:]}
    for column, values in (("source", ("labelers", "customers")), ("kind", ("plain", "few-shot"))):
        for value in values:
            rows = [row for row in of["demonstrations"] if row[column] == value]
            assert shown[column, value, "prompt"] == described(words(rows))
            assert shown[column, value, "demonstration"] == described(words(rows, "response"))

    shown = {row[0]: row[1:3] for row in grid(section(text, "Languages"))[1:]}
    known = [row["language"] for row in everything if row["language"]]
    for code, count in Counter(known).items():
        assert shown[code] == [f"{count:,}", f"{100 * count / len(known):.1f} %"]
    assert f"not known: {len(everything) - len(known):,}." in section(text, "Languages")

    for name, rows in ((name, rows) for name, rows in tables.items() if name.startswith("rankings")):
        pairs = sum(len(row["ranks"]) * (len(row["ranks"]) - 1) // 2 for row in rows)
        assert re.search(rf"`{name}`: .* {pairs:,} pairs, {pairs / len(rows):.1f} a prompt", text)


def test_the_papers_own_tables_agree_with_each_other():
    for table, sizes in paper_data.SIZES.items():
        assert sum(sizes.values()) == paper_data.PROMPT_LENGTHS[table].count
    assert sum(share for share, _ in paper_data.USE_CASES.values()) == pytest.approx(100, abs=0.15)
    demonstrations = sum(paper_data.PROMPT_LENGTHS["demonstrations", part].count for part in ("train", "valid"))
    assert sum(lengths["prompt"].count for lengths in paper_data.WRITTEN_BY.values()) == demonstrations


def test_the_papers_figures_stand_beside_ours(tmp_path: Path):
    text = made(
        tmp_path, {name: drawn(0, 20, name.partition(".")[0]) for name in ("demonstrations.train", "prompts.eval")}
    )
    assert ["demonstrations.train", "all", "20", "12,725: 11,295 labelers + 1,430 customers"] in grid(
        section(text, "Sizes")
    )
    lengths = grid(section(text, "Prompt lengths (Table 9)"))
    assert ["", "paper", "12,725", "408", "433", "1", "37", "283", "632", "2,048"] in lengths
    assert ["", "paper", "3,196", "115", "194", "1", "17", "49", "127", "1,836"] in lengths
    assert [row[-1] for row in grid(section(text, "Use cases")) if row[0] == r"open\_qa"] == ["12.4 %"]
    assert grid(section(text, "Prompts a user"))[1][-1] == "1.65"


@given(st.lists(st.integers(0, 2000), min_size=1, max_size=300))
@settings(deadline=None)
def test_summaries_are_those_of_the_list(lengths: list[int]):
    counted = tally.Lengths(lengths).summary()
    assert counted is not None
    assert [number(value) for value in counted][3:] == described(lengths)[3:]
    assert counted.mean == pytest.approx(statistics.fmean(lengths))
    assert counted.std == pytest.approx(statistics.stdev(lengths) if len(lengths) > 1 else 0.0, abs=1e-9)


def test_lengths_are_in_tokens_where_they_can_be_counted(tmp_path: Path):
    rows = drawn(3, 50, "prompts")
    text = made(tmp_path, {"prompts.train": rows}, lambda texts: [len(one) for one in texts])
    assert "in tokens of this recipe's tokenizer" in text
    assert grid(section(text, "Prompt lengths (Table 9)"))[1][2:] == described([len(row["prompt"]) for row in rows])
    assert "in **words**" in made(tmp_path, {"prompts.train": rows})


READ = {"demonstrations": 12, "rankings": 0, "prompts": 25, "text": 0}


def followed(**changed) -> dict:
    """A card whose counts add up: 12 - 2 - 3 = 7 demonstrations, 25 - 5 + 4 - 20 = 4 prompts."""
    sources = {
        "data.demonstrations[0]": {"source": {"path": "d"}, "read": 12, "kept": 10, "dropped": {"invalid": 2}},
        "data.prompts[0]": {"source": {"path": "p"}, "read": 25, "kept": 24, "dropped": {"repeated": 5}},
    }
    sources["data.prompts[0]"]["added"] = {"few-shot": 4}
    step = {"step": "prefix", "key": "data.dedup_prefix", "setting": 100, "says": "share a prefix"}
    card_ = {
        "rows": {"demonstrations.train": 7, "prompts.train": 3, "prompts.valid": 1},
        "sources": sources,
        "steps": [step | {"removed": {"demonstrations": 3, "prompts": 20}}],
        "read": READ,
        "kept": {"demonstrations": 7, "rankings": 0, "prompts": 4, "text": 0},
    }
    return card_ | changed


def test_what_was_removed(tmp_path: Path):
    card_ = followed()
    for name, rows in card_["rows"].items():
        write_table(
            tmp_path / f"{name}.parquet", drawn(1, rows, name.partition(".")[0]), SCHEMAS[name.partition(".")[0]]
        )
    card.write_card(tmp_path, card_, None)
    text = section((tmp_path / "data_card.md").read_text(), "What was removed")
    rows = grid(text)
    assert rows[1:] == [
        ["read", "", "12", "25"],
        ["invalid", "", "-2", "0"],
        ["repeated", "", "0", "-5"],
        ["few-shot", "", "0", "+4"],
        ["share a prefix", "`data.dedup_prefix: 100`", "-3", "-20"],
        ["kept", "", "7", "4"],
    ]
    assert "The counts add up" in text
    assert (tmp_path / "card_removed.png").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"read": READ | {"prompts": 26}}, "prompts: the counts do not add up: 26 rows read, 4 kept, 21 removed"),
        ({"kept": {"demonstrations": 8, "prompts": 4}}, "demonstrations: the counts do not add up"),
        ({"steps": []}, "demonstrations: the counts do not add up"),
        ({"rows": {"demonstrations.train": 6, "prompts.train": 4}}, "7 rows are kept, but the tables hold 6"),
    ],
)
def test_counts_that_do_not_add_up(changed: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        flow.flow(followed(**changed))


def test_a_source_whose_counts_do_not_add_up():
    card_ = followed()
    card_["sources"]["data.prompts[0]"]["kept"] = 23
    with pytest.raises(
        ValueError, match=r"data.prompts\[0\]: the counts do not add up: 25 rows read, 23 kept, 1 removed"
    ):
        flow.flow(card_)


def test_a_table_that_is_not_what_the_card_says(tmp_path: Path):
    card_ = write(tmp_path, {"prompts.train": drawn(0, 5, "prompts")})
    with pytest.raises(ValueError, match=r"prompts.train: the card says 6 rows, the table has 5"):
        card.write_card(tmp_path, card_ | {"rows": {"prompts.train": 6}}, None)


def test_where_nothing_is_known(tmp_path: Path):
    bare = [{"prompt": "hi there"}] * 3
    tables = {
        "demonstrations.train": [row | {"response": "yes"} for row in bare],
        "demonstrations.valid": [],
        "prompts.train": bare,
    }
    text = made(tmp_path, tables)
    for title, column in (
        ("Use cases", "category"),
        ("Kinds", "kind"),
        ("Prompts a user", "user"),
        ("Languages", "language"),
    ):
        assert f"`columns: {{{column}: NAME}}`" in section(text, title)
    assert "Empty: `demonstrations.valid`" in section(text, "Sizes")
    assert ["demonstrations.valid", "here", "0", *"-------"] in grid(section(text, "Prompt lengths (Table 9)"))
    assert "NaN" not in text
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["card_lengths.png", "card_removed.png"]


def test_the_built_in_worlds_card_has_rows_only(tmp_path: Path):
    rows = write(tmp_path, {"prompts.eval": drawn(0, 9, "prompts")})["rows"]
    card.write_card(tmp_path, {"rows": rows | {"tasks": 3}}, None)
    text = (tmp_path / "data_card.md").read_text()
    assert "made, not read" in section(text, "What was removed")
    assert "None: the built-in world" in section(text, "Sources")


def test_nothing_at_all(tmp_path: Path):
    card.write_card(tmp_path, {"rows": {}}, None)
    assert list(tmp_path.glob("*.png")) == []


def test_text_of_users_is_text(tmp_path: Path):
    rows = [
        row | dict.fromkeys(("category", "kind", "source", "language"), HOSTILE)
        for row in drawn(0, 30, "demonstrations")
    ]
    rows += drawn(1, 30, "demonstrations")
    source = {
        "source": {"path": HOSTILE, "licence": HOSTILE},
        "files": [HOSTILE] * 9,
        "read": 60,
        "kept": 60,
        "dropped": {},
    }
    leaks = [{"against": HOSTILE, "exact": 1, "ngram": 2, "examples": [HOSTILE, HOSTILE]}]
    told = {"length": 9, "rows": 12, "most": [{"rows": 12, "words": HOSTILE}]}
    sources = {"data.demonstrations[0]": source}
    text = made(tmp_path, {"demonstrations.train": rows}, sources=sources, leakage=leaks, phrases=told)
    assert "12 more training rows share 9 words with held-out texts that many rows have" in text
    assert "<script>" not in text
    assert "\u202e" not in text
    assert "\x1b" not in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if re.match(r"#{1,2} [A-Z]", line) and "Title" not in line
    ]
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        if any(line.startswith("|") for line in part.splitlines()):
            grid(part)  # no cell was split
    assert re.findall(r"(?<!\\)!\[[^\]]*\]\(([^)]*)\)", text) == re.findall(r"card_\w+\.png", text)


@pytest.mark.parametrize(("low", "high"), [(80, 300), (2, 9), (1, 5_000_000), (130, 131), (1, 1)])
def test_lengths_are_numbered_plainly(tmp_path: Path, monkeypatch, low, high):
    """Also where they span less than a decade."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda made, *args, **kw: figures.append(made) or save(made, *args, **kw))
    ours = Summary(9, (low + high) / 2, 1.0, low, low, (low + high) / 2, high, high)
    plots.lengths(tmp_path / "lengths.png", [("prompts.train", "prompts", ours, None)], "tokens")
    axis = figures[0].axes[0].xaxis
    shown = [label.get_text() for label in axis.get_ticklabels(which="both") if label.get_text()]
    assert shown
    assert all(re.fullmatch(r"[\d,]+(\.\d+)?", text) for text in shown), shown


def test_a_column_with_another_value_in_every_row(tmp_path: Path):
    """An id taken for a category: counted, bounded, and the sum is right."""
    rows = [row | {"source": f"id {number}"} for number, row in enumerate(drawn(0, 1500, "prompts"))]
    text = made(tmp_path, {"prompts.train": rows})
    found = tally.tally(tmp_path / "prompts.train.parquet", tally.count_words)
    assert len(found.names["source"]) == tally.MOST_NAMES + 1
    assert found.names["source"][tally.OTHERS] == 500
    shown = grid(section(text, "Sizes"))
    assert sum(int(row[2].replace(",", "")) for row in shown[2:]) == 1500
    assert len(shown) == 2 + card_tables.MOST_ROWS + 1


def test_no_more_of_a_large_table_is_held_than_of_a_small_one(tmp_path: Path):
    held = []
    for rows in (4_000, 40_000):
        path, now = tmp_path / f"{rows}.parquet", []
        write_table(path, ({"prompt": f"{n} " * 50, "user": f"user {n}"} for n in range(rows)), PROMPTS)

        def count(texts: list[str], now: list[int] = now) -> list[int]:
            now.append(pyarrow.total_allocated_bytes())
            return [len(text) for text in texts]

        before = pyarrow.total_allocated_bytes()
        assert tally.tally(path, count).rows == rows
        held.append(max(now) - before)
    small, large = held
    assert large < 1.5 * small


def test_the_same_tables_give_the_same_bytes(tmp_path: Path, tables: dict[str, list[dict]]):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        made(folder, tables)
    names = sorted(path.name for path in folders[0].iterdir())
    assert {"data_card.md", "card_use_cases.png", "card_users.png", "card_lengths.png", "card_languages.png"} <= set(
        names
    )
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize(
    ("category", "name"),
    [
        ("open_qa", "open QA"),
        ("QA, open", "open QA"),
        ("Closed QA", "closed QA"),
        ("information_extraction", "extract"),
        ("creative_writing", "generation"),
        ("Summarize", "summarization"),
        ("sums", ""),
        ("", ""),
    ],
)
def test_use_cases_by_other_names(category: str, name: str):
    assert paper_data.use_case(category) == name
