"""`report.html` and `report.md` of a run, from its artifacts; what is missing is named."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from instructrl.artifacts import write_atomically
from instructrl.reporting import charts, markdown, page, samples, sections
from instructrl.reporting.runs import SAMPLES, Run
from instructrl.stages.names import BASELINE
from instructrl.stages.report import shares

SHOWN = 40
"""Prompts side by side in report.html; report.md has `eval.samples_shown`."""

SCALE = (
    "Scale: the paper's models have 1.3 to 175 billion parameters and people judged them. A run of this size shows "
    "whether the method does what the paper says it does; it says nothing about models of that size."
)


def write(run: Run, count: int = SHOWN) -> Path:
    """Write the report into `run.folder`, with its charts as SVG files for report.md. Returns the path of report.html.

    Args:
        count: prompts shown side by side in report.html.
    """
    metrics = run.metrics
    drawn = charts.every(metrics)
    found = sections.every(run, metrics, drawn)
    given = samples.read(run.evaluation.folder / SAMPLES, metrics, count) if metrics else []
    folder = run.folder
    write_charts(folder / "charts", {chart.name: chart.file for section in found for chart in section.charts})
    write_atomically(folder / "report.md", markdown.render(run, metrics, found, given))
    write_atomically(folder / "report.html", html(run, metrics, found, given))
    return folder / "report.html"


def write_charts(folder: Path, drawn: Mapping[str, str]) -> None:
    """Each chart's SVG as a file, and no other that was there. Another process may be doing the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, svg in drawn.items():
        write_atomically(folder / f"{name}.svg", svg + "\n")
    for path in folder.glob("*.svg"):
        if path.stem not in drawn:
            path.unlink(missing_ok=True)


def html(run: Run, metrics: Mapping[str, Any], found: Sequence[sections.Section], given: list[dict]) -> str:
    """The page."""
    for sample in given:
        names = [(answer["name"], answer["verdict"]) for answer in sample["answers"]]
        sample["verdicts"] = [f"{name} {verdict}" for name, verdict in names if verdict]
    return page.render(
        "report.html",
        {
            "title": f"{run.name}: what alignment bought, and what it cost",
            "introduction": introduction(run, metrics),
            "tiles": tiles(metrics),
            "missing": [
                {"stage": part.stage, "state": sections.state(part), "command": part.command} for part in run.missing
            ],
            "sections": found,
            "samples": given,
            "cases": sorted({sample["category"] for sample in given} - {""}),
            "verdicts": sorted({verdict for sample in given for verdict in sample["verdicts"]}),
            "no_samples": sections.NEEDS_EVAL if not metrics else "This evaluation left no samples.",
            "making": [f"Seed {run.recipe.get('seed')}. All models answer with the same random numbers.", SCALE],
            "stages": sections.stages(run),
            "versions": sections.versions(run),
            "unmeasured": sections.unmeasured(metrics),
            "recipe": yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True),
        },
    )


def introduction(run: Run, metrics: Mapping[str, Any]) -> list[str]:
    """Which run this is, and who judged."""
    base = run.recipe.get("model", {}).get("path") or "made by pretrain"
    texts = [f"Recipe `{run.name}`, seed {run.recipe.get('seed')}, base model `{base}`."]
    if "judge_description" in metrics:
        texts.append(
            f"{metrics['prompts']} held-out prompts, none of which trained any model. "
            f"The judge is {metrics['judge_description']}."
        )
    return texts


def tiles(metrics: Mapping[str, Any]) -> list[dict[str, str]]:
    """The numbers that people look for first."""
    found = []
    for name, model in metrics.get("models", {}).items():
        if model.get("win_rate") and name != BASELINE:
            mean, interval = shares(model["win_rate"]).split(" ", 1)
            found.append({"name": f"{model['name']} against SFT", "value": mean, "note": interval})
    checked = metrics.get("claims") or []
    if checked:
        held = sum(one["verdict"] == "holds" for one in checked)
        found.append({"name": "claims that hold", "value": f"{held} of {len(checked)}", "note": "of the paper's"})
    return found
