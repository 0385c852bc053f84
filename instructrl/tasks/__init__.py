"""The paper's public tasks as task files of lm-evaluation-harness: its prompts and metrics (App. D, Table 14).

A task is a YAML file here; what YAML cannot say is a function beside it. `rows` turns what a file or the Hub holds into
what the prompt needs; `results` turns a model's outputs on one question into its metrics.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from instructrl.config import Recipe, Source, Task
from instructrl.errors import UserError

FOLDER = Path(__file__).parent
EXTRA = "instructrl[eval]"


@dataclass(frozen=True)
class Card:
    """What a task of ours says of itself."""

    prompts: dict[str, str]
    """What stands before everything, by the name of the prompt; empty: the task has one prompt."""
    shots: int | None
    """The paper's number of solved examples, where it tries some."""
    n: int | None
    """The paper's number of questions; None for a task that is not the paper's."""
    columns: str
    """What a local file must hold."""
    classifier: bool = False
    """Whether the answers are scored by a text classifier."""


@lru_cache(maxsize=1)
def cards() -> dict[str, Card]:
    """Our tasks by name."""
    found = {}
    for path in sorted(FOLDER.glob("*.yaml")):
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Plain)
        found[values["task"]] = Card(**values["metadata"]["card"])
    return found


class _Plain(yaml.SafeLoader):
    """Reads the harness's `!function` as a name."""


_Plain.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def check(recipe: Recipe) -> None:
    """Find what is wrong with `eval.tasks` before anything runs.

    Raises:
        UserError: the harness is not installed, or a task, a prompt or a classifier does not fit.
    """
    if not recipe.eval.tasks:
        return
    if not find_spec("lm_eval"):
        raise UserError(f"eval.tasks needs lm-evaluation-harness: pip install {EXTRA!r}, or set eval.tasks=[]")
    for number, task in enumerate(recipe.eval.tasks):
        check_task(task, f"eval.tasks[{number}]")


def check_task(task: Task, key: str) -> None:
    """The same for one of them."""
    card = cards().get(task.task)
    if not card and task.task not in stock():
        close = get_close_matches(task.task, [*cards(), *stock()], n=3, cutoff=0.75)
        near = f" Did you mean {' or '.join(close)}?" if close else f" Ours are {', '.join(cards())}."
        raise UserError(f"{key}.task: there is no task {task.task!r}.{near}")
    if task.prompt is not None and task.prompt not in (card.prompts if card else {}):
        has = f"has the prompts {', '.join(card.prompts)}" if card and card.prompts else "has one prompt: leave it out"
        raise UserError(f"{key}.prompt={task.prompt}: {task.task} {has}.")
    if card and card.prompts and task.shots:
        raise UserError(f"{key}.shots={task.shots}: {task.task} has no solved examples; leave it out.")
    if card and card.classifier and not task.classifier:
        raise UserError(
            f"{key}.classifier is missing: {task.task} scores answers with a text classifier of yours, a folder or a "
            "Hub id such as unitary/toxic-bert, in place of the paper's Perspective API."
        )
    if task.classifier and not (card and card.classifier):
        raise UserError(f"{key}.classifier: {task.task} needs none; leave it out.")


@lru_cache(maxsize=1)
def stock() -> frozenset[str]:
    """The names in the harness's own task files, and other words of theirs. Its TaskManager knows them exactly, and
    takes ten seconds to say so."""
    spec = find_spec("lm_eval")
    root = Path((spec.submodule_search_locations or [""])[0] if spec else "") / "tasks"
    name = re.compile(
        rb"""^\s*(?:-\s*)?(?:["']?(?:task|group|tag)["']?\s*:\s*(?:-\s*)?)?["']?([\w./+-]+)["']?\s*(?:#.*)?$""", re.M
    )
    files = (path for path in root.rglob("*") if path.suffix in ("", ".yaml") and path.is_file())
    found = {match for path in files for match in name.findall(path.read_bytes())}
    return frozenset(one.decode() for one in found)


def sources_of(task: Task) -> dict[str, Source]:
    """The task's own files or Hub sets, by the key that names them."""
    named = {"path": task.path, "examples": task.examples}
    return {key: Source(path=path) for key, path in named.items() if path}
