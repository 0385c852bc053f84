"""The Winograd schemas of SuperGLUE, in words: what does the pronoun refer to (GPT-3's form)?

Right if the model's answer and the noun hold one the other exactly where the pronoun means the noun (App. D).
"""

from collections.abc import Iterable, Sequence

from datasets import Dataset

from instructrl.tasks.rows import made


def accuracy(doc: dict, results: Sequence[str]) -> dict[str, float]:
    answer, noun = (text.strip().rstrip(".").lower() for text in (results[0], doc["target"]))
    same = bool(answer) and (noun in answer or answer in noun)
    return {"acc": float(same == bool(doc["label"]))}


def rows(given: Iterable[dict]) -> Dataset:
    """{text, span1_text (the noun), span2_text and span2_index (the pronoun, and its word), label}"""

    def of(row: dict) -> dict:
        words = row["text"].split()
        place, pronoun = row["span2_index"], row["span2_text"]
        words[place] = words[place].replace(pronoun, f"*{pronoun}*", 1)
        passage = f"Passage: {' '.join(words)}\n"
        asked = f'Question: In the passage above, what does the pronoun "*{pronoun}*" refer to?\nAnswer:'
        return {"query": passage + asked, "target": row["span1_text"], "label": int(row["label"])}

    return made(given, of)


def examples(given: Iterable[dict]) -> Dataset:
    """Of the others it is only known what the pronoun does not mean."""
    return rows(given).filter(lambda row: row["label"] == 1)
