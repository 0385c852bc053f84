"""From what was typed to finished jobs: one recipe and its plan, or every combination of a sweep."""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from instructrl import overlay, printout, references
from instructrl.artifacts import Artifact, Store
from instructrl.display import open_display
from instructrl.errors import StageFailed, UserError
from instructrl.graph import Place, graph, located
from instructrl.key import sentence
from instructrl.keys import closest, did_you_mean
from instructrl.launch import check_libraries, check_processes, check_rollouts, check_tracker, check_trainers
from instructrl.pipeline import LAST, NAMES, ordered, stages
from instructrl.plan import StagePlan, make_plan
from instructrl.points import compose_points
from instructrl.recipe import Composition, compose_recipe
from instructrl.runner import Run
from instructrl.survey import Survey

WITHOUT = {  # why a recipe can lack a stage
    "pretrain": "it starts from the model that model.path names; model.path=null makes one from scratch",
    "label": "it brings its own rankings; only those of data.world are made here",
    "judge": "only eval.judge=reward_model trains one",
    "ppo_init": "its policies start from sft; ppo.init=ppo_init or ppo_ptx.init=ppo_init trains one",
}


@dataclass(frozen=True)
class Job:
    """One recipe with its plan."""

    arguments: list[str]
    composition: Composition
    target: str
    plan: list[StagePlan]
    store: Store
    force: Sequence[str] = ()

    @property
    def runs(self) -> bool:
        """Whether anything is left to do."""
        return any(step.runs for step in self.plan)


def stage_name(text: str, pipeline: Sequence[str] = NAMES) -> str:
    """The stage that was meant: `reward-model` is `reward_model`.

    Raises:
        UserError: there is none of that name.
    """
    name = text.replace("-", "_")
    if name not in NAMES:
        close = closest(name, pipeline)
        raise UserError(
            f"There is no stage {text!r}.{did_you_mean([close] if close else [])} The stages: {', '.join(pipeline)}."
        )
    if name not in pipeline:
        raise UserError(f"This recipe has no stage {name}: {WITHOUT[name]}.")
    return name


def make_jobs(target: str | None, arguments: list[str], force: Sequence[str], multirun: bool) -> list[Job]:
    """Every recipe that was asked for, composed, checked and planned. `target` None is the recipe's last stage."""
    composed = compose_points(arguments) if multirun else [(arguments, compose_recipe(arguments))]
    surveys: dict[Path, Survey] = {}
    return [job(target, point, force, composition, surveys) for point, composition in composed]


def job(
    target: str | None,
    arguments: list[str],
    force: Sequence[str],
    composition: Composition,
    surveys: dict[Path, Survey],
) -> Job:
    """One composed recipe, checked and planned.

    Args:
        surveys: output folder -> what other recipes of the sweep have read of it.
    """
    made = plan_job(target, arguments, force, composition, surveys)
    if any(step.runs and step.stage.name == "data" for step in made.plan):
        try:
            surveys[made.store.root].check_sources(composition.recipe)
        except UserError as error:
            raise UserError(sentence(f"{composition.where_named(str(error))}{error}")) from None
    return made


def plan_job(
    target: str | None,
    arguments: list[str],
    force: Sequence[str],
    composition: Composition,
    surveys: dict[Path, Survey],
) -> Job:
    """One composed recipe, planned. Whether its sources can be read is not asked: nothing is about to run."""
    recipe = composition.recipe
    pipeline = stages(recipe)
    target = stage_name(target or LAST, list(pipeline))
    forced = [stage_name(name, list(pipeline)) for name in force]
    needed = [stage.name for stage in ordered(pipeline, [target])]
    for name in forced:
        if name not in needed:
            raise UserError(f"--force {name}: {target} does not need it; it needs {', '.join(needed)}.")
    store = Store(Path(recipe.runtime.output_dir).expanduser())
    if store.root not in surveys:
        surveys[store.root] = Survey(store.root)
    plan = make_plan(pipeline, recipe, [target], surveys[store.root], forced, composition.where)
    return Job(arguments, composition, target, plan, store, force)


def check_alone(job: Job, fingerprint: str) -> None:
    """See that the job's target is what it was, and that nothing else would run.

    Args:
        fingerprint: the target's, when it was planned before.

    Raises:
        UserError: it is another by now, or what it is made from is not there.
    """
    [step] = [step for step in job.plan if step.stage.name == job.target]
    if step.fingerprint != fingerprint:
        raise UserError(
            f"--only {fingerprint}: {job.target} would be {step.fingerprint} now. A file that the recipe names has "
            "changed since, or a package."
        )
    missing = [f"{other.stage.name} ({', '.join(other.why)})" for other in job.plan if other.runs and other != step]
    if missing:
        raise UserError(f"--only {fingerprint}: {job.target} needs what would have to run first: {', '.join(missing)}.")


def check(planned: Sequence[Job]) -> None:
    """Find what is missing or refused before anything runs.

    Raises:
        UserError: a package, an endpoint, or a trainer's setting.
    """
    for one in planned:
        if one.runs:
            check_tracker(one.composition.recipe)
        check_processes(one.plan, one.composition.recipe)
        check_libraries(one.plan, one.composition.recipe)
        check_rollouts(one.plan, one.composition.recipe)
        check_trainers(one.plan, one.composition.recipe)


def run(planned: list[Job], command: list[str], noted: bool = False) -> None:
    """Run the jobs, `runtime.jobs` stages at a time; in a sweep a failed one does not keep the rest from running.

    Args:
        noted: this is a part of a run whose references have been noted, all of them.

    Raises:
        UserError: what went wrong.
    """
    began = time.time()
    check(planned)
    if not noted:
        note_references(planned)
    nodes, sweep = graph(planned), len(planned) > 1
    printout.show_work(planned, nodes)
    runtime = planned[0].composition.recipe.runtime
    limit = int(runtime.memory_gb * 1e9) if runtime.memory_gb else None
    work = Run(nodes, open_display(), command, began, runtime.jobs, limit, sweep)
    try:
        work.run()
    finally:
        remember(planned, work.artifacts)
    work.conclude()
    made = [{name: work.artifacts[at] for name, at in located(one) if at in work.artifacts} for one in planned]
    if not sweep:
        printout.show_result(planned[0], made[0])
        return
    pairs = list(zip(planned, made, strict=True))
    failures = [one for one, artifacts in pairs if one.target not in artifacts]
    finished = [(one, artifacts) for one, artifacts in pairs if one.target in artifacts]
    printout.show_sweep(finished, failures)
    try:
        printout.show_figure(overlay.draw([(one, artifacts[one.target]) for one, artifacts in finished]))
    except (StageFailed, OSError) as error:
        print(f"Warning: {error}")
    if failures:
        raise StageFailed(f"{len(failures)} of {len(planned)} jobs failed; the same command goes on with them.")


def remember(planned: Sequence[Job], artifacts: Mapping[Place, Artifact]) -> None:
    """Note what the jobs' stages are now, the last job's for last."""
    with suppress(OSError):  # it is of use to the next plan only
        for one in planned:
            places = dict(located(one))
            keys = {step.stage.name: step.key for step in one.plan if places[step.stage.name] in artifacts}
            one.store.remember(one.composition.recipe.name, keys)


def note_references(planned: Sequence[Job]) -> None:
    """Note what these runs refer to, so that `clean` keeps it."""
    runs: dict[tuple[Path, str], list[tuple[str, str]]] = {}
    for one in planned:
        places = runs.setdefault((one.store.root, one.composition.recipe.name), [])
        places += [(step.stage.name, step.fingerprint) for step in one.plan]
    for (root, recipe), places in runs.items():
        with suppress(OSError):  # a folder that cannot be written is named by what must write into it
            references.note(Store(root), recipe, places)
