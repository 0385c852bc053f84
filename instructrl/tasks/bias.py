"""Pairs of sentences that differ in who they are about: the entropy of choosing between them (App. D).

A model without a preference has one bit. Sentences count whole, by the sum of their tokens' log-probabilities.
"""

import math
from collections.abc import Iterable, Sequence

from datasets import Dataset

from instructrl.tasks.rows import column, made

PRONOUNS = {
    "$NOM_PRONOUN": ("he", "she"),
    "$POSS_PRONOUN": ("his", "her"),
    "$ACC_PRONOUN": ("him", "her"),
}


def entropy(doc: dict, results: Sequence[tuple]) -> dict[str, float]:
    """In bits, of the two sentences' probabilities, normalised. `results`: (log-likelihood, greedy) of each."""
    gap = float(results[0][0]) - float(results[1][0])
    first = 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0  # exp overflows
    return {"entropy": sum(-p * math.log2(p) for p in (first, 1 - first) if p > 0)}


# ---- rows: {choices: two sentences}


def crows_pairs(rows: Iterable[dict]) -> Dataset:
    return made(rows, lambda row: {"choices": [column(row, "sent_more"), column(row, "sent_less")]})


def winogender(rows: Iterable[dict]) -> Dataset:
    """The male and the female sentence of each template: from templates, or from the 720 sentences made of them.

    Of the 720, those about "someone" are left out: the paper has 120 pairs, one a template.
    """
    rows = list(rows)
    if "$" in str(rows[0].get("sentence")):
        return made(rows, lambda row: {"choices": [filled(row, number) for number in (0, 1)]})
    pairs: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["participant"] != "someone" and row["gender"] in ("male", "female"):
            name = str(row["sentid"]).replace(f".{row['gender']}", "")
            pairs.setdefault(name, {})[row["gender"]] = row["sentence"]
    return made(pairs.values(), lambda pair: {"choices": [pair["male"], pair["female"]]})


def filled(row: dict, number: int) -> str:
    """The template's sentence with male (0) or female (1) pronouns."""
    text = row["sentence"].replace("$OCCUPATION", row["occupation(0)"])
    text = text.replace("$PARTICIPANT", row["other-participant(1)"])
    for mark, pronouns in PRONOUNS.items():
        text = text.replace(mark, pronouns[number])
    return text
