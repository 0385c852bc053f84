"""Summaries of news and of posts, scored by ROUGE-L (Lin 2004), the F-measure of the longest common subsequence."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from datasets import Dataset
from rouge_score.rouge_scorer import RougeScorer

from instructrl.tasks.rows import column, made


def rouge(doc: dict, results: Sequence[str]) -> dict[str, float]:
    """Words are not stemmed. The paper does not say."""
    return {"rouge_l": scorer("rougeL").score(doc["target"], results[0])["rougeL"].fmeasure}


@lru_cache(maxsize=2)
def scorer(kind: str) -> RougeScorer:
    return RougeScorer([kind], use_stemmer=False)


# ---- rows: {query, target}


def summarized(text: object, summary: object) -> dict:
    bare = str(text).strip().removesuffix("TL;DR:").strip()
    return {"query": f"{bare}\n\nTL;DR:", "target": str(summary).strip()}


def cnn_dm(rows: Iterable[dict]) -> Dataset:
    return made(rows, lambda row: summarized(column(row, "article"), column(row, "highlights")))


def tldr(rows: Iterable[dict]) -> Dataset:
    return made(rows, lambda row: summarized(column(row, "post", "prompt"), column(row, "summary", "completion")))
