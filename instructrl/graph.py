"""The stages of one job, or of all jobs of a sweep, as one graph: what has one fingerprint is made once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from instructrl.artifacts import Store
from instructrl.config import Recipe
from instructrl.plan import StagePlan

if TYPE_CHECKING:
    from instructrl.jobs import Job

Place = tuple[Path, str, str]
"""Where an artifact is: output folder, stage, fingerprint."""


@dataclass(frozen=True)
class Node:
    """A stage to be made or made already, for one job or for several."""

    place: Place
    step: StagePlan
    recipe: Recipe
    store: Store
    label: str  # what it is called while it runs: `ppo`, or in a sweep `ppo [2/6]`, after the first job that needs it
    needs: dict[str, Place]  # stage -> where its artifact is
    wanted_by: list[int] = field(default_factory=list)  # the numbers of its jobs, from 0


def graph(planned: Sequence["Job"]) -> dict[Place, Node]:
    """Every stage of the jobs, each once: the first job's first, upstream before downstream."""
    nodes: dict[Place, Node] = {}
    for number, job in enumerate(planned):
        places = dict(located(job))
        for step in job.plan:
            place = places[step.stage.name]
            if place not in nodes:
                label = f"{step.stage.name} [{number + 1}/{len(planned)}]" if len(planned) > 1 else step.stage.name
                needs = {need: places[need] for need in step.stage.needs}
                nodes[place] = Node(place, step, job.composition.recipe, job.store, label, needs)
            nodes[place].wanted_by.append(number)
    return nodes


def located(job: "Job") -> Iterator[tuple[str, Place]]:
    """Each stage of a job with its place."""
    for step in job.plan:
        yield step.stage.name, (job.store.root, step.stage.name, step.fingerprint)
