"""The key of a stage: everything its result depends on. Two equal keys are the same artifact.

A local file or model folder is in the key by its content, so moving it re-runs nothing and editing it re-runs what
reads it. Nothing of `runtime` is in any key.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from instructrl.config import Recipe, Source
from instructrl.errors import UserError
from instructrl.pipeline import Stage
from instructrl.stages import sources

FINGERPRINT_LENGTH = 12  # hex digits, 48 bits; the manifest holds all 64, compared on every hit
TRL_STAGES = ("sft", "reward_model", "judge")  # TRL's trainer is their algorithm, and changes with its minor version
MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".py")  # configuration, weights, tokenizer, code
WORTH_REMEMBERING = 8 * 2**20  # bytes; a smaller file is hashed in milliseconds
SETTLED_SECONDS = 2  # a file changed this recently may change again within its time stamp's resolution

Where = Callable[[tuple[str | int, ...]], str]


def canonical(value: object) -> str:
    """The one JSON text of a value: sorted keys, no spaces, ASCII, no nan."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: object) -> str:
    """The sha256 of a value's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


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
    stage: Stage, recipe: Recipe, upstream: dict[str, dict[str, Any]], hashes: Hashes, where: Where = lambda _: ""
) -> dict[str, Any]:
    """Everything the stage's result depends on, as JSON.

    Args:
        upstream: the keys of the stages it needs.
        where: file and line of a key of the recipe, for errors.

    Raises:
        UserError: a local file or folder that the recipe names is not there, or cannot be used.
    """
    values = recipe.model_dump(mode="json")
    config = {name: values[name] for name in stage.reads}
    if "data" in config:
        for kind, key, source in sources.named_sources(recipe.data):
            number = int(key.rpartition("[")[2].rstrip("]"))
            config["data"][kind][number]["path"] = source_content(source, ("data", kind, number), hashes, where)
    if "eval" in config and recipe.eval.labels:
        config["eval"]["labels"]["path"] = source_content(recipe.eval.labels, ("eval", "labels"), hashes, where)
    if "model" in config and recipe.model.path is not None:
        config["model"]["path"] = model_content(recipe.model.path, hashes, where)
    key = {
        "stage": stage.name,
        "version": stage.version,
        "config": config,
        "inputs": {name: fingerprint(upstream[name]) for name in stage.needs},
    }
    if stage.name in TRL_STAGES:
        key["packages"] = {"trl": ".".join(version("trl").split(".")[:2])}
    return key


def source_content(source: Source, location: tuple[str | int, ...], hashes: Hashes, where: Where) -> str:
    """What stands for a source's path in a key: its content, or its Hub id."""
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)[1:]
    try:
        files = sources.files(source, key)
    except UserError as error:
        raise UserError(f"{where((*location, 'path'))}{error}") from None
    if not files:
        return source.path
    root = Path(source.path).expanduser()
    if root.is_file():
        return f"sha256:{read(hashes, root, key)}{sources.ending(root)}"  # the ending says how it is read
    return folder_content(root, files, hashes, key)


def model_content(path: str, hashes: Hashes, where: Where) -> str:
    """What stands for `model.path` in a key: the content of the folder, or the Hub id."""
    folder, at = Path(path).expanduser(), where(("model", "path"))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{at}model.path: the folder {path} has no config.json, so it holds no model.")
        files = [file for file in folder.iterdir() if file.is_file() and file.suffix in MODEL_FILES]
        return folder_content(folder, files, hashes, "model.path")
    if folder.is_file():
        raise UserError(f"{at}model.path: {path} is a file; name the folder that holds config.json and the weights.")
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path:
        raise UserError(f"{at}model.path: there is no folder {path or repr(path)}.")
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
