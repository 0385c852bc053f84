"""What the commands print: plans, artifacts, the five-model table, a sweep's summary."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from instructrl.artifacts import Artifact, read_json
from instructrl.config import Recipe
from instructrl.display import duration, is_number, number, printable
from instructrl.drift import drift
from instructrl.errors import UserError
from instructrl.estimate import memory_line
from instructrl.plan import StagePlan

if TYPE_CHECKING:
    from instructrl.graph import Node, Place
    from instructrl.jobs import Job

MOST_SHOWN = 20  # jobs of a sweep whose stages are listed before it runs


def recipe_as_yaml(recipe: Recipe) -> str:
    """The whole recipe, as a file that `recipe=FILE` takes."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def show_plans(planned: Sequence["Job"]) -> None:
    """The plan of each job."""
    for position, job in enumerate(planned):
        if len(planned) > 1:
            heading(job, position, len(planned))
        show_plan(job)
    memory = memory_line(job.composition.recipe for job in planned if job.runs)
    for line in [*([memory] if memory else []), *warnings(planned)]:
        print(line)


def warnings(planned: Sequence["Job"]) -> list[str]:
    """A line for each version that is no longer the one with which something was made that nothing makes again."""
    used = ((step.stage.name, step.artifact) for job in planned for step in job.plan if step.artifact and not step.runs)
    return [f"Warning: {line}. This makes nothing run again." for line in drift(used)]


def show_plan(job: "Job") -> None:
    """`run   sft   0f11b4cc0289  sft.learning_rate: 1e-05 -> 3e-05`, a line a stage."""
    width = max(len(step.stage.name) for step in job.plan)
    for step in job.plan:
        line = f"{verdict(step)}  {step.stage.name:<{width}}  {step.fingerprint}  {', '.join(step.why)}"
        estimate = f"  (about {duration(step.estimate.seconds)})" if step.estimate else ""
        print(f"{line.rstrip()}{estimate}")
    running = [step for step in job.plan if step.runs]
    if not running:
        print(done(job))
        return
    known = [step.estimate for step in running if step.estimate]
    by = "last time" if all(estimate.same_recipe for estimate in known) else "the run of a recipe like it"
    seconds = sum(estimate.seconds for estimate in known)
    estimate = f", about {duration(seconds)} by {by}" if len(known) == len(running) else ""
    print(f"{len(running)} of {len(job.plan)} stages to run{estimate}.", flush=True)


def show_work(planned: Sequence["Job"], nodes: "Mapping[Place, Node]") -> None:
    """What a run is about to do: the plan of one job; of a sweep, under each job what it is the first to need."""
    if len(planned) == 1:
        if planned[0].runs:
            show_plan(planned[0])
        return
    running = [node for node in nodes.values() if node.step.runs]
    for position, job in enumerate(planned[:MOST_SHOWN]):
        own = [node for node in running if node.wanted_by[0] == position]
        if own:
            heading(job, position, len(planned))
        for node in own:
            print(f"run   {node.step.stage.name:<12}  {node.step.fingerprint}  {', '.join(node.step.why)}".rstrip())
    if len(planned) > MOST_SHOWN:
        print(f"\nand {len(planned) - MOST_SHOWN} more; --dry-run shows all.")
    total = sum(len(job.plan) for job in planned)
    jobs = planned[0].composition.recipe.runtime.jobs
    side = f", up to {jobs} side by side" if jobs > 1 and len(running) > 1 else ""
    print(f"\n{len(planned)} jobs of {total} stages, {len(nodes)} of them different: {len(running)} to run{side}.")
    sys.stdout.flush()  # before what stages print


def verdict(step: StagePlan) -> str:
    """What the plan does about a stage, in four letters."""
    return "run " if step.runs else "done" if step.artifact else "skip"


def done(job: "Job") -> str:
    """The line of a plan that has nothing to run."""
    return f"Everything is done: recipe {job.composition.recipe.name}, artifacts in {job.store.root}."


def plans_as_json(planned: Sequence["Job"], multirun: bool) -> str:
    """An object with the stages of the plan; for a sweep a list of such objects."""
    objects = [
        {
            "recipe": job.composition.recipe.name,
            "arguments": job.arguments,
            "output_dir": str(job.store.root),
            "warnings": warnings([job]),
            "stages": [
                {
                    "stage": step.stage.name,
                    "verdict": verdict(step).strip(),
                    "fingerprint": step.fingerprint,
                    "path": str(job.store.path(step.stage.name, step.key)),
                    "why": list(step.why),
                    "estimate": step.estimate and asdict(step.estimate),
                    "needs": list(step.stage.needs),
                }
                for step in job.plan
            ],
        }
        for job in planned
    ]
    return json.dumps(objects if multirun else objects[0], indent=2)


def planned_stage(job: "Job", name: str) -> StagePlan:
    """The plan of a stage whose artifact exists.

    Raises:
        UserError: it was never made, or is gone.
    """
    [step] = [step for step in job.plan if step.stage.name == name]
    if step.artifact is None:
        command = " ".join(["instructrl", name.replace("_", "-"), *job.arguments])
        error = UserError(f"{name} is not made for this recipe ({', '.join(step.why)}). Make it with: {command}")
        error.exit_code = 1
        raise error
    return step


def artifact_as_json(job: "Job", name: str) -> str:
    """Everything known about a stage's artifact."""
    step = planned_stage(job, name)
    artifact = step.artifact
    assert artifact is not None
    facts = {
        "stage": name,
        "fingerprint": step.fingerprint,
        "path": str(artifact.path),
        "current": not step.runs,
        "why": list(step.why),
        "digest": artifact.digest,
        "metrics": artifact.metrics,
        "key": artifact.key,
        "inputs": {need: str(path) for need, path in upstream(job, step).items()},
        "outputs": artifact.outputs,
        "made": artifact.made,
    }
    return json.dumps(facts, indent=2)


def artifact_as_text(job: "Job", name: str) -> str:
    """Where a stage's artifact is, what it was made from, and its metrics."""
    step = planned_stage(job, name)
    artifact = step.artifact
    assert artifact is not None
    made = artifact.made
    size = sum(output["size"] for output in artifact.outputs.values())
    lines = [
        f"{name} {step.fingerprint}: {step.stage.makes}",
        f"path: {artifact.path}",
        f"made: {made.get('at')} in {duration(made.get('seconds', 0))} on {made.get('host')} ({size / 1e6:,.1f} MB)",
    ]
    if step.runs:
        lines.append(f"out of date: {', '.join(step.why)}")
    if step.stage.needs:
        lines.append("made from:")
        lines += [f"  {need}: {path}" for need, path in upstream(job, step).items()]
    lines.append("settings:")
    lines += [f"  {line}" for line in yaml.safe_dump(artifact.key["config"], sort_keys=False).splitlines()]
    lines.append("metrics:")
    lines += [f"  {line}" for line in flat(artifact.metrics)]
    return "\n".join(lines)


def upstream(job: "Job", step: StagePlan) -> dict[str, Any]:
    """The folders of the artifacts it was made from."""
    keys = {other.stage.name: other.key for other in job.plan}
    return {need: job.store.path(need, keys[need]) for need in step.stage.needs}


def flat(values: dict[str, Any], prefix: str = "") -> list[str]:
    """`["accuracy: 0.71", "interval.low: 0.68"]`; long lists by their length."""
    lines = []
    for name, value in values.items():
        if isinstance(value, dict):
            lines += flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and len(value) > 6:
            lines.append(f"{prefix}{name}: {len(value)} values")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            lines.append(f"{prefix}{name}: {text if len(text) <= 200 else text[:197] + '...'}")
    return lines


def show_result(job: "Job", artifacts: dict[str, Artifact]) -> None:
    """What a finished job made: for `eval` the five-model table, else the target's folder."""
    if not job.runs:
        print(done(job))
    artifact = artifacts.get(job.target)
    if artifact is None:
        return
    if job.target == "eval":
        metrics = read_json(artifact.path / "metrics.json")
        show_table(metrics.get("table"))
        show_table(metrics.get("use_case_table"))
        if (artifact.path / "report.md").exists():
            print(f"The report: {report_of(job, artifact)}")
    else:
        print(f"{job.target}: {artifact.path}")


def report_of(job: "Job", evaluation: Artifact) -> Path:
    """The page of a recipe that was evaluated; written unless it is there, and not older than that."""
    from instructrl.reporting import runs

    path = runs.folder_of(job.store.root, job.composition.recipe.name, evaluation.path.name) / "report.html"
    if path.exists() and path.stat().st_mtime >= evaluation.made.get("published", 0):
        return path
    from instructrl.reporting import document  # slow to import, and not needed where nothing was done

    return document.write(runs.of_recipe(job.arguments))


def show_table(table: object) -> None:
    """The table that eval left in its metrics: {"columns": [...], "rows": [[...], ...], "notes": [...]}."""
    if not isinstance(table, dict) or not table.get("columns"):
        return
    print_table(table["columns"], table.get("rows", []))
    for note in table.get("notes", []):
        print(note)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> None:
    """A table as wide as it needs to be where the output is no terminal, else as wide as the terminal.

    Args:
        left: how many columns are text; the others are numbers, and stand at the right.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        drawn.add_column(Text(str(column)), justify="left" if position < left else "right")
    for row in rows:
        drawn.add_row(*(Text(number(cell) if is_number(cell) else printable(str(cell))) for cell in row))
    if not console.is_terminal:
        console.width = max(80, console.measure(drawn, options=console.options.update(width=1000)).maximum)
    console.print(drawn)


def heading(job: "Job", position: int, total: int) -> None:
    """The line above a job of a sweep."""
    print(f"\n[{position + 1}/{total}] {' '.join(job.arguments)}", flush=True)


def show_sweep(finished: Sequence[tuple["Job", dict[str, Artifact]]], failed_jobs: Sequence["Job"]) -> None:
    """A row a job: what was swept, and the target's first numbers."""
    every = [job for job, _ in finished] + list(failed_jobs)
    constant = set.intersection(*(set(job.arguments) for job in every))
    metrics = [{n: v for n, v in made[job.target].metrics.items() if is_number(v)} for job, made in finished]
    names = list(dict.fromkeys(name for values in metrics for name in values))[:6]
    rows = [
        [swept(job, constant), "done", *(values.get(name, "") for name in names)]
        for (job, _), values in zip(finished, metrics, strict=True)
    ]
    rows += [[swept(job, constant), "failed", *("" for _ in names)] for job in failed_jobs]
    print()
    print_table(["job", every[0].target, *names], rows)


def show_figure(path: Path | None) -> None:
    """Where a sweep's figure is."""
    if path:
        print(f"The figure: {path} (and .svg; its numbers: {path.with_suffix('.json').name})")


def swept(job: "Job", constant: set[str]) -> str:
    """The arguments that make this job differ from the others."""
    return " ".join(argument for argument in job.arguments if argument not in constant)
