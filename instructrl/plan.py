"""The plan: which stages a recipe still has to run, and why. Nothing here starts or downloads anything."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructrl.artifacts import CHECKPOINTS, ORDER, RESULT, Artifact, Store, read_json
from instructrl.config import Recipe
from instructrl.key import Where, fingerprint, stage_key
from instructrl.pipeline import Stage, downstream, ordered
from instructrl.survey import Estimate, Survey

ABSENT = object()
NEVER, GONE, FORCED = "never ran", "its artifact is gone", "forced"
OWN = {NEVER, GONE, FORCED}  # what is true of one stage only, whatever is true of those above it


@dataclass(frozen=True)
class StagePlan:
    """What is to be done about one stage."""

    stage: Stage
    key: dict[str, Any]
    artifact: Artifact | None
    runs: bool
    forced: bool  # asked for with --force, or downstream of one that was: runs even where the artifact is good
    why: tuple[str, ...]  # the root causes, for a person
    estimate: Estimate | None = None  # how long it took before

    @property
    def fingerprint(self) -> str:
        """The name of the artifact's folder."""
        return fingerprint(self.key)


@dataclass(frozen=True)
class Facts:
    """What the plan of every stage is derived from."""

    keys: dict[str, dict[str, Any]]
    artifacts: dict[str, Artifact | None]
    latest: dict[str, dict[str, Any]]  # the keys that this recipe used last
    asked: Collection[str]  # the stages named by --force
    forced: set[str]
    runs: set[str]
    damage: dict[str, str]  # what became of artifacts that are none any more: "model/config.json was changed"

    def rebuilt(self, stage: Stage) -> list[str]:
        """Upstream stages that were run again, with the same key, after this artifact was built from them."""
        mine = self.artifacts[stage.name]
        theirs = {need: self.artifacts[need] for need in stage.needs}
        return [need for need, other in theirs.items() if mine and other and mine.inputs.get(need) != other.digest]

    def stale(self, stage: Stage) -> bool:
        """Whether the stage must run if anything needs it."""
        return (
            self.artifacts[stage.name] is None or bool(self.rebuilt(stage)) or bool(self.runs.intersection(stage.needs))
        )


def make_plan(
    pipeline: Mapping[str, Stage],
    recipe: Recipe,
    targets: Iterable[str],
    store: Store,
    force: Collection[str] = (),
    where: Where = lambda _: "",
) -> list[StagePlan]:
    """What must run so that the targets exist, upstream first.

    Args:
        force: stages that run again, with everything downstream of them.
        where: file and line of a key of the recipe, for errors.

    Raises:
        UserError: a local file or folder that the recipe names is not there, or an artifact is damaged.
    """
    pipeline, targets = dict(pipeline), set(targets)
    stages = ordered(pipeline, targets)
    survey = store if isinstance(store, Survey) else Survey(store.root)
    contents = survey.local_contents(recipe, {section for stage in stages for section in stage.reads}, where)
    keys: dict[str, dict[str, Any]] = {}
    for stage in stages:
        keys[stage.name] = stage_key(stage, recipe, keys, contents)
    found = {stage.name: survey.look(stage.name, keys[stage.name]) for stage in stages}
    survey.hashes.save()
    artifacts = {name: artifact for name, (artifact, _) in found.items()}
    damage = {name: what for name, (_, what) in found.items() if what}
    forced = downstream(pipeline, force) & keys.keys() if force else set()
    facts = Facts(keys, artifacts, survey.latest(recipe.name), set(force), forced, set(forced), damage)
    while True:  # grows until nothing changes: at most one pass per stage
        needed = targets | {need for stage in stages if stage.name in facts.runs for need in stage.needs}
        more = {stage.name for stage in stages if stage.name in needed and facts.stale(stage)} - facts.runs
        if not more:
            break
        facts.runs.update(more)
    return list(explained(stages, facts, survey, recipe.name))


def explained(stages: Iterable[Stage], facts: Facts, survey: Survey, recipe: str) -> Iterator[StagePlan]:
    """Each stage's plan with its reasons; a change that a stage shares with one above it is told there only."""
    told: dict[str, list[str]] = {}  # stage -> its own reasons
    roots: dict[str, list[str]] = {}  # stage -> the stages above it, or itself, that have reasons of their own
    for stage in stages:
        name = stage.name
        above = list(dict.fromkeys(root for need in stage.needs for root in roots[need]))
        why: list[str] = []
        if name in facts.runs:
            known = {reason for root in above for reason in told[root]}
            told[name] = [reason for reason in reasons(stage, facts) if reason not in known - OWN]
            why = list(told[name])
            if above and why != [NEVER]:
                why.append(f"downstream of {' and '.join(above)}")
            why += resumption(stage, facts, survey)
        elif facts.artifacts[name] is None:
            why = [f"{facts.damage.get(name, GONE)}, and nothing that runs needs it"]
        roots[name] = ([name] if told.get(name) else above) if name in facts.runs else []
        estimate = survey.estimate(recipe, name, facts.keys[name]) if name in facts.runs else None
        runs, forced = name in facts.runs, name in facts.forced
        yield StagePlan(stage, facts.keys[name], facts.artifacts[name], runs, forced, tuple(why), estimate)


def reasons(stage: Stage, facts: Facts) -> list[str]:
    """Why the stage itself has to run; nothing if only because one above it does."""
    name = stage.name
    if name in facts.asked:
        return [FORCED]
    if facts.artifacts[name]:
        return [f"{need} was built again" for need in facts.rebuilt(stage) if need not in facts.runs]
    if name in facts.damage:
        return [facts.damage[name]]
    before, after = facts.latest.get(name), facts.keys[name]
    if before is None:
        return [NEVER]
    if before == after:
        return [GONE]
    inputs = {need: (before.get("inputs", {}).get(need), now) for need, now in after["inputs"].items()}
    different = [need for need, (old, new) in inputs.items() if old != new and need not in facts.runs]
    return changes(without_inputs(before), without_inputs(after)) + [f"{need} changed" for need in different]


def resumption(stage: Stage, facts: Facts, survey: Survey) -> list[str]:
    """`["resumes from step 40"]` if an interrupted run left a checkpoint that this run will go on from."""
    key = facts.keys[stage.name]
    if f"{fingerprint(key)}.partial" not in survey.names(stage.name):
        return []
    partial = survey.partial(stage.name, key)
    inputs = {need: artifact for need in stage.needs if (artifact := facts.artifacts[need])}
    order, forced = read_json(partial / ORDER), stage.name in facts.forced
    if facts.runs.intersection(stage.needs) or not continues(order, inputs, forced):
        return []
    if (partial / RESULT).exists():
        return ["finished, to be published"]
    steps = checkpoint_steps(partial)
    return [f"resumes from step {max(steps)}"] if steps else []


def continues(order: dict[str, Any], inputs: Mapping[str, Artifact], forced: bool) -> bool:
    """Whether a run may go on from what this order left: if it began from the same inputs, none of which has been found
    damaged and made again since; and a forced run only from what a forced run began."""
    return order.items() >= origin(inputs).items() and (not forced or bool(order.get("forced")))


def origin(inputs: Mapping[str, Artifact]) -> dict[str, Any]:
    """What an order says of the artifacts that the stage begins from."""
    return {
        "digests": {need: artifact.digest for need, artifact in inputs.items()},
        "mended": {need: artifact.made["published"] for need, artifact in inputs.items() if "mended" in artifact.made},
    }


def checkpoint_steps(partial: Path) -> list[int]:
    """The steps of the complete checkpoints in a stage's folder."""
    marks = (partial / CHECKPOINTS).glob("checkpoint-*/COMPLETE")
    names = [mark.parent.name.removeprefix("checkpoint-") for mark in marks]
    return [int(name) for name in names if name.isdigit()]


def without_inputs(key: dict[str, Any]) -> dict[str, Any]:
    """What the stage itself reads: upstream changes are told upstream."""
    return {name: value for name, value in key.items() if name not in ("inputs", "stage")}


def changes(before: object, after: object, path: str = "") -> list[str]:
    """`["sft.learning_rate: 1e-05 -> 3e-05"]`: every value in which two keys differ."""
    if before == after:
        return []
    if isinstance(before, dict) and isinstance(after, dict):
        pairs = [(f".{name}", before.get(name, ABSENT), after.get(name, ABSENT)) for name in before | after]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = [(f"[{i}]", old, new) for i, (old, new) in enumerate(zip(before, after, strict=True))]
    else:
        name = path.removeprefix(".config").removeprefix(".packages").removeprefix(".")
        name = "the stage's version" if name == "version" else name
        if is_content(before) and is_content(after):
            return [f"{name}: its content changed"]
        return [f"{name}: {brief(before)} -> {brief(after)}"]
    return [change for name, old, new in pairs for change in changes(old, new, path + name)]


def is_content(value: object) -> bool:
    """Whether the value stands for a file by its content."""
    return isinstance(value, str) and value.startswith("sha256:")


def brief(value: object) -> str:
    """A value on a third of a line."""
    if value is ABSENT:
        return "(absent)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if is_content(value):
        return f"a file ({str(value)[:19]})"
    text = value if isinstance(value, str) and value.isprintable() and value else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
