"""The PII filter on our labelled prompts: the table in docs/data-card.md is what it does."""

import gzip
import json
import socket
import subprocess
import sys
from collections import Counter

import pytest
from conftest import ROOT

from instructrl.errors import UserError
from instructrl.stages import pii

ROWS = [json.loads(line) for line in (ROOT / "tests/fixtures/pii.jsonl").read_text().splitlines()]
SHARED = ROOT.parent / "shared" / "data" / "demonstrations"

pytest.importorskip("presidio_analyzer", reason="needs instructrl[pii]")


def measured() -> str:
    """The table of docs/data-card.md."""
    found = [set(pii.personal(row["text"])) for row in ROWS]
    wanted = [set(row["kinds"]) for row in ROWS]
    lines = ["| kind | prompts with it | precision | recall |", "| --- | ---: | ---: | ---: |"]
    for kind in pii.KINDS:
        lines.append(line(kind, [kind in one for one in wanted], [kind in one for one in found]))
    for name, late in (
        ("any: the prompt is removed", (False, True)),
        ("any, of those written after the rules", (True,)),
    ):
        chosen = [number for number, row in enumerate(ROWS) if row["late"] in late]
        pairs = [[bool(one[number]) for number in chosen] for one in (wanted, found)]
        lines.append(line(f"**{name}**", *pairs))
    return "\n".join(lines)


def line(kind: str, wanted: list[bool], found: list[bool]) -> str:
    pairs = Counter(zip(wanted, found, strict=True))
    right, there, said = pairs[True, True], sum(wanted), sum(found)
    shares = (f"{100 * right / of:.0f} % ({right} of {of})" for of in (said, there))
    return f"| {kind} | {there} | {' | '.join(shares)} |"


def test_docs_show_what_is_measured():
    table = measured()
    assert table in (ROOT / "docs/data-card.md").read_text(), f"docs/data-card.md should have\n{table}"


def test_the_labelled_set_is_balanced_and_has_every_kind():
    kinds = Counter(kind for row in ROWS for kind in row["kinds"])
    assert set(kinds) == set(pii.KINDS)
    assert min(kinds.values()) >= 4
    hard = sum(not row["kinds"] for row in ROWS)
    assert hard >= 60
    assert len(ROWS) - hard >= 60


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", []),
        ("mail a@b.co and 4111 1111 1111 1111", ["card", "email"]),
        ("4111 1111 1111 1112 has a wrong check digit", []),
        ("DE89 3704 0044 0532 0130 01 has a wrong check digit", []),
        ("user@localhost is no address on the Internet", []),
        ("8.8.8.8 and 127.0.0.1 and 192.168.1.10", []),
        ("release 6.2.9200.16384 of 2012-08-01", []),
        ("he (1685-1753) wrote", []),
        ("943 476 5919", ["phone"]),  # also an NHS number, but nothing says so
        ("my NHS number: 943 476 5919", ["id", "phone"]),
        ("9434765919", []),
    ],
)
def test_kinds(text, kinds):
    assert pii.personal(text) == kinds


@pytest.mark.parametrize(
    "text",
    [
        "a" * 30_000 + " x@y",
        "a." * 15_000 + "@",
        "1234567890" * 3_000,
        "1-" * 5_000,
        "AB12 " * 5_000,
        "Abc " * 8_000,
        "1 Abc Abc Abc " * 2_000,
        "\ud800\x00\u202e" * 100,
    ],
    ids=["word", "dots", "digits", "dashes", "iban", "names", "streets", "invisible"],
)
def test_no_text_makes_it_crawl(text):
    """Presidio stops a regular expression after a minute; what it has found by then depends on the machine."""
    import time

    start = time.process_time()
    pii.personal(text)
    assert time.process_time() - start < 10


def test_nothing_is_fetched(monkeypatch):
    """tldextract would fetch the list of suffixes at its first address."""

    def refuse(*arguments, **more):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    pii.rules.cache_clear()
    assert pii.personal("write to someone@example.com") == ["email"]


def test_the_extra_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(pii, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'instructrl\[pii\]'"):
        pii.check()


def test_importing_the_filter_imports_no_library():
    code = "import sys; import instructrl.stages.pii; sys.exit('presidio_analyzer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_maths_problems_hold_no_personal_data():
    with gzip.open(SHARED / "gsm8k_train.jsonl.gz", "rt", encoding="utf-8") as lines:
        prompts = [json.loads(next(lines))["prompt"] for _ in range(1000)]
    assert [prompt for prompt in prompts if pii.personal(prompt)] == []
