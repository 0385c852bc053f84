"""A plan as a Mermaid flowchart, which GitHub, GitLab and notebooks draw: https://mermaid.js.org/syntax/flowchart.html."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from instructrl.display import duration, printable

if TYPE_CHECKING:
    from instructrl.jobs import Job
    from instructrl.plan import StagePlan

COLOURS = {  # verdict -> what both a light and a dark page show well
    "run": "fill:#fff3cd,stroke:#b58105,color:#3d2c00",
    "done": "fill:#d9f2e0,stroke:#2e7d4f,color:#0f3320",
    "skip": "fill:#e9ecef,stroke:#868e96,color:#343a40,stroke-dasharray:4 3",
}


def flowchart(planned: Iterable["Job"]) -> str:
    """One chart of all jobs: a node an artifact, so that jobs of a sweep meet in the stages that they share.

    Of what a stage is made from, it shows what nothing else that it is made from is made from in turn.
    """
    nodes: dict[str, str] = {}
    edges: dict[str, None] = {}
    for job in planned:
        upstream: dict[str, set[str]] = {}
        steps = {step.stage.name: step for step in job.plan}
        for step in job.plan:
            line = f'  {node(step)}["{label(step)}"]:::{verdict(step)}'
            if nodes.get(node(step), ":::skip").endswith(":::skip"):  # one job may need what another can leave out
                nodes[node(step)] = line
            above = {name for need in step.stage.needs for name in upstream[need]}
            upstream[step.stage.name] = above.union(step.stage.needs)
            direct = [need for need in step.stage.needs if need not in above]
            edges |= dict.fromkeys(f"  {node(steps[need])} --> {node(step)}" for need in direct)
    classes = [f"  classDef {name} {style}" for name, style in COLOURS.items()]
    return "\n".join(["flowchart TD", *nodes.values(), *edges, *classes])


def node(step: "StagePlan") -> str:
    """The name of an artifact's node."""
    return f"{step.stage.name}_{step.fingerprint}"


def verdict(step: "StagePlan") -> str:
    """What the plan does about the stage: run, done or skip."""
    return "run" if step.runs else "done" if step.artifact else "skip"


def label(step: "StagePlan") -> str:
    """The stage, its fingerprint, why it runs and how long it takes."""
    lines = [f"<b>{step.stage.name}</b>", step.fingerprint, *(escaped(reason) for reason in step.why)]
    if step.estimate:
        lines.append(f"about {duration(step.estimate.seconds)}")
    return "<br>".join(lines)


def escaped(text: str) -> str:
    """Text that Mermaid reads neither as markup nor as the end of a label."""
    marks = {letter: f"#{ord(letter)};" for letter in '"#&;<>[]`{|}\\'}
    return "".join(marks.get(letter, letter) for letter in printable(text))
