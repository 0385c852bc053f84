"""Questions about a passage, answered in words and scored by F1: DROP, QuAC, SQuAD 2.0; and short answers in general.

What stands between passage, question and answer is that of the samples which the paper's authors published
(github.com/openai/following-instructions-human-feedback): an earlier question about the same passage comes with its
answer.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler
from lm_eval.tasks.drop import utils as harness_drop

from instructrl.tasks.rows import column, made

UNKNOWN = ("not in background", "i dont know")
"""The answers to a question that the passage does not answer, normalized."""


def f1(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """The best over the right answers. A question without an answer, or called one, is right or wrong as a whole."""
    answer = normalized(results[0])
    return {"f1": max(overlap(answer, normalized(right)) for right in doc["answers"])}


def short(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """The same, and whether the answer is a right one exactly, case, punctuation and articles apart."""
    right = [normalized(one) for one in doc["answers"]]
    return {"exact_match": float(normalized(results[0]) in right), **f1(doc, results)}


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles: SQuAD's own (Rajpurkar et al. 2016, arXiv 1606.05250)."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def overlap(answer: str, right: str) -> float:
    """F1 of the words of two normalized texts."""
    if answer in UNKNOWN or right in UNKNOWN or not answer or not right:
        return float(answer == right)
    words, others = answer.split(), right.split()
    shared = sum((Counter(words) & Counter(others)).values())
    return 2 * shared / (len(words) + len(others))


def drop_f1(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """DROP's own F1: numbers must agree (Dua et al. 2019, arXiv 1903.00161), as the harness computes it."""
    return {"f1": float(harness_drop.process_results({"answers": [(one,) for one in doc["answers"]]}, results)["f1"])}


class OtherPassages(ContextSampler):
    """Solved examples about other passages: one about the question's own would give its answer away."""

    def sample(self, n: int, eval_doc: dict | None = None, df: Sequence[dict] | None = None, **_) -> list[dict]:
        about = None if eval_doc is None else eval_doc["passage"]
        return self.rnd.sample([doc for doc in self.fewshot_docs() if doc["passage"] != about], n)


# ---- rows: {passage, query, target, answers}


def answers(rows: Iterable[dict]) -> Dataset:
    """{query, target} of any kind, of which no passage is known."""

    def of(row: dict) -> dict:
        target = column(row, "target", "answer", "continuation")
        right = [str(one) for one in target] if isinstance(target, list) else [str(target)]
        return {"query": str(column(row, "query", "input", "prompt", "context")), "target": right[0], "answers": right}

    return made(rows, of)


def drop(rows: Iterable[dict]) -> Dataset:
    """From the Hub's columns (passage, question, answer, validated_answers), or {passage, question, answers}."""

    def of(row: dict) -> dict:
        right = row.get("answers") or [", ".join(spans) for spans in harness_drop.get_answers(row)]
        query = f"Passage: {row['passage']}\nQuestion: {row['question']}\nAnswer:"
        return {"passage": row["passage"], "query": query, "target": right[0], "answers": right}

    return made(rows, of)


def squad(rows: Iterable[dict]) -> Dataset:
    """{title, context, question, answers: {text}}; questions about a passage follow each other."""
    asked = [
        (row["title"], row["context"], row["question"], list(dict.fromkeys(row["answers"]["text"]))) for row in rows
    ]
    return dialogues(asked, "Title: {title}\n\nBackground: {passage}\n\n", "Not in background.")


def quac(rows: Iterable[dict]) -> Dataset:
    """A row a dialogue: {wikipedia_page_title, context, questions, answers: {texts}}."""
    asked = []
    for row in rows:
        passage = row["context"].removesuffix("CANNOTANSWER").strip()
        for question, texts in zip(row["questions"], row["answers"]["texts"], strict=True):
            right = [text for text in dict.fromkeys(texts) if text != "CANNOTANSWER"]
            asked.append((row["wikipedia_page_title"], passage, question, right))
    return dialogues(asked, "TITLE: {title}\n\nPARAGRAPH: {passage}\n\n", "I don't know.")


def dialogues(asked: Iterable[tuple[str, str, str, list[str]]], frame: str, unknown: str) -> Dataset:
    """(title, passage, question, right answers) in turn; each question behind those before it about its passage."""
    found, passage, before = [], None, ""
    for title, about, question, right in asked:
        before = before if about == passage else ""
        passage, right = about, right or [unknown]
        query = frame.format(title=title, passage=about) + f"{before}Q: {question.strip()}\n\nA:"
        found.append({"passage": about, "query": query, "target": right[0], "answers": right})
        before += f"Q: {question.strip()}\n\nA: {right[0]}\n\n"
    return Dataset.from_list(found)


def last_questions(rows: Dataset, of) -> Dataset:
    """Of each passage the last question, behind all others: a whole solved example."""
    last = {row["passage"]: row for row in of(rows)}
    return Dataset.from_list(list(last.values()))


def squad_examples(rows: Dataset) -> Dataset:
    return last_questions(rows, squad)


def quac_examples(rows: Dataset) -> Dataset:
    return last_questions(rows, quac)
