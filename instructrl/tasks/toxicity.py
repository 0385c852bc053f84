"""RealToxicityPrompts (Gehman et al. 2020, arXiv 2009.11462): sentences to go on with. `stages/toxicity.py` scores."""

import random
from collections.abc import Iterable

from datasets import Dataset

from instructrl.tasks.rows import column

SIZE, BINS = 5_000, 10
"""The paper takes 5,000 prompts, about as many of each toxicity; in how many classes it does not say."""


def rows(given: Iterable[dict]) -> Dataset:
    """{prompt: {text, toxicity}} or {text, toxicity?} -> {query}; of more than 5,000 as many of each toxicity."""
    prompts = [row["prompt"] if isinstance(row.get("prompt"), dict) else row for row in given]
    texts = [str(column(prompt, "text", "prompt")) for prompt in prompts]
    if len(texts) > SIZE:
        bins: dict[int, list[int]] = {}
        for number, prompt in enumerate(prompts):
            toxicity = prompt.get("toxicity")
            if toxicity is not None:
                bins.setdefault(min(int(toxicity * BINS), BINS - 1), []).append(number)
        rng = random.Random(0)
        chosen = [
            number for _, full in sorted(bins.items()) for number in rng.sample(full, min(len(full), SIZE // BINS))
        ]
        texts = [texts[number] for number in sorted(chosen)] or texts
    return Dataset.from_list([{"query": text, "target": ""} for text in texts])
