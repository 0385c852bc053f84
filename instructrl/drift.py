"""Versions that an artifact was built with and that are others by now: worth a warning, never a reason to run again.

What is worth running again is in the key (`key.TRL_STAGES`).
"""

import platform
from collections.abc import Iterable

from instructrl import __version__
from instructrl.artifacts import Artifact
from instructrl.packages import installed

COMPUTE = ("torch", "transformers", "tokenizers", "trl", "accelerate", "peft", "datasets", "numpy")
"""Packages that compute what a stage makes, or read what it makes it from."""


def drift(artifacts: Iterable[tuple[str, Artifact]]) -> list[str]:
    """`transformers 5.24.0 is installed; sft and eval were made with 5.23.1`, a line for each pair of versions.

    Args:
        artifacts: those that are used as they are, each with its stage.
    """
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for stage, artifact in artifacts:
        made = artifact.made
        then = made.get("packages", {}) | {"instructrl": made.get("instructrl"), "Python": minor(made.get("python"))}
        for name in ("instructrl", "Python", *COMPUTE):
            before, now = then.get(name), current(name)
            if before and before != now:
                found.setdefault((name, before, now), {})[stage] = None
    return [
        f"{name} {f'{now} is installed' if now else 'is not installed'}; {joined(stages)} made with {before}"
        for (name, before, now), stages in found.items()
    ]


def current(name: str) -> str:
    """The version that a stage would be made with now; "" where there is none."""
    special = {"instructrl": __version__, "Python": minor(platform.python_version())}
    return special[name] if name in special else installed(name)


def minor(version: str | None) -> str:
    """`3.11` of `3.11.7`: a patch of Python changes nothing that is computed."""
    return ".".join((version or "").split(".")[:2])


def joined(stages: Iterable[str]) -> str:
    """`sft was`, `sft and eval were`, `data, sft and eval were`."""
    *others, last = stages
    return f"{', '.join(others)} and {last} were" if others else f"{last} was"
