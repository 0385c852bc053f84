"""Samples and win rates of the five models, and what alignment cost: `metrics.json`, `report.md`, `samples.parquet`.

GPT is the base model, GPT (prompted) the same behind a few-shot prefix; then SFT, PPO and PPO-ptx. All answer the same
held-out prompts with the same random numbers. What a model has done is kept in `checkpoints/`, so that an evaluation
that was interrupted goes on with the next model.
"""

import json
from pathlib import Path

from instructrl.config import Recipe
from instructrl.progress import Progress
from instructrl.stages import models, report
from instructrl.stages.judging import NAMES
from instructrl.stages.numbers import measure
from instructrl.stages.parallel import forked
from instructrl.stages.scores import SAMPLES, Scores
from instructrl.stages.study import Study
from instructrl.stages.tables import write_table


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Evaluate the five models. Writes `samples.parquet`, `metrics.json` and `report.md`; returns the main numbers."""
    progress, steps = Progress(folder), len(NAMES) + 2
    study = Study(recipe, inputs, folder)

    def ask(model: str) -> None:
        study.ask(model)
        progress.update(study.asked(), steps)

    progress.update(study.asked(), steps)
    forked(ask, NAMES, recipe.runtime.jobs, models.device(recipe))
    for model in NAMES:
        study.read(model)
    progress.update(steps - 2, steps)
    scores = Scores(study)
    progress.update(steps - 1, steps)
    metrics = measure(study, scores)
    write_table(folder / "samples.parquet", scores.rows(), SAMPLES)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report.markdown(metrics, report.shown(study, scores)), encoding="utf-8")
    progress.update(steps, steps)
    return report.headline(metrics)
