"""What a store holds: every artifact, finished or not, its size, its recipe and its age."""

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from instructrl.artifacts import MANIFEST, ORDER, Store, read_json
from instructrl.pipeline import NAMES
from instructrl.printout import print_table
from instructrl.references import inputs, references

FOLDER = re.compile(r"([0-9a-f]{12})(\.partial|\.discarded|\.damaged)?")


@dataclass(frozen=True)
class Entry:
    """One folder of a stage's."""

    stage: str
    fingerprint: str
    path: Path
    state: str  # done, damaged: files are missing; making, stopped: not finished; leftover: of what was replaced
    size: int  # bytes
    recipe: str  # that it was made for first
    at: float | None  # when it was published, or begun: seconds since the epoch
    seconds: float | None  # that it took
    used_by: tuple[str, ...]  # recipes whose last run refers to it

    @property
    def unused(self) -> bool:
        """Whether nothing would miss it."""
        return self.state == "leftover" or (not self.used_by and self.state != "making")


def entries(store: Store) -> list[Entry]:
    """All there is, in the order of the pipeline, the oldest first."""
    paths = list(folders(store.root))
    held = {path for path in paths if path.suffix == ".partial" and locked(path)}
    used = references(store)
    for path in held:  # what is being made now uses what it is made from, whoever started it
        for place in upstream(store, (path.parent.name, path.stem)):
            used.setdefault(place, set()).add(read_json(path / ORDER).get("recipe", {}).get("name", "?"))
    found = [entry(path, path in held, sorted(used.get((path.parent.name, path.stem), ()))) for path in paths]
    return sorted(found, key=lambda one: (NAMES.index(one.stage), one.at or 0))


def folders(root: Path) -> Iterator[Path]:
    """The folders that stages have written. Anything else in the store is not ours; links are left alone."""
    for stage in NAMES:
        if (root / stage).is_dir():
            for path in (root / stage).iterdir():
                if FOLDER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    yield path


def upstream(store: Store, place: tuple[str, str]) -> set[tuple[str, str]]:
    """The artifact and all above it."""
    found, waiting = {place}, [place]
    while waiting:
        more = inputs(store.root.joinpath(*waiting.pop())) - found
        found |= more
        waiting += more
    return found


def entry(path: Path, held: bool, used_by: Sequence[str]) -> Entry:
    """What is known of a folder."""
    manifest, order = read_json(path / MANIFEST), read_json(path / ORDER)
    made, outputs = manifest.get("made", {}), manifest.get("outputs", {})
    if path.suffix == ".partial":
        state = "making" if held else "stopped"
    elif path.suffix:
        state = "leftover"
    else:
        state = "done" if manifest and all(is_there(path / name, outputs[name]) for name in outputs) else "damaged"
    recipe, at = order.get("recipe", {}).get("name", "?"), made.get("published", order.get("started"))
    return Entry(path.parent.name, path.stem, path, state, size(path), recipe, at, made.get("seconds"), tuple(used_by))


def is_there(path: Path, output: dict[str, Any]) -> bool:
    """Whether the file is there in the size that the manifest says."""
    try:
        return path.stat().st_size == output["size"]
    except OSError:
        return False


def size(folder: Path) -> int:
    """The bytes of all files in the folder."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # a stage that is running has just deleted it
                total += Path(parent, name).lstat().st_size
    return total


def locked(path: Path) -> bool:
    """Whether a process is making the artifact of this folder."""
    lock = path.with_suffix(".lock")
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0, fallback_to_soft=False, preserve_lock_file=True):
            return False
    except Timeout:
        return True


def as_json(found: Iterable[Entry]) -> str:
    """A list of objects."""
    return json.dumps([asdict(one) | {"path": str(one.path), "unused": one.unused} for one in found], indent=2)


def show(found: Sequence[Entry]) -> None:
    """A table, and what it comes to."""
    if not found:
        print("Nothing has been made yet.")
        return
    table(found)
    unused = [one for one in found if one.unused]
    print(f"{count(found)}, {total(found)}.")
    if unused:
        print(f"No last run refers to {len(unused)} of them, {total(unused)}: see instructrl clean.")


def total(found: Iterable[Entry]) -> str:
    """How large they are together."""
    return amount(sum(one.size for one in found))


def table(found: Iterable[Entry]) -> None:
    """A row a folder."""
    rows = []
    for one in found:
        state = "unused" if one.state == "done" and one.unused else one.state
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.at)) if one.at else "?"
        rows.append([one.stage, one.fingerprint, state, one.recipe, when, amount(one.size)])
    print_table(["stage", "fingerprint", "state", "recipe", "when", "size"], rows, left=5)


def count(found: Sequence[Entry]) -> str:
    """`3 artifacts`."""
    return f"{len(found)} artifact{'' if len(found) == 1 else 's'}"


def amount(size: float) -> str:
    """`31.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 99.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def clean(store: Store, delete: bool, command: str) -> None:
    """List what nothing would miss, the largest first, and delete it if asked to.

    Args:
        command: what deletes it.
    """
    unused = sorted((one for one in entries(store) if one.unused), key=lambda one: -one.size)
    if not unused:
        print("There is nothing to clean: the last runs refer to all there is.")
        return
    table(unused)
    if not delete:
        print(f"No recipe's last run refers to these: {count(unused)}, {total(unused)}. Delete them with: {command}")
        return
    gone = [one for one in unused if remove(store, one)]
    print(f"Deleted {count(gone)}, {total(gone)}.")
    for one in unused:
        if one not in gone:
            print(f"Kept {one.path}: a run has taken it up meanwhile.")


def remove(store: Store, one: Entry) -> bool:
    """Delete a folder, unless a run refers to it by now or is making it. A kill leaves it whole or out of the way."""
    try:
        with FileLock(one.path.with_suffix(".lock"), timeout=0, fallback_to_soft=False, preserve_lock_file=True):
            if one.state != "leftover" and (one.stage, one.fingerprint) in references(store):
                return False
            discarded = one.path.with_suffix(".discarded")
            if one.path != discarded:
                shutil.rmtree(discarded, ignore_errors=True)
                one.path.rename(discarded)
            shutil.rmtree(discarded)
    except (Timeout, FileNotFoundError):  # somebody makes it, or has deleted it already
        return not one.path.exists()
    return True
