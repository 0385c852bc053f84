"""A run, as its artifacts tell of it: what was made, what is missing, and why."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructrl import jobs
from instructrl.artifacts import MANIFEST, ORDER, Artifact, Store, read_json
from instructrl.errors import UserError
from instructrl.find import find as find_artifact
from instructrl.pipeline import LAST, NAMES
from instructrl.recipe import DEFAULT_RECIPE, compose_recipe
from instructrl.recipe_files import is_recipe

METRICS, SAMPLES, STEPS = "metrics.json", "samples.parquet", "log.jsonl"
PREFIX = re.compile(r"[0-9a-f]{4,12}")  # of a fingerprint


@dataclass(frozen=True)
class Part:
    """One stage of a run."""

    stage: str
    fingerprint: str
    folder: Path
    artifact: Artifact | None
    why: str = ""  # it is not there, or out of date
    command: str = ""  # that makes it; empty where the recipe is not known

    @property
    def log(self) -> Path | None:
        """What its trainer logged; of a stage that was interrupted, as far as it got."""
        places = (self.folder, self.folder.with_suffix(".partial"))
        return next((place / STEPS for place in places if (place / STEPS).is_file()), None)

    @property
    def begun(self) -> bool:
        """Whether it is being made, or was interrupted."""
        return self.artifact is None and self.folder.with_suffix(".partial").is_dir()


@dataclass(frozen=True)
class Run:
    """A recipe's stages, upstream first, and where their artifacts are."""

    name: str
    root: Path
    recipe: dict[str, Any]
    parts: dict[str, Part]

    @property
    def evaluation(self) -> Part:
        """The last stage."""
        return self.parts[LAST]

    @property
    def metrics(self) -> dict[str, Any]:
        """What eval measured; {} where it was not made."""
        artifact = self.evaluation.artifact
        return read_json(artifact.path / METRICS) if artifact else {}

    @property
    def missing(self) -> list[Part]:
        """The stages without an artifact."""
        return [part for part in self.parts.values() if part.artifact is None]

    @property
    def title(self) -> str:
        """`tiny 0f11b4cc0289`"""
        return f"{self.name} {self.evaluation.fingerprint}"

    @property
    def folder(self) -> Path:
        """Where its report belongs: not into an artifact, whose files never change."""
        return folder_of(self.root, self.name, self.evaluation.fingerprint)

    def settings(self) -> dict[str, Any]:
        """The recipe's sections as the stages that are there read them, files by their content. `runtime` is in none.

        A section that several stages read is that of the last.
        """
        found: dict[str, Any] = {}
        for part in self.parts.values():
            if part.artifact:
                found |= part.artifact.key["config"]
        return found


def folder_of(root: Path, name: str, fingerprint: str) -> Path:
    """Where the report of the recipe `name` belongs, whose eval has this fingerprint."""
    return root / "reports" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{fingerprint}"


def of_job(job: jobs.Job) -> Run:
    """The run of a recipe that was planned."""
    recipe, parts = job.composition.recipe, {}
    for step in job.plan:
        name, folder = step.stage.name, job.store.path(step.stage.name, step.key)
        command = shlex.join(["instructrl", name.replace("_", "-"), *job.arguments])
        parts[name] = Part(name, step.fingerprint, folder, step.artifact, ", ".join(step.why), command)
    return Run(recipe.name, job.store.root, recipe.model_dump(mode="json"), parts)


def of_recipe(arguments: list[str]) -> Run:
    """The run of a recipe, as far as it was made."""
    return of_job(jobs.plan_job(None, arguments, (), compose_recipe(arguments), {}))


def read(folder: Path) -> tuple[Artifact | None, str]:
    """The artifact in the folder, or why it is none. Its files may be gone: a report needs no weights."""
    try:
        artifact = Artifact.read(folder)
    except ValueError:
        return None, f"its {MANIFEST} was changed, or written by another version"
    return artifact, "" if artifact else "its artifact is gone"


def of_folder(folder: Path) -> Run:
    """The run that ended in this artifact of eval.

    Raises:
        UserError: it is another stage's, or none.
    """
    last, why = read(folder)
    if last is None:
        raise UserError(f"{folder} cannot be used: {why}. Make it again by its recipe.")
    if last.key["stage"] != LAST:
        raise UserError(f"{folder} is an artifact of {last.key['stage']}; name one of {LAST}, or the recipe.")
    root, found = folder.resolve().parent.parent, {LAST: Part(LAST, folder.resolve().name, folder, last)}
    waiting = [last]
    while waiting:
        for stage, fingerprint in waiting.pop().key["inputs"].items():
            place = Store(root).root / stage / fingerprint
            artifact, why = read(place)
            if stage not in found and artifact:
                waiting.append(artifact)
            found.setdefault(stage, Part(stage, fingerprint, place, artifact, why))
    recipe = read_json(folder / ORDER).get("recipe", {})
    return Run(str(recipe.get("name", "unnamed")), root, recipe, {name: found[name] for name in NAMES if name in found})


def one(words: Sequence[str]) -> tuple[str, list[str]]:
    """(the run that is named, the values): `["tiny", "seed=1"]` -> `("tiny", ["seed=1"])`. Without a name: the default.

    Raises:
        UserError: two runs are named.
    """
    named, values = split(words)
    if len(named) > 1:
        raise UserError(
            f"Only one run has a report at a time; you named {' and '.join(named)}. See instructrl compare."
        )
    return (named[0] if named else DEFAULT_RECIPE), values


def two(named: Sequence[str]) -> Sequence[str]:
    """The two runs that are compared.

    Raises:
        UserError: there are not two.
    """
    if len(named) != 2:
        said = f"{len(named)}: {', '.join(named)}" if named else "none"
        raise UserError(
            f"compare takes two runs; you named {said}. Values of one run go into its quotes: "
            'instructrl compare tiny "tiny seed=1".'
        )
    return named


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Runs and values: a value has an equals sign and no space, unless it is `recipe=NAME`."""
    values = [word for word in words if "=" in word and " " not in word and not word.startswith("recipe=")]
    return [word for word in words if word not in values], values


def find(words: str, overrides: Sequence[str] = ()) -> Run:
    """The run that somebody means.

    Args:
        words: a recipe's name or file, and values that replace its own ("tiny seed=1"); or the folder of an artifact of
            eval; or the first four digits or more of its fingerprint.
        overrides: values for a recipe; `runtime.output_dir` says where fingerprints are looked for.

    Raises:
        UserError: there is no such run, or there are several.
    """
    folder = Path(words).expanduser()
    if (folder / MANIFEST).is_file():
        return of_folder(folder)
    if PREFIX.fullmatch(words) and not is_recipe(words):
        return of_folder(find_artifact(f"{LAST}/{words}", list(overrides)).path)
    if folder.is_dir():
        raise UserError(f"{words} is a folder without {MANIFEST}; name the folder of an artifact of {LAST}.")
    recipe, *values = shlex.split(words) or [""]
    return of_recipe([recipe if recipe.startswith("recipe=") else f"recipe={recipe}", *values, *overrides])
