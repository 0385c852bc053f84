"""The language filter on our labelled texts: the table in docs/data-card.md is what it does."""

import json
from collections import Counter

import pytest
from conftest import ROOT

from instructrl.errors import UserError
from instructrl.stages import language

ROWS = [json.loads(line) for line in (ROOT / "tests/fixtures/languages.jsonl").read_text().splitlines()]

pytest.importorskip("py3langid", reason="needs instructrl[lang]")


def measured() -> str:
    """The table of docs/data-card.md."""
    texts, right, given = Counter(), Counter(), Counter()
    for row in ROWS:
        code = language.detect(row["text"])
        texts[row["language"]] += 1
        given[code] += 1
        right[code] += code == row["language"]
    lines = ["| language | texts | found | given | of which right |", "| --- | ---: | ---: | ---: | ---: |"]
    for code in sorted(texts, key=lambda code: (code == "", code)):
        name = code or "(none)"
        found = f"{right[code]} ({100 * right[code] / texts[code]:.0f} %)"
        lines.append(f"| {name} | {texts[code]} | {found} | {given[code]} | {right[code]} |")
    return "\n".join(lines)


def test_docs_show_what_is_measured():
    table = measured()
    assert table in (ROOT / "docs/data-card.md").read_text(), f"docs/data-card.md should have\n{table}"


def test_no_wrong_language_is_given_with_confidence():
    """A wrong language would throw a good row away; "" does not."""
    wrong = [row for row in ROWS if language.detect(row["text"]) not in ("", row["language"])]
    assert wrong == []


@pytest.mark.parametrize("text", ["", " \n", "\x00", "\ud800", "7", "!!!"])
def test_nothing_to_tell_from(text):
    assert language.detect(text) == ""


def test_only_the_beginning_is_read():
    english = "This is a sentence in English about the weather. " * 200
    assert language.detect(english + "Das ist ein deutscher Satz. " * 10_000) == "en"


def test_codes_are_iso_639_1():
    assert {len(code) for code in language.identifier().labels} == {2, len(language.NO_LANGUAGE)}


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(language, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'instructrl\[lang\]'"):
        language.check()
