"""Win rates broken down by use case (paper, Table 1): the `category` of the prompts, where they have one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from instructrl.stages.names import BASELINE
from instructrl.stages.pool import normalized
from instructrl.stages.winrate import share

OTHER = "(none)"
"""The use case of prompts that have none, beside others that do."""

MOST = 20
"""Use cases that a table shows."""


def by_use_case(
    prompts: Sequence[dict],
    won: dict[str, Sequence[float] | dict[str, float]],
    samples: int,
    fewest: int,
) -> dict[str, dict[str, Any]]:
    """Win rates against SFT within each use case, the one with the most prompts first.

    All models answered the same prompts, and all intervals draw the same ones anew, so they are paired as the whole's.

    Args:
        prompts: those evaluated, rows with `prompt` and `category`.
        won: for each model the outcome on each prompt, in their order; or, from labels, by normalized prompt.
        samples: of the bootstrap.
        fewest: with fewer prompts than this there is no interval.

    Returns:
        {use case: {prompts, win_rate: {model: [mean, low, high] or [mean]}}}; {} if no prompt has a use case. A model
        without a labelled prompt in a use case is left out there.
    """
    cases = [row["category"] or OTHER for row in prompts]
    if set(cases) <= {OTHER}:
        return {}
    found = {}
    for case in sorted(set(cases), key=lambda name: (-cases.count(name), name)):
        numbers = [number for number, name in enumerate(cases) if name == case]
        rates = {}
        for model, outcomes in won.items():
            if isinstance(outcomes, dict):
                asked = [normalized(prompts[number]["prompt"]) for number in numbers]
                values = [outcomes[prompt] for prompt in asked if prompt in outcomes]
            else:
                values = [outcomes[number] for number in numbers if not np.isnan(outcomes[number])]
            if model != BASELINE and values:
                rates[model] = list(share(values, samples)) if len(values) >= fewest else [float(np.mean(values))]
        found[case] = {"prompts": len(numbers), "win_rate": rates}
    return found


def cell(rate: Sequence[float] | None) -> str:
    """`.621 [.590, .650]`; the mean alone where there are too few prompts for an interval."""
    if rate is None:
        return "-"
    mean, *ends = (f"{part:.3f}".removeprefix("0") for part in rate)
    return f"{mean} [{', '.join(ends)}]" if ends else mean


def table(found: dict[str, dict[str, Any]], names: dict[str, str], fewest: int) -> dict[str, list] | None:
    """{"columns": [...], "rows": [[...]], "notes": [...]}, all text. None without use cases."""
    models = [name for name in names if any(name in case["win_rate"] for case in found.values())]
    if not models:
        return None
    rows = [
        [case, str(of["prompts"]), *(cell(of["win_rate"].get(name)) for name in models)]
        for case, of in list(found.items())[:MOST]
    ]
    notes = ["Win rate against SFT by use case; brackets are 95 % intervals over its prompts."]
    if any(of["prompts"] < fewest for of in found.values()):
        notes[0] += f" With fewer than {fewest} prompts there is no interval."
    if len(found) > MOST:
        notes[0] += f" {len(found) - MOST} smaller use cases are in metrics.json."
    return {"columns": ["use case", "prompts", *(names[name] for name in models)], "rows": rows, "notes": notes}
