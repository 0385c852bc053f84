"""Simulated labelers: each has own tastes beside the gold preference, and noise, as the paper's disagreed (3.4)."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from instructrl.world.gold import Judgement


@dataclass(frozen=True)
class Labeler:
    """One labeler's own weights, added to the gold utility."""

    length: float
    """For ten words."""
    correct: float
    constraint: float
    toxic: float
    """Subtracted."""

    def utility(self, judgement: Judgement) -> float:
        """What the labeler thinks of an answer, without noise."""
        return (
            judgement.utility
            + self.length * judgement.words / 10
            + self.correct * judgement.correct
            + self.constraint * bool(judgement.constraint)
            - self.toxic * judgement.toxic
        )

    def rank(self, judgements: Sequence[Judgement], rng: random.Random, noise: float, tie: float = 0.0) -> list[int]:
        """Ranks answers of one prompt: 1 is best, equal ranks are ties.

        `noise` is the scale of the Gumbel noise on every answer, so that of two answers the better one wins with
        probability sigmoid(difference / noise): Bradley-Terry, as the reward model assumes (eq. 1). With noise 0,
        answers of equal utility tie. Answers that seem at most `tie` worse than the best of a rank share that rank.
        """
        return ranks([self.utility(judgement) + noise * gumbel(rng) for judgement in judgements], tie)


def labelers(n: int, seed: int, spread: float) -> list[Labeler]:
    """`n` labelers whose weights have standard deviation `spread` (half of it on length)."""
    rng = random.Random(f"labelers {seed}")
    return [
        Labeler(rng.gauss(0, spread / 2), rng.gauss(0, spread), rng.gauss(0, spread), rng.gauss(0, spread))
        for _ in range(n)
    ]


def ranks(utilities: Sequence[float], tie: float = 0.0) -> list[int]:
    """1 for the highest; each rank is one more than the number of answers in better ranks.

    From the best downwards, an answer that is more than `tie` worse than the best of the current rank opens the next.
    """
    given = [0] * len(utilities)
    rank, best = 0, math.inf
    for place, i in enumerate(sorted(range(len(utilities)), key=lambda i: -utilities[i]), start=1):
        if utilities[i] < best - tie - 1e-9:
            rank, best = place, utilities[i]
        given[i] = rank
    return given


def gumbel(rng: random.Random) -> float:
    """A sample of the standard Gumbel distribution: minus the logarithm of an exponential one."""
    return -math.log(max(rng.expovariate(1.0), 1e-300))
