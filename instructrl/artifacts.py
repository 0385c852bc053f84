"""Artifacts on disk: `<output_dir>/<stage>/<fingerprint>/`, complete if and only if it has a `manifest.json`.

A stage writes into `<fingerprint>.partial/`. Publishing writes the manifest last, then renames the folder, so a
kill at any moment leaves either no artifact or a whole one. The partial folder keeps checkpoints to resume from.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from instructrl.errors import UserError
from instructrl.key import digest, file_sha256, fingerprint

MANIFEST = "manifest.json"
ORDER = "order.json"
RESULT = "result.json"
ERROR = "error.json"
LOG = "stage.log"
CHECKPOINTS = "checkpoints"
# What differs between two equal runs, and what nothing downstream reads
NOT_CONTENT = frozenset({MANIFEST, ORDER, RESULT, ERROR, LOG, "log.jsonl", "progress.json"})


@dataclass(frozen=True)
class Artifact:
    """A finished stage: where it is, what it was made from (`key`) and what it holds (`digest`)."""

    path: Path
    key: dict[str, Any]
    digest: str
    inputs: dict[str, str]  # digest of every upstream artifact it was built from
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)  # file -> size in bytes, sha256
    made: dict[str, Any] = field(default_factory=dict)  # when, how long, where, with which packages
    metrics: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Artifact | None":
        """The artifact in the folder; None if there is none, or if one of its files is gone.

        Raises:
            UserError: the manifest is not one that we wrote.
        """
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            artifact = cls(
                path, *(manifest[name] for name in ("key", "digest", "inputs", "outputs", "made", "metrics"))
            )
            complete = all(is_size(path / name, output["size"]) for name, output in artifact.outputs.items())
            foreign = manifest["key_sha256"] != digest(artifact.key) or fingerprint(artifact.key) != path.name
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            foreign = True
        if foreign:
            raise UserError(f"{path / MANIFEST} is damaged; delete the folder {path} to make it again.")
        return artifact if complete else None


def is_size(path: Path, size: int) -> bool:
    """Whether the file is there and has so many bytes."""
    try:
        return path.stat().st_size == size
    except OSError:
        return False


class Store:
    """All artifacts under one folder. The file system is the only state.

    Args:
        root: `runtime.output_dir`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def path(self, stage: str, key: dict[str, Any]) -> Path:
        """Where the artifact is, or will be."""
        return self.root / stage / fingerprint(key)

    def partial(self, stage: str, key: dict[str, Any]) -> Path:
        """Where the artifact is being made."""
        return self.path(stage, key).with_suffix(".partial")

    def find(self, stage: str, key: dict[str, Any]) -> Artifact | None:
        """The artifact of this key, if it was made.

        Raises:
            UserError: the folder holds another key's artifact: their fingerprints are equal, or it is damaged.
        """
        artifact = Artifact.read(self.path(stage, key))
        if artifact and digest(artifact.key) != digest(key):
            raise UserError(f"{artifact.path} was made from another recipe with the same fingerprint; move it away.")
        return artifact

    def pointer(self, recipe: str) -> Path:
        """The file that holds the keys a recipe last used."""
        return self.root / "recipes" / f"{re.sub(r'[^A-Za-z0-9._-]', '_', recipe)}.json"

    def latest(self, recipe: str) -> dict[str, dict[str, Any]]:
        """Stage -> the key this recipe last used for it: what `plan` compares with to say why a stage re-runs."""
        try:
            keys = json.loads(self.pointer(recipe).read_text())
        except (OSError, ValueError):
            return {}
        return keys if isinstance(keys, dict) else {}

    def remember(self, recipe: str, keys: dict[str, dict[str, Any]]) -> None:
        """Note the keys of the recipe's stages that exist now."""
        latest = self.latest(recipe)
        if latest | keys == latest:
            return
        path = self.pointer(recipe)
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock", preserve_lock_file=True):
            write_atomically(path, json.dumps(self.latest(recipe) | keys, indent=2))

    @contextmanager
    def lock(
        self, stage: str, key: dict[str, Any], waiting: Callable[[], None], stop: Callable[[], bool] = lambda: False
    ) -> Generator[int | None]:
        """Hold the artifact while building it.

        Yields the lock's descriptor: a process that inherits it keeps the lock if this one is killed, so that no second
        runner can write into the same folder. Yields None if `stop()` came true while another process had the lock.

        Args:
            waiting: called once if another process has the lock.
        """
        descriptors: list[int] = []
        path = self.path(stage, key).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        # fallback_to_soft would put an existence file, which outlives a kill, where the file system has no locks
        lock = FileLock(path, on_acquired=descriptors.append, fallback_to_soft=False, preserve_lock_file=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            while not lock.is_locked and not stop():
                try:
                    lock.acquire(timeout=0.5)
                except Timeout:
                    continue
        try:
            yield descriptors[-1] if lock.is_locked else None
        finally:
            lock.release()

    def publish(
        self,
        stage: str,
        key: dict[str, Any],
        inputs: dict[str, str],
        made: dict[str, Any],
        metrics: dict[str, Any],
    ) -> Artifact:
        """Turn the partial folder into the artifact. Call with the lock held."""
        partial, final = self.partial(stage, key), self.path(stage, key)
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        for scratch in (partial / "progress.json", *partial.glob("*.tmp")):
            scratch.unlink(missing_ok=True)
        outputs = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST):
            sync(path)
            outputs[path.relative_to(partial).as_posix()] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        content = digest({name: output["sha256"] for name, output in outputs.items() if name not in NOT_CONTENT})
        manifest = {
            "key": key,
            "key_sha256": digest(key),
            "digest": content,
            "inputs": inputs,
            "outputs": outputs,
            "made": made,
            "metrics": metrics,
        }
        write_atomically(partial / MANIFEST, json.dumps(manifest, indent=2))
        discarded = final.with_suffix(".discarded")
        shutil.rmtree(discarded, ignore_errors=True)
        if final.exists():  # a forced re-run replaces it; between the renames it is absent, never half
            final.rename(discarded)
        partial.rename(final)
        sync(final.parent)
        shutil.rmtree(discarded, ignore_errors=True)
        return Artifact(final, key, content, inputs, outputs, made, metrics)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file; {} if there is none, or only half of one."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_atomically(path: Path, text: str) -> None:
    """Replace the file's content; a kill at any moment leaves the old or the new."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text)
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
