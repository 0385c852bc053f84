"""Every model against every other, and each against SFT at equal length: numbers, and their sections of the report."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from instructrl.stages.markup import cell, grid
from instructrl.stages.names import BASELINE, NAMES
from instructrl.stages.use_cases import cell as shown
from instructrl.stages.winrate import mirrored, share

Compared = Callable[[str, str], NDArray[np.float64] | None]
"""Two models -> the outcomes for the first, one a prompt that both have a verdict on. None: not compared."""


def pairs(models: Sequence[str], compared: Compared, samples: int) -> dict[str, dict[str, list[float]]]:
    """{model: {other: [win rate, low, high]}}, both ways round. Pairs without a verdict are left out."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    for one, other in combinations(sorted(models, key=lambda name: name == BASELINE), 2):  # as the table against SFT
        outcomes = compared(one, other)
        if outcomes is not None and len(outcomes):
            rate = share(outcomes, samples)
            found[one][other], found[other][one] = list(rate), list(mirrored(rate))
    return {name: against for name, against in found.items() if against}


def sections(metrics: dict) -> list[str]:
    """What `metrics.json` has of the two, as Markdown."""
    return [*pairs_section(metrics), *equal_length_section(metrics)]


def pairs_section(metrics: dict) -> list[str]:
    found = metrics.get("matrix") or {}
    if len(found) < 3:  # one pair is in the table of win rates
        return []
    titles = names(metrics)
    rows = [[titles[one], *("-" if one == other else shown(found[one].get(other)) for other in found)] for one in found]
    return [
        "## Win rates of all pairs",
        "Share of prompts on which the row's answer is better than the column's, ties half, with its 95 % interval.",
        grid(["", *(cell(titles[name]) for name in found)], rows),
    ]


def equal_length_section(metrics: dict) -> list[str]:
    models = metrics["models"]
    baseline = models.get(BASELINE, {}).get("length")
    rows = [
        [
            found["name"],
            shown(found["win_rate"]),
            shown(found["win_rate_length_controlled"]),
            f"{found['length'][0] - baseline[0]:+.1f}",
        ]
        for found in models.values()
        if found.get("win_rate_length_controlled")
    ]
    if not rows:
        return []
    return [
        "## Win rates at equal length",
        "What the win rate against SFT would be if the answers were as long as SFT's, by the regression of Dubois et "
        "al. (2024), without its term for each prompt's difficulty. A gain that is gone here is length.",
        grid(["model", "win rate", "at equal length", "tokens more than SFT"], rows, numbers=1),
    ]


def names(metrics: dict) -> dict[str, str]:
    return NAMES | {name: found["name"] for name, found in metrics["models"].items()}
