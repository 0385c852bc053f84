"""Artifacts on disk: `<output_dir>/<stage>/<fingerprint>/`, complete if and only if it has a `manifest.json`.

A stage writes into `<fingerprint>.partial/`. Publishing writes the manifest last, then renames the folder, so a
kill at any moment leaves either no artifact or a whole one. The partial folder keeps checkpoints to resume from.

An artifact that was changed after it was published is none, and is made again. A file is hashed again only if its time
of change is another: what rots on the disk and keeps its time is found by `instructrl verify`.
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
from instructrl.key import Hashes, digest, file_sha256, fingerprint

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
        """The artifact in the folder, whatever became of its files; None if there is no manifest.

        Raises:
            ValueError: the manifest is not as we wrote it.
        """
        try:
            text = (path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            manifest = json.loads(text)
            said = manifest.pop("sha256")
            artifact = cls(path, **{name: manifest[name] for name in cls.__dataclass_fields__ if name != "path"})
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError("unreadable") from None
        if said != digest(manifest):
            raise ValueError("changed")
        return artifact

    def damage(self, hashes: Hashes) -> str:
        """What became of the files that others read: `model/config.json was changed`, or "" if all are as published.

        Args:
            hashes: remembers those of large files, where a whole store was copied and every time of change is another.
        """
        for name, output in self.outputs.items():
            path = self.path / name
            try:
                status = path.stat()
            except OSError:
                return f"{name} is gone"
            if name in NOT_CONTENT or (status.st_size, status.st_mtime_ns) == (output["size"], output["mtime_ns"]):
                continue
            try:
                same = status.st_size == output["size"] and hashes.of(path) == output["sha256"]
            except OSError:
                return f"{name} cannot be read"
            if not same:
                return f"{name} was changed"
        return ""


class Store:
    """All artifacts under one folder. The file system is the only state.

    Args:
        root: `runtime.output_dir`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.hashes = Hashes(root / "hashes.json")

    def path(self, stage: str, key: dict[str, Any]) -> Path:
        """Where the artifact is, or will be."""
        return self.root / stage / fingerprint(key)

    def partial(self, stage: str, key: dict[str, Any]) -> Path:
        """Where the artifact is being made."""
        return self.path(stage, key).with_suffix(".partial")

    def find(self, stage: str, key: dict[str, Any]) -> Artifact | None:
        """The artifact of this key, if it was made and is as it was published.

        Raises:
            UserError: the folder holds another key's artifact: their fingerprints are equal.
        """
        return self.look(stage, key)[0]

    def look(self, stage: str, key: dict[str, Any]) -> tuple[Artifact | None, str]:
        """The artifact of this key, and if there is one no longer, what became of it.

        Raises:
            UserError: the folder holds another key's artifact: their fingerprints are equal.
        """
        try:
            artifact = Artifact.read(self.path(stage, key))
        except ValueError:
            return None, f"its {MANIFEST} was changed, or written by another version"
        if artifact is None:
            return None, ""
        if digest(artifact.key) != digest(key):
            raise UserError(f"{artifact.path} was made from another recipe with the same fingerprint; move it away.")
        damage = artifact.damage(self.hashes)
        return (None, damage) if damage else (artifact, "")

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
        """Turn the partial folder into the artifact. Call with the lock held.

        One that is there already is replaced; if it was damaged, it is kept as `<fingerprint>.damaged`, and
        `made["mended"]` says so.
        """
        partial, final = self.partial(stage, key), self.path(stage, key)
        shutil.rmtree(partial / CHECKPOINTS, ignore_errors=True)
        for scratch in (partial / "progress.json", *partial.glob("*.tmp")):
            scratch.unlink(missing_ok=True)
        outputs = {}
        for path in sorted(path for path in partial.rglob("*") if path.is_file() and path.name != MANIFEST):
            sync(path)
            sha, status = file_sha256(path), path.stat()
            name = path.relative_to(partial).as_posix()
            outputs[name] = {"size": status.st_size, "sha256": sha, "mtime_ns": status.st_mtime_ns}
        content = digest({name: output["sha256"] for name, output in outputs.items() if name not in NOT_CONTENT})
        _, damage = self.look(stage, key)
        if damage:
            made = made | {"mended": damage}
        manifest = {
            "key": key,
            "digest": content,
            "inputs": inputs,
            "outputs": outputs,
            "made": made,
            "metrics": metrics,
        }
        write_atomically(partial / MANIFEST, json.dumps(manifest | {"sha256": digest(manifest)}, indent=2))
        old = final.with_suffix(".damaged" if damage else ".discarded")
        if final.exists():  # between the renames it is absent, never half
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        partial.rename(final)
        sync(final.parent)
        shutil.rmtree(final.with_suffix(".discarded"), ignore_errors=True)
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
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def sync(path: Path) -> None:
    """Force a file's bytes, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
