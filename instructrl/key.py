"""The key of a stage: everything its result depends on. Two equal keys are the same artifact.

A local file or model folder is in the key by its content, so moving it re-runs nothing and editing it re-runs what
reads it. Nothing of `runtime` is in any key.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from instructrl import tasks
from instructrl.config import Recipe, Source
from instructrl.errors import UserError
from instructrl.keys import dotted
from instructrl.packages import installed
from instructrl.pipeline import Stage
from instructrl.stages import sources

FINGERPRINT_LENGTH = 12  # hex digits, 48 bits; the manifest holds all 64, compared on every hit
TRL_STAGES = (
    "sft",
    "reward_model",
    "judge",
    "ppo_init",
)  # TRL's trainer is their algorithm, and changes with its minor version
ADDED = {"reward_model": {"shuffle_pairs": False}, "ppo": {"snapshots": 0}, "ppo_ptx": {"snapshots": 0}}
"""Keys that came after artifacts were made: at this value they compute what was computed without them, and are left
out, so that those artifacts stay good."""
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")  # configuration, weights, tokenizer, code
WORTH_REMEMBERING = 8 * 2**20  # bytes; a smaller file is hashed in milliseconds
SETTLED_SECONDS = 2  # a file changed this recently may change again within its time stamp's resolution

Location = tuple[str | int, ...]  # ("data", "rankings", 0, "path")
Where = Callable[[Location], str]


ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no nan."""
    return ENCODER.encode(value)


class Key(dict[str, Any]):
    """The key of a stage, not to be changed: its digest is computed once, which plans of large sweeps need."""

    @cached_property
    def digest(self) -> str:
        """The sha256 of its canonical JSON, 64 hex digits."""
        return hashlib.sha256(canonical(self).encode()).hexdigest()


def digest(value: object) -> str:
    """The sha256 of a value's canonical JSON, 64 hex digits."""
    return value.digest if isinstance(value, Key) else hashlib.sha256(canonical(value).encode()).hexdigest()


def fingerprint(key: dict[str, Any]) -> str:
    """The short name of a key, and of its artifact's folder: 12 hex digits."""
    return digest(key)[:FINGERPRINT_LENGTH]


class Hashes:
    """The sha256 of files, remembered for large ones by their size and time of change.

    Args:
        path: where to remember; None: hash every time.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.changed = False
        self.known: dict[str, list] = {}
        if path:
            try:
                self.known = dict(json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):  # nothing remembered, or not by us
                self.known = {}

    def of(self, path: Path) -> str:
        """The file's sha256."""
        status = path.stat()
        name, stamp = os.path.realpath(path), [status.st_size, status.st_mtime_ns]
        known = self.known.get(name)
        if known and known[:2] == stamp:
            return known[2]
        sha = file_sha256(path)
        if status.st_size >= WORTH_REMEMBERING and time.time() - status.st_mtime > SETTLED_SECONDS:
            self.known[name] = [*stamp, sha]
            self.changed = True
        return sha

    def save(self) -> None:
        """Remember what was hashed. Losing it costs time only."""
        if self.changed and self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.path)
            self.changed = False


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stage_key(
    stage: Stage, recipe: Recipe, upstream: Mapping[str, dict[str, Any]], contents: Mapping[Location, str]
) -> Key:
    """Everything the stage's result depends on, as JSON.

    Args:
        upstream: the keys of the stages it needs.
        contents: what stands for the local files, from `local_contents`.
    """
    values = recipe.model_dump(mode="json", include=set(stage.reads))
    for (*parents, last), content in contents.items():
        if parents[0] in stage.reads:
            section: Any = values
            for part in parents:
                section = section[part]
            section[last] = content
    key = Key(
        stage=stage.name,
        version=stage.version,
        config={name: without_added(name, values[name]) for name in stage.reads},
        inputs={name: fingerprint(upstream[name]) for name in stage.needs},
    )
    if stage.name in TRL_STAGES:
        key["packages"] = {"trl": ".".join(installed("trl").split(".")[:2])}
    return key


def without_added(section: str, values: Any) -> Any:
    """A section's values, less the `ADDED` keys that change nothing."""
    added = ADDED.get(section, {})
    return {key: value for key, value in values.items() if key not in added or value != added[key]} if added else values


def local_contents(recipe: Recipe, sections: Collection[str], hashes: Hashes, where: Where) -> dict[Location, str]:
    """What stands in keys for the local files and folders that these sections of the recipe name.

    Args:
        where: file and line of a key of the recipe, for errors.

    Raises:
        UserError: a line for each that is not there, or cannot be used.
    """
    named: dict[Location, Source] = {}
    if "data" in sections:
        for name in sources.LISTS:
            listed = getattr(recipe.data, name)
            named |= {("data", name, number, "path"): source for number, source in enumerate(listed)}
    if "eval" in sections and recipe.eval.labels:
        named["eval", "labels", "path"] = recipe.eval.labels
    if "eval" in sections:
        for number, task in enumerate(recipe.eval.tasks):
            for name, source in tasks.sources_of(task).items():
                named["eval", "tasks", number, name] = source
    contents, problems = {}, []
    for location, source in named.items():
        try:
            contents[location] = source_content(source, dotted(location[:-1]), hashes)
        except UserError as error:
            problems.append(sentence(f"{where(location)}{error}"))
    folders: dict[Location, str] = {}
    if "model" in sections and recipe.model.path is not None:
        folders["model", "path"] = recipe.model.path
    if "eval" in sections:
        scored = ((number, task.classifier) for number, task in enumerate(recipe.eval.tasks))
        folders |= {("eval", "tasks", number, "classifier"): path for number, path in scored if path}
    for location, path in folders.items():
        try:
            contents[location] = model_content(path, hashes, dotted(location))
        except UserError as error:
            problems.append(sentence(f"{where(location)}{error}"))
    if problems:
        raise UserError("\n".join(problems))
    return contents


def source_content(source: Source, key: str, hashes: Hashes) -> str:
    """What stands for a source's path in a key: its content, or its Hub id."""
    files = sources.files(source, key)
    if not files:
        return source.path
    root = Path(source.path).expanduser()
    if root.is_file():
        return f"sha256:{read(hashes, root, key)}{sources.ending(root)}"  # the ending says how it is read
    return folder_content(root, files, hashes, key)


def model_content(path: str, hashes: Hashes, key: str) -> str:
    """What stands for a model in a key: the content of the folder, or the Hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{key}: the folder {path} has no config.json, so it holds no model.")
        files = [file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_FILES]
        return folder_content(folder, files, hashes, key)
    if folder.is_file():
        raise UserError(f"{key}: {path} is a file; name the folder that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise UserError(f"{key}: there is no folder {path or repr(path)}.")
    return path


def folder_content(root: Path, files: Iterable[Path], hashes: Hashes, key: str) -> str:
    """One hash for the files' names and contents."""
    content = {file.relative_to(root).as_posix(): read(hashes, file, key) for file in sorted(files)}
    return f"sha256:{digest(content)}"


def read(hashes: Hashes, path: Path, key: str) -> str:
    """The file's sha256."""
    try:
        return hashes.of(path)
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be read: {(error.strerror or str(error)).lower()}.") from None


def sentence(text: str) -> str:
    """The text with a full stop."""
    return text if text.endswith((".", "?", "!")) else f"{text}."
