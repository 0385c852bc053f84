"""Overlap between training and what measures, against brute force on sets of words."""

import random
import re

import numpy
import pytest

from instructrl.stages.leakage import COMMON, Sieve, find, runs, strings, words

LENGTH = 13


def plain(text):
    return re.findall(r"\w+", text.casefold())


def plain_runs(text):
    found = plain(text)
    return {tuple(found[n : n + LENGTH]) for n in range(len(found) - LENGTH + 1)}


def sentence(rng, count):
    return " ".join(
        rng.choice(
            ("the", "a", "cat", "dog", "bird", "sees", "hears", "runs", "to", "from", "under", "red", "blue", "old")
        )
        for _ in range(count)
    )


def leaked(training, texts, name="eval"):
    return found([[text] for text in training], texts, name)[0]


def found(training, texts, name="eval"):
    (leak,), held_out = find(lambda: enumerate(training), lambda: [(name, texts)], LENGTH)
    return leak, held_out


def test_runs_are_equal_exactly_where_their_words_are():
    rng = random.Random(0)
    texts = [sentence(rng, rng.randint(0, 40)) for _ in range(300)]
    numbers = {}
    for text in texts:
        found = plain(text)
        for number, run in zip(
            runs(words(text), LENGTH).tolist(), [tuple(found[n : n + LENGTH]) for n in range(40)], strict=False
        ):
            assert numbers.setdefault(number, run) == run
    assert len(numbers) == len(set.union(*map(plain_runs, texts)))


def test_rows_with_a_common_run_are_found_by_brute_force():
    rng = random.Random(1)
    held_out = [sentence(rng, rng.randint(5, 60)) for _ in range(40)]
    training = [sentence(rng, rng.randint(5, 60)) for _ in range(200)]
    for n in range(0, 200, 7):  # a piece of a held-out text, shorter and longer than a run
        found = rng.choice(held_out).split()
        start = rng.randint(0, len(found) - 1)
        training[n] += " " + " ".join(found[start : start + rng.randint(5, 30)])
    expected_runs = {run for text in held_out for run in plain_runs(text)}
    expected = {n for n, text in enumerate(training) if plain_runs(text) & expected_runs}
    assert leaked(training, held_out).ngram == expected
    assert 5 < len(expected) < 60


def test_case_and_punctuation_do_not_hide_a_text():
    assert leaked(["What is the capital: of FRANCE"], ["what is the capital of France?"]).exact == {0}
    assert not leaked(["Yes."], ["yes"]).rows  # too short to tell anything
    assert not leaked(["what is the capital of Spain"], ["what is the capital of France?"]).rows


def test_a_phrase_of_the_format_is_no_leak_but_one_text_repeated_often_is():
    frame = "answer the following question as truthfully as you can and in one short sentence please"
    training = [f"{frame} question number {n}" for n in range(COMMON + 5)]
    held_out = [f"{frame} thing {n}" for n in range(5)]
    assert not leaked(training, held_out).rows
    assert leaked(training[:COMMON], held_out).rows == set(range(COMMON))
    passage = " ".join(f"word{n}" for n in range(30))
    assert leaked([f"{passage} {n}" for n in range(COMMON + 5)], [passage]).rows == set(range(COMMON + 5))


def test_phrases_are_told_with_the_rows_that_have_no_more_than_them():
    frame = "Answer the following question as truthfully as you can, and in one short sentence please:"
    passage = " ".join(f"word{n}" for n in range(30))
    training = [[f"number {n}", f"{n}. {frame} thing {n}"] for n in range(COMMON + 5)] + [[f"{frame} {passage}"]]
    leak, held_out = found(training, [f"{frame} one {passage}", f"{frame} two"])
    assert leak.rows == {COMMON + 5}
    told = " ".join(plain(frame))
    assert held_out.phrase_card() == {"rows": COMMON + 5, "most": [{"rows": COMMON + 5, "words": told}]}


def test_every_text_of_a_row_counts():
    row = {"question": "q", "choices": ["a", "b"], "nested": {"text": ["c", {"more": "d"}]}, "number": 3, "none": None}
    assert sorted(strings(row)) == ["a", "b", "c", "d", "q"]
    texts = [["short prompt", "x " + "long answer that is the same in both " * 3]]
    assert found(texts, ["long answer that is the same in both " * 3])[0].ngram == {0}


def test_a_sieve_has_what_was_added_and_little_else():
    rng = numpy.random.default_rng(0)
    added, others = rng.integers(0, 2**64, (2, 1_000_000), dtype=numpy.uint64)
    sieve = Sieve()
    for part in numpy.split(added, 10):
        sieve.add(part)
    assert sieve.has(added).all()
    assert sieve.has(others).mean() == pytest.approx((2 / 2**7 / 1.05) ** 2, rel=0.15)
    assert not sieve.has(numpy.empty(0, dtype=numpy.uint64)).any()


@pytest.mark.parametrize("bits", [10, 14])
def test_a_sieve_that_is_full_changes_nothing_that_is_found(monkeypatch, bits):
    rng = random.Random(2)
    held_out = [sentence(rng, 40) for _ in range(30)]
    training = [sentence(rng, 30) + " " + rng.choice(held_out)[: rng.choice((0, 50, 120))] for _ in range(300)]
    expected = leaked(training, held_out)
    monkeypatch.setattr(Sieve, "BITS", bits)
    assert leaked(training, held_out) == expected
    assert 20 < len(expected.rows) < 280


@pytest.mark.parametrize("text", ["", "   ", "?!", "\u200b", "\ud800 alone in a text of words"])
def test_texts_without_words_leak_nothing(text):
    assert not leaked([text], ["something else that is here to be measured"]).rows
