"""Multiple choice: the choice with the highest mean log-probability per token, at temperature 1 (App. D).

The paper prints "lowest", which must be highest.
"""

import re
from collections.abc import Iterable, Sequence

from datasets import Dataset

from instructrl.tasks.rows import column, made


def accuracy(doc: dict, results: Sequence[tuple]) -> dict[str, float]:
    """1 if the right choice is the likeliest. `results`: (log-likelihood, greedy) of each choice, in their order."""
    means = [likelihood.mean for likelihood, _ in results]
    return {"acc": float(max(range(len(means)), key=lambda number: means[number]) == doc["gold"])}


# ---- rows: {query, choices, gold}


def given(rows: Iterable[dict]) -> Dataset:
    """Rows that are so already."""
    return made(rows, lambda row: {name: column(row, name) for name in ("query", "choices", "gold")})


def contexts(rows: Iterable[dict]) -> Dataset:
    """Choices that come before what is predicted, as in Winograd schemas (Trinh & Le 2018, arXiv 1806.02847)."""
    names = ("context_options", "continuation", "gold")
    return made(rows, lambda row: {name: column(row, name) for name in names})


def hellaswag(rows: Iterable[dict]) -> Dataset:
    """Its marks of the WikiHow part taken out, as the harness does."""

    def of(row: dict) -> dict:
        context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {
            "query": without_marks(context),
            "choices": [without_marks(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }

    return made(rows, of)


def without_marks(text: str) -> str:
    """`a [title] b [step]` -> `a. b `"""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def rte(rows: Iterable[dict]) -> Dataset:
    """Label 0 is entailment."""

    def of(row: dict) -> dict:
        premise, hypothesis = (str(row[name]).strip() for name in ("premise", "hypothesis"))
        asked = f"From this passage can one reasonably conclude that {hypothesis.rstrip('.')}?"
        query = f"Passage: {premise}\nQuestion: {asked}\nAnswer:"
        return {"query": query, "choices": ["Yes", "No"], "gold": int(row["label"])}

    return made(rows, of)


def sst(rows: Iterable[dict]) -> Dataset:
    """Label 1 is positive."""

    def of(row: dict) -> dict:
        query = f"Text: {str(row['sentence']).strip()}\nLabel:"
        return {"query": query, "choices": ["negative", "positive"], "gold": int(row["label"])}

    return made(rows, of)
