"""Samples and win rates of the five models, and what alignment cost: `metrics.json`, `report.md`, `samples.parquet`.

GPT is the base model, GPT (prompted) the same behind a few-shot prefix; then SFT, PPO and PPO-ptx. A recipe may ask for
one more baseline, the best of several of SFT's answers. All answer the same held-out prompts with the same random
numbers. What a model has done is kept in `checkpoints/`, so that an evaluation that was interrupted goes on with the
next model, and with the next public task of a model. So are PPO's snapshots (`trajectory.py`). Several processes share
the models; what is said of the answers is one's work.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from instructrl.config import Recipe
from instructrl.progress import Progress
from instructrl.stages import models, ranks, report, tax, trajectory
from instructrl.stages.judging import BEST
from instructrl.stages.numbers import measure
from instructrl.stages.parallel import forked
from instructrl.stages.scores import SAMPLES, Scores
from instructrl.stages.study import Study
from instructrl.stages.tables import write_table

if TYPE_CHECKING:
    from instructrl.stages.harness import Harness


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    """Evaluate the models. Writes `samples.parquet`, `metrics.json` and `report.md`; returns the main numbers."""
    study = Study(recipe, inputs, folder)
    harness, where = public_tasks(study), models.device(recipe)
    snapshots = trajectory.pieces(study)
    progress, steps = Progress(folder), len(study.names) + len(snapshots) + 2 + (len(harness) if harness else 0)

    def done() -> int:
        return study.asked() + (harness.done() if harness else 0)

    def ask(piece: str) -> None:
        if piece in snapshots:
            trajectory.ask(study, piece, snapshots[piece])
        else:
            study.ask(piece)
        tell(done())

    def tell(step: int) -> None:
        if ranks.rank() == 0:
            progress.update(step, steps)

    tell(done())
    longest_first = [*sorted(study.names, key=lambda name: name != BEST), *snapshots]
    forked(ask, ranks.share(longest_first), recipe.runtime.jobs, where)
    ranks.meet(where)
    for model in study.names:
        study.read(model)
    if harness:
        forked(
            lambda model: harness.ask(model, lambda: tell(done())),
            ranks.share(harness.names),
            recipe.runtime.jobs,
            where,
        )
        ranks.meet(where)
    if ranks.rank() != 0:
        return {}
    progress.update(steps - 2, steps)
    scores = Scores(study)
    progress.update(steps - 1, steps)
    metrics = measure(study, scores)
    if harness:
        metrics["harness"] = tax.measured(harness.read())
        metrics["versions"]["lm_eval"] = version("lm_eval")
    write_table(folder / "samples.parquet", scores.rows(), SAMPLES)
    study.contract.save(folder, tokenizer=False)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(report.markdown(metrics, report.shown(study, scores)), encoding="utf-8")
    progress.update(steps, steps)
    return report.headline(metrics)


def public_tasks(study: Study) -> "Harness | None":
    """The tasks of `eval.tasks`; lm-evaluation-harness, an extra, is only imported where there are some."""
    if not study.recipe.eval.tasks:
        return None
    from instructrl.stages.harness import Harness

    return Harness(study)
