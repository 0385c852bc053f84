"""What an error was, in a sentence that says what to do about it: no memory, a full disk, a read-only folder."""

import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from instructrl.config import Recipe

NO_MEMORY = re.compile(  # torch on CPU, CUDA and MPS, cuBLAS, C++, the dynamic linker, NumPy, Arrow, the kernel
    r"out of memory|not enough memory|can(no|')t allocate memory|CUBLAS_STATUS_ALLOC_FAILED|bad_alloc"
    r"|failed to map segment|unable to allocate|malloc of size|\bMemoryError\b",
    re.IGNORECASE,
)
NO_SPACE = re.compile(r"no space left on device|disk quota exceeded|os error (28|122)\b", re.IGNORECASE)
TORCH_WRITE = re.compile(
    r"PytorchStreamWriter failed|file write failed|unexpected pos", re.IGNORECASE
)  # does not say why
READ_ONLY = re.compile(r"read-only file system|os error 30\b", re.IGNORECASE)
FULL = 2**20  # bytes: with less than that left a disk is full

LOWER = {  # stage -> what of the recipe lowers its memory most
    "data": ("runtime.jobs",),
    "pretrain": ("pretrain.tokens_per_step", "pretrain.hidden_size"),
    "sft": ("runtime.micro_batch_size", "runtime.gradient_checkpointing"),
    "label": ("runtime.generation_batch_size", "runtime.jobs"),
    "reward_model": ("runtime.micro_batch_size", "runtime.max_tokens"),
    "judge": ("runtime.micro_batch_size", "runtime.max_tokens"),
    "ppo_init": ("runtime.micro_batch_size", "runtime.gradient_checkpointing"),
    "ppo": ("runtime.max_tokens", "runtime.generation_batch_size"),
    "ppo_ptx": ("runtime.max_tokens", "runtime.generation_batch_size"),
    "eval": ("runtime.max_tokens", "runtime.generation_batch_size"),
}


def explained(error: BaseException, stage: str, recipe: Recipe, folder: Path) -> str | None:
    """The sentence for an error in a stage's process; None where the error's own is as good."""
    for each in chain(error):
        text = f"{type(each).__name__}: {' '.join(str(each).split())}"
        if isinstance(each, OSError) and each.errno is not None:
            text += f" ({os.strerror(each.errno)})"
        sentence = recognised(text, stage, recipe, folder)
        if sentence:
            return f"{sentence} ({shortened(text)})"
    return None


def recognised(text: str, stage: str, recipe: Recipe, folder: Path) -> str | None:
    """The sentence for an error's text, or for what a process left in its log.

    Args:
        folder: what the stage writes to.
    """
    if NO_MEMORY.search(text):
        return f"ran out of memory: {less_memory(stage, recipe)}"
    if NO_SPACE.search(text) or (TORCH_WRITE.search(text) and full(folder)):
        return no_space(folder)
    if READ_ONLY.search(text):
        return f"could not write: {folder} is read-only; {elsewhere()}"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those it came from."""
    while error:
        yield error
        error = error.__cause__ or error.__context__


def shortened(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def cause(
    said: dict[str, Any], code: int, lines: Sequence[str], starved: bool, stage: str, recipe: Recipe, folder: Path
) -> str:
    """What to tell about a stage's process that failed: `failed: ...`, `ran out of memory: ...`.

    Args:
        said: what it left in `error.json`, or the parent of several: {rank, ranks, code} of one that a signal killed.
        code: its exit status; below 0 it is the signal's.
        lines: the last ones of its log.
        starved: the kernel has killed for want of memory since it began.
    """
    if "message" in said:
        return said.get("cause") or f"failed: {said['message']}"
    lost = f"ended with its rank {said['rank']} of {said['ranks']}, which " if said else ""
    code = int(said.get("code", code))
    if code == -signal.SIGKILL and starved:
        return lost + killed_for_memory(stage, recipe)
    recognisable = recognised("\n".join(lines), stage, recipe, folder)
    if recognisable:
        return recognisable
    if full(folder):  # it may not have been able to say so
        return no_space(folder)
    if code < 0:
        hint = "; was this machine out of memory?" if code == -signal.SIGKILL else ""
        return f"{lost}was killed by {signal.Signals(-code).name}{hint}"
    return f"ended with status {code}"


# ---- memory


def less_memory(stage: str, recipe: Recipe) -> str:
    """What lowers a stage's memory: `set runtime.micro_batch_size below 8 or runtime.gradient_checkpointing=true`."""
    ways = []
    for key in LOWER.get(stage, ()):
        section, name = key.split(".")
        value = getattr(getattr(recipe, section), name)
        if value is False:
            ways.append(f"{key}=true")
        elif value is not True and value > 1:
            ways.append(f"{key} below {value}")
    if not ways:
        return "nothing in the recipe lowers it further; use a machine with more"
    free = all(key.startswith("runtime.") for key in LOWER[stage])
    note = "; it then goes on from where it is" if free else ""
    return f"set {' or '.join(ways)}{note}"


def oom_kills() -> int:
    """How many processes the kernel has killed for want of memory, in this control group, or else on this machine.

    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    for path in (*(folder / name for folder in memory_groups() for name in ("memory.events", "memory.oom_control")),):
        found = counter(path)
        if found is not None:
            return found
    return counter(Path("/proc/vmstat")) or 0


def memory_limit() -> int | None:
    """Bytes that this control group may have; None without a limit."""
    for path in (folder / name for folder in memory_groups() for name in ("memory.max", "memory.limit_in_bytes")):
        try:
            limit = int(path.read_text())
        except (OSError, ValueError):  # "max"
            continue
        return limit if limit < 2**60 else None
    return None


def memory_groups() -> list[Path]:
    """The folders of this process's control group, of both versions, that may know of memory."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    root, found = Path("/sys/fs/cgroup"), []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [root / path.lstrip("/"), root]
        elif "memory" in controllers.split(","):
            found += [root / "memory" / path.lstrip("/"), root / "memory"]
    return found


def counter(path: Path) -> int | None:
    """The `oom_kill` of a file of names and numbers."""
    try:
        values = dict(line.split() for line in path.read_text().splitlines())
        return int(values["oom_kill"])
    except (OSError, ValueError, KeyError):
        return None


def killed_for_memory(stage: str, recipe: Recipe) -> str:
    """The sentence for a process that the kernel killed."""
    limit = memory_limit()
    of = f" (the limit here is {size(limit)})" if limit else ""
    return f"was killed by the kernel, which was out of memory{of}: {less_memory(stage, recipe)}"


# ---- disk


def full(folder: Path) -> bool:
    """Whether the disk that the folder is on has no room."""
    try:
        return shutil.disk_usage(folder).free < FULL
    except OSError:
        return False


def no_space(folder: Path) -> str:
    """The sentence for a full disk. (What could not be written whole may be gone again, and have left room.)"""
    try:
        usage = shutil.disk_usage(folder)
        room = f" ({size(usage.free)} of {size(usage.total)} are free now)"
    except OSError:
        room = ""
    return f"could not write: the disk of {folder}, or its quota, is full{room}; make room there, or {elsewhere()}"


def elsewhere() -> str:
    return "set runtime.output_dir to a folder on another disk"


def writing(error: OSError, folder: Path = Path()) -> str:
    """The sentence for an error of the runner's own, which writes to the folder."""
    path = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(folder if error.filename is None else Path(path).parent)
    if error.errno == errno.EROFS:
        return f"could not write: {path} is on a read-only file system; {elsewhere()}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"could not write: there is no permission for {path}; grant it, or {elsewhere()}"
    return f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}"


def size(count: float) -> str:
    """`512 MiB`, `1.5 GiB`: of bytes."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB"
