"""How well scores, lengths, words and people agree with rankings.

A pair is (index of the better response, index of the worse one); a tie is no pair. An agreement is a share of pairs;
equal scores count half. Its 95 % interval is the bootstrap over prompts: the pairs of a prompt depend on each other.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import combinations, permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from instructrl.stages.winrate import Interval, ratio

Tally = tuple[float, int]  # pairs that agree, pairs


def pairs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Every (better, worse) of a ranking; rank 1 is best."""
    return [(i, j) for i, j in permutations(range(len(ranks)), 2) if ranks[i] < ranks[j]]


def tally(scores: Sequence[float], ranks: Sequence[int]) -> Tally:
    """How many pairs of a ranking the scores order the same way, of how many."""
    found = pairs(ranks)
    return sum(1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0 for i, j in found), len(found)


def tally_all(scores: Sequence[float], rankings: Iterable[Sequence[int]]) -> Tally:
    """The same over several rankings of the same responses."""
    return add(tally(scores, ranks) for ranks in rankings)


def add(tallies: Iterable[Tally]) -> Tally:
    tallies = list(tallies)
    return sum(right for right, _ in tallies), sum(total for _, total in tallies)


def share(tallies: Sequence[Tally]) -> Interval | None:
    """The share of pairs over all prompts and its interval: one tally a prompt. None without any pair."""
    counted = [(right, total) for right, total in tallies if total]
    return ratio(*zip(*counted, strict=True)) if counted else None


def between(one: Sequence[int], other: Sequence[int]) -> Tally:
    """How two people agree: each one's pairs by the other's ranks, where a tie counts half, as a score's tie does.

    So it is measured on the same pairs as a reward model's accuracy, those that one labeler does not tie.
    """
    return add([tally([-rank for rank in other], one), tally([-rank for rank in one], other)])


def agreement(rows: Iterable[dict]) -> Interval | None:
    """Annotators with each other: every two of each prompt's `annotators`."""
    return share([add(between(a, b) for a, b in combinations(row["annotators"], 2)) for row in rows])


def held_out_agreement(rows: Iterable[dict]) -> Interval | None:
    """Held-out labelers with those who rank for training."""
    return share([add(between(a, b) for a in row["annotators"] for b in row["held_out"]) for row in rows])


def gold_agreement(rows: Iterable[dict]) -> Interval | None:
    """Annotators with the gold preference."""
    return share([add(between(a, row["gold"]) for a in row["annotators"] if row["gold"]) for row in rows])


def longer_wins(rows: Iterable[dict]) -> Interval | None:
    """How often the response with more characters is the better one."""
    return share([tally([len(text) for text in row["responses"]], row["ranks"]) for row in rows])


WORDS, ROWS, PAIRS = 2_000, 4_000, 6  # enough for a baseline: frequent words, rankings, pairs of a ranking
WORD = re.compile(r"\w+|[^\w\s]")


def bag_of_words(train: Sequence[dict], valid: Sequence[dict], steps: int = 100, l2: float = 1e-2) -> Interval | None:
    """Held-out accuracy of a linear model of which words a response has: what preferences can be read off words alone.

    Logistic regression on pairs, P(i better than j) = sigmoid(w (x_i - x_j)), x = log(1 + count of each frequent word).
    """
    train = train[:ROWS]
    counts = Counter(word for row in train for text in row["responses"] for word in set(words(text)))
    index = {word: i for i, (word, _) in enumerate(counts.most_common(WORDS))}
    differences = []
    for row in train:
        x = features(row, index)
        differences += [x[i] - x[j] for i, j in pairs(row["ranks"])[:PAIRS]]
    if not differences:
        return None
    x = torch.stack(differences)  # [pairs, words]
    weights = torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -F.logsigmoid(x @ weights).mean() + l2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    scores = ((features(row, index) @ weights.detach()).tolist() for row in valid)
    return share([tally(row_scores, row["ranks"]) for row_scores, row in zip(scores, valid, strict=True)])


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def features(row: dict, index: dict[str, int]) -> Tensor:
    """log(1 + count) of each word: [responses, words]."""
    x = torch.zeros(len(row["responses"]), len(index))
    for i, text in enumerate(row["responses"]):
        for word, count in Counter(words(text)).items():
            if word in index:
                x[i, index[word]] = count
    return x.log1p()
