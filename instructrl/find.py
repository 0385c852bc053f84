"""Finds the artifact that a person means: a stage of a recipe, a fingerprint or the beginning of one, or a folder."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instructrl.artifacts import LOG, MANIFEST, Store
from instructrl.errors import UserError
from instructrl.jobs import Job, make_jobs, stage_name
from instructrl.pipeline import NAMES

NAME = re.compile(r"(?:(?P<stage>[a-z_-]+)/)?(?P<print>[0-9a-f]{4,12})")


@dataclass(frozen=True)
class Place:
    """Where an artifact is, or will be."""

    stage: str
    path: Path

    @property
    def partial(self) -> Path:
        """Where it is being made."""
        return self.path.with_suffix(".partial")

    @property
    def log(self) -> Path | None:
        """The log of the attempt that is running, else of the last one."""
        return next((path / LOG for path in (self.partial, self.path) if (path / LOG).is_file()), None)

    @property
    def made(self) -> bool:
        """Whether it is there."""
        return (self.path / MANIFEST).is_file()


def split(words: list[str] | None) -> tuple[str | None, list[str]]:
    """`["sft", "recipe=tiny"]` -> what is meant, and the overrides."""
    words = words or []
    return (words[0], words[1:]) if words and "=" not in words[0] else (None, words)


def find(text: str, overrides: list[str]) -> Place:
    """The artifact that is meant.

    Raises:
        UserError: there is none, or several.
    """
    folder = Path(text)
    if folder.parent.name in NAMES and folder.is_dir():
        return Place(folder.parent.name, folder.with_suffix(""))
    name = NAME.fullmatch(text)
    if not name:
        return stage_of(text, overrides)
    store = store_of(overrides)
    found = sorted(set(beginning(store, name["stage"] and stage_name(name["stage"]), name["print"])), key=str)
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{one.stage}/{one.path.name}" for one in found)
        raise UserError(f"{text} can be {several}; write more of it.")
    raise UserError(f"There is no artifact {text} in {store.root}; `instructrl runs` lists those there are.")


def stage_of(text: str, overrides: list[str]) -> Place:
    """The recipe's artifact of a stage."""
    [job] = make_jobs(stage_name(text), overrides, [], multirun=False)
    return places(job)[-1]


def places(job: Job) -> list[Place]:
    """Where the recipe's artifacts are, or will be."""
    return [Place(step.stage.name, job.store.path(step.stage.name, step.key)) for step in job.plan]


def beginning(store: Store, stage: str | None, text: str) -> Iterator[Place]:
    """The artifacts whose fingerprints begin with the text."""
    for name in (stage,) if stage else NAMES:
        for path in (store.root / name).glob(f"{text}*"):
            if path.is_dir() and path.suffix in ("", ".partial"):
                yield Place(name, path.with_suffix(""))


def store_of(overrides: list[str] | None) -> Store:
    """The store that the recipe writes to."""
    from instructrl.recipe import load_recipe

    return Store(Path(load_recipe(overrides or []).runtime.output_dir).expanduser())
