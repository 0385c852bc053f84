"""What the last run of each recipe refers to: `<output_dir>/runs/<recipe>.json`.

A run notes, before it begins, the fingerprints of all stages that it plans: of a sweep those of all its points. A run
that has fewer stages leaves what is noted of the others.
"""

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock

from instructrl.artifacts import MANIFEST, ORDER, Store, read_json, write_atomically
from instructrl.errors import UserError
from instructrl.key import fingerprint

Place = tuple[str, str]  # stage, fingerprint


def note(store: Store, recipe: str, planned: Iterable[Place]) -> None:
    """Note what a run of the recipe is about to refer to."""
    stages: dict[str, list[str]] = {}
    for stage, name in dict.fromkeys(planned):
        stages.setdefault(stage, []).append(name)
    path = store.root / "runs" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', recipe)}.json"
    if same(read_json(path), stages):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", preserve_lock_file=True):
        now = {stage: {"at": time.time(), "fingerprints": names} for stage, names in stages.items()}
        write_atomically(path, json.dumps(read_json(path) | now, indent=2))


def same(noted: dict[str, Any], stages: dict[str, list[str]]) -> bool:
    """Whether this is noted already."""
    return all(stage in noted and noted[stage]["fingerprints"] == names for stage, names in stages.items())


def references(store: Store) -> dict[Place, set[str]]:
    """Every artifact, made or not, that a recipe's last run refers to, and those that it was made from.

    Raises:
        UserError: a file that says so is damaged; without it, what it refers to would look unused.
    """
    found: dict[Place, set[str]] = {}
    for path in sorted([*(store.root / "runs").glob("*.json"), *(store.root / "recipes").glob("*.json")]):
        try:
            for place in places(json.loads(path.read_text()), path.parent.name):
                refer(store, place, path.stem, found)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged, so what it refers to is unknown: run its recipe.") from None
    return found


def places(noted: dict[str, Any], kind: str) -> list[Place]:
    """What a file in `runs` refers to; one in `recipes` has the key that each stage was last made with."""
    if kind == "recipes":
        return [(stage, fingerprint(key)) for stage, key in noted.items()]
    return [(stage, name) for stage, one in noted.items() for name in one["fingerprints"]]


def refer(store: Store, place: Place, recipe: str, found: dict[Place, set[str]]) -> None:
    """Note that the recipe refers to this artifact, and to all above it."""
    if recipe in found.setdefault(place, set()):
        return
    found[place].add(recipe)
    for above in inputs(store.root.joinpath(*place)):
        refer(store, above, recipe, found)


def inputs(artifact: Path) -> set[Place]:
    """What the artifact was made from, and what one that is being made in its place is made from."""
    key = read_json(artifact / MANIFEST).get("key", {})
    order = read_json(artifact.with_suffix(".partial") / ORDER)
    folders = [Path(path) for path in order.get("inputs", {}).values()]
    return {*key.get("inputs", {}).items(), *((folder.parent.name, folder.name) for folder in folders)}
