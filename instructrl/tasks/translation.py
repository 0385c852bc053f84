"""French into English, scored by BLEU over the whole set (sacrebleu; Post 2018, arXiv 1804.08771)."""

from collections.abc import Iterable, Sequence

from datasets import Dataset
from sacrebleu.metrics import BLEU

from instructrl.tasks.rows import column, made


def wmt15(**_) -> dict[str, Dataset]:
    """WMT 2015's test set, as sacrebleu downloads it."""
    from sacrebleu.utils import get_reference_files, get_source_file

    files = get_source_file("wmt15", "fr-en"), get_reference_files("wmt15", "fr-en")[0]
    texts = []
    for file in files:
        with open(file, encoding="utf-8") as lines:  # noqa: PTH123
            texts.append(lines.read().splitlines())
    return {"test": Dataset.from_list([{"fr": fr, "en": en} for fr, en in zip(*texts, strict=True)])}


def fr_en(rows: Iterable[dict]) -> Dataset:
    """{fr, en} or {translation: {fr, en}} -> {query, target}"""

    def of(row: dict) -> dict:
        pair = row.get("translation") or row
        french, english = (str(column(pair, name)).strip() for name in ("fr", "en"))
        return {"query": f"French: {french}\nEnglish:", "target": english}

    return made(rows, of)


def results(doc: dict, answers: Sequence[str]) -> dict[str, list[int]]:
    """What BLEU adds up over sentences: [length, reference's length, 4 matches, 4 totals] of n-grams."""
    found = BLEU(effective_order=False).corpus_score([answers[0].strip()], [[doc["target"]]])
    return {"bleu": [found.sys_len, found.ref_len, *found.counts, *found.totals]}


def bleu(sums: Sequence[Sequence[int]]) -> float:
    """BLEU of all sentences, 0 to 100."""
    length, reference, *grams = (sum(values) for values in zip(*sums, strict=True))
    return BLEU.compute_bleu(grams[:4], grams[4:], length, reference, smooth_method="exp").score
