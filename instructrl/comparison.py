"""`instructrl diff A B`: settings and metrics of two recipes or two artifacts, side by side."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from instructrl.artifacts import MANIFEST, read_json
from instructrl.display import is_number, number
from instructrl.errors import UserError
from instructrl.find import find
from instructrl.jobs import make_jobs
from instructrl.plan import ABSENT, brief
from instructrl.printout import print_table
from instructrl.recipe_files import is_recipe


@dataclass(frozen=True)
class Side:
    """One of the two. What a stage that is not made has is its key alone."""

    name: str
    settings: dict[str, Any]
    keys: dict[str, dict[str, Any]]  # stage -> key
    made: dict[str, dict[str, Any]]  # stage -> manifest
    is_recipe: bool

    def of(self, stage: str) -> "Side":
        """The side reduced to one of its stages."""
        if stage not in self.keys:
            raise UserError(f"{self.name} has no stage {stage}; it has {', '.join(self.keys)}.")
        key = self.keys[stage]
        made = {stage: self.made[stage]} if stage in self.made else {}
        return Side(self.name, of_key(key), {stage: key}, made, False)


def side(text: str, overrides: list[str]) -> Side:
    """What is meant: a recipe with overrides of its own (`"tiny seed=1"`), or as in `find.find`.

    Raises:
        UserError: there is no such thing.
    """
    words = shlex.split(text) or [""]
    if is_recipe(words[0]):
        [job] = make_jobs(None, [f"recipe={words[0]}", *words[1:], *overrides], [], multirun=False)
        steps = {step.stage.name: step for step in job.plan}
        made = {name: read_json(step.artifact.path / MANIFEST) for name, step in steps.items() if step.artifact}
        values = job.composition.recipe.model_dump(mode="json", exclude={"name"})
        return Side(text, values, {name: step.key for name, step in steps.items()}, made, True)
    place = find(text, overrides)
    manifest = read_json(place.path / MANIFEST)
    if not manifest:
        raise UserError(f"{place.stage} is not made: there is no {place.path / MANIFEST}.")
    key = manifest["key"]
    return Side(f"{place.stage}/{place.path.name}", of_key(key), {place.stage: key}, {place.stage: manifest}, False)


def of_key(key: dict[str, Any]) -> dict[str, Any]:
    """The settings that an artifact depends on; where what it was made from differs, its fingerprint says so."""
    others = {name: key[name] for name in ("version", "packages") if name in key}
    return key["config"] | others | {"made from": key.get("inputs", {})}


def compare(one: str, other: str, overrides: list[str]) -> tuple[Side, Side]:
    """The two sides, of a recipe and an artifact both reduced to the artifact's stage."""
    a, b = side(one, overrides), side(other, overrides)
    if a.is_recipe != b.is_recipe:
        [stage] = b.keys if a.is_recipe else a.keys
        return a.of(stage), b.of(stage)
    return a, b


def differences(a: Side, b: Side) -> list[tuple[str, Any, Any]]:
    """Every setting in which they differ: its name and both values."""
    ours, theirs = dict(flat(a.settings)), dict(flat(b.settings))
    rows = [(name, ours.get(name, ABSENT), theirs.get(name, ABSENT)) for name in ours | theirs]
    return [row for row in rows if row[1] != row[2]]


def metrics(a: Side, b: Side) -> list[tuple[str, Any, Any]]:
    """Every number that both have of the same stage, and how long it took; equal ones too."""
    rows = []
    pairs = [(stage, stage) for stage in a.made if stage in b.made]
    if not pairs and len(a.made) == len(b.made) == 1:  # two artifacts of different stages
        pairs = [(*a.made, *b.made)]
    for mine, yours in pairs:
        ours, theirs = numbers(a.made[mine]), numbers(b.made[yours])
        prefix = f"{mine}." if mine == yours else ""
        rows += [(prefix + name, ours.get(name), theirs.get(name)) for name in ours | theirs]
    return rows


def numbers(manifest: dict[str, Any]) -> dict[str, Any]:
    """An artifact's metrics that are numbers, and the seconds that it took."""
    found = {name: value for name, value in flat(manifest["metrics"]) if is_number(value)}
    seconds = manifest["made"].get("seconds")
    return found | ({"seconds": seconds} if is_number(seconds) else {})


def flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, with its dotted name; an empty mapping has none."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{path}.{name}" if path else str(name))
    else:
        yield path, value


def as_json(a: Side, b: Side) -> str:
    """Both tables as an object."""
    settings = {name: [None if v is ABSENT else v for v in (x, y)] for name, x, y in differences(a, b)}
    values = {name: [x, y] for name, x, y in metrics(a, b)}
    return json.dumps({"sides": [a.name, b.name], "settings": settings, "metrics": values}, indent=2)


def show(a: Side, b: Side) -> None:
    """A table of settings and one of metrics; in both only what differs."""
    settings = differences(a, b)
    if settings:
        print_table(["setting", a.name, b.name], [[name, brief(x), brief(y)] for name, x, y in settings], left=3)
    else:
        print("Their settings are the same.")
    rows = metrics(a, b)
    other = [[name, shown(x), shown(y), change(x, y)] for name, x, y in rows if x != y]
    if other:
        print_table(["metric", a.name, b.name, "change"], other)
    if len(rows) > len(other):
        print(f"{len(rows) - len(other)} metrics are the same.")
    for one, two in ((a, b), (b, a)):
        missing = [stage for stage in one.made if stage not in two.made and stage in two.keys]
        if missing:
            print(f"Not made for {two.name}: {', '.join(missing)}.")
    if not a.made and not b.made:
        print("Nothing of either has been made.")


def shown(value: Any) -> str:
    """A metric, "-" if it is missing."""
    return "-" if value is None else number(value)


def change(before: Any, after: Any) -> str:
    """The difference, with its sign."""
    if before is None or after is None:
        return ""
    return f"{'+' if after > before else '-'}{number(abs(after - before))}"
