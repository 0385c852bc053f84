"""What a sweep's figure is drawn from: the finished jobs, what was swept in them, and where their artifacts are."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from instructrl.artifacts import Artifact
from instructrl.display import is_number
from instructrl.key import digest
from instructrl.launch import ask

if TYPE_CHECKING:
    from instructrl.jobs import Job

SEED = "seed"
FOLDER = "sweeps"  # in the output folder


def draw(finished: Sequence[tuple["Job", Artifact]]) -> Path | None:
    """Draw the figure of a sweep into `<output_dir>/sweeps/<recipe>-<hash>/`, in a process of its own. None if there is
    nothing to draw.

    Args:
        finished: the jobs that came to their end, each with its target's artifact.

    Raises:
        StageFailed: it cannot be drawn.
    """
    if len(finished) < 2 or not differs(finished):
        return None
    job = finished[0][0]
    points = [{"values": values, "folder": str(artifact.path)} for values, artifact in described(finished)]
    name = f"{job.composition.recipe.name}-{digest(points)[:12]}"
    folder = job.store.root / FOLDER / name
    order = {"points": points, "target": job.target, "name": job.composition.recipe.name, "folder": str(folder)}
    ask("--overlay", order, job.composition.recipe, "the figure of the sweep cannot be drawn")
    return folder / "sweep.png"


def described(finished: Sequence[tuple["Job", Artifact]]) -> list[tuple[dict[str, Any], Artifact]]:
    """Each job's swept keys with their values; each artifact once for one choice of them."""
    spelt = [dict(argument.split("=", 1) for argument in job.arguments) for job, _ in finished]
    keys = [key for key in spelt[0] if len({one.get(key) for one in spelt}) > 1]
    found = []
    for (job, artifact), arguments in zip(finished, spelt, strict=True):
        values = {key: value_of(job, key, arguments.get(key, "")) for key in keys}
        if (values, artifact) not in found:
            found.append((values, artifact))
    return found


def value_of(job: "Job", key: str, text: str) -> Any:
    """The recipe's value where the key is one of a number or a text, else what was typed."""
    value: Any = job.composition.recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value if is_number(value) or isinstance(value, str) else text


def differs(finished: Sequence[tuple["Job", Artifact]]) -> bool:
    """Whether any number came out otherwise in one job than in another."""
    found = [{name: value for name, value in artifact.metrics.items() if is_number(value)} for _, artifact in finished]
    return any(one != found[0] for one in found)
