"""Answers side by side: prompts of every use case in turn, as sampled; nothing is picked."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from instructrl.stages.names import BASELINE, NAMES

SAID = {
    1.0: "beats SFT",
    0.75: "rather beats SFT",
    0.5: "ties with SFT",
    0.25: "rather loses to SFT",
    0.0: "loses to SFT",
}
"""Outcomes: 1, .5 or 0, or the mean of two for a judge who was asked in both orders."""
COLUMNS = ["prompt", "category", "source", "model", "temperature", "response", "reward", "tokens", "against_sft"]


def side_by_side(rows: Iterable[Mapping[str, Any]], names: Mapping[str, str], temperature: float, count: int) -> list:
    """The first prompts of each kind with every model's answer.

    Args:
        rows: of `samples.parquet`.
        names: model -> what readers call it, in the order of the columns.
        temperature: of the answers that are wanted.
        count: prompts at most: one of each use case in turn, in the order of the prompts.

    Returns:
        {prompt, category, answers: [{model, name, text, reward, tokens, verdict}]} each.
    """
    found: dict[str, list] = {}
    for row in rows:
        if row["temperature"] == temperature and row["model"] in names:
            found.setdefault(row["model"], []).append(row)
    by_model = {name: found[name] for name in names if name in found}
    if not by_model:
        return []
    prompts = next(iter(by_model.values()))
    judged = {name for name, given in by_model.items() if any(row.get("against_sft") is not None for row in given)}
    samples = []
    for number in in_turn([row["category"] or row["source"] or "" for row in prompts])[:count]:
        row = prompts[number]
        answers = [answer(given[number], names[name], name in judged) for name, given in by_model.items()]
        samples.append(
            {"prompt": row["prompt"], "category": row["category"] or row["source"] or "", "answers": answers}
        )
    return samples


def answer(row: Mapping[str, Any], name: str, judged: bool) -> dict[str, Any]:
    """One cell. `judged`: whether the judge has a verdict on any of the model's answers."""
    verdict = ""
    if judged and row["model"] != BASELINE:
        outcome = row.get("against_sft")
        verdict = "no verdict" if outcome is None else SAID.get(outcome, "")
    return {
        "model": row["model"],
        "name": name,
        "text": row["response"],
        "reward": row.get("reward"),
        "tokens": row.get("tokens"),
        "verdict": verdict,
    }


def in_turn(kinds: Sequence[str]) -> list[int]:
    """The numbers of all, the first of each kind before the second of any: `a a b c a` -> 0 2 3 1 4."""
    seen: dict[str, int] = {}
    turns = []
    for number, kind in enumerate(kinds):
        turns.append((seen.get(kind, 0), number))
        seen[kind] = seen.get(kind, 0) + 1
    return [number for _, number in sorted(turns)]


def read(path: Path, metrics: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    """The samples of an evaluation's table; [] where there is none, or not of this form."""
    if not path.is_file():
        return []
    import pyarrow.parquet

    there = pyarrow.parquet.read_schema(path).names
    if not {"prompt", "category", "source", "model", "temperature", "response"} <= {*there}:
        return []
    rows = pyarrow.parquet.read_table(path, columns=[name for name in COLUMNS if name in there]).to_pylist()
    names = {name: found["name"] for name, found in metrics.get("models", {}).items()} or NAMES
    return side_by_side(rows, names, metrics.get("temperature", 1.0), count)


def for_markdown(samples: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `stages.report.sample_section` takes them: {prompt, category, answers: {title: text}}."""
    return [
        {
            "prompt": sample["prompt"],
            "category": sample["category"],
            "answers": {
                one["name"] + (f" ({one['verdict']})" if one["verdict"] else ""): one["text"]
                for one in sample["answers"]
            },
        }
        for sample in samples
    ]
