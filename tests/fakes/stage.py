"""A stage that sleeps, saves checkpoints and resumes, as its line in `script.json` says:

{"sft": {"steps": 5, "seconds": 0.1, "end": "crash", "random": true, "until": "file", "metric": "sft.epochs"}}
"""

import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path

from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.key import digest
from instructrl.progress import Progress


def run(name: str, recipe: Recipe, inputs: dict[str, Path], folder: Path) -> dict:
    script = json.loads(Path("script.json").read_text()).get(name, {}) if Path("script.json").exists() else {}
    end, steps = script.get("end"), script.get("steps", 1)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    if int(os.environ.get("RANK", "0")):
        return other_rank(folder, end, stopped)
    done = [int(mark.parent.name.split("-")[1]) for mark in folder.glob("checkpoints/checkpoint-*/COMPLETE")]
    first = max(done, default=0)
    note(f"{name} from {first}")
    if end == "user error":
        raise UserError("my.jsonl:3: this line is no JSON.")
    progress = Progress(folder)
    for step in range(first + 1, steps + 1):
        time.sleep(script.get("seconds", 0))
        save(folder, step)
        progress.update(step, steps, loss=1 / step)
        if stopped:
            sys.exit(75)
        if end == "crash":
            print("about to crash")
            raise RuntimeError("out of\ncheese")
        if end in FAULTS:
            FAULTS[end](folder)
        if end == "kill" and step == steps - 1:
            (folder / "half.txt").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    while not Path(script.get("until", ".")).exists():  # what a test waits for may take any time on a busy machine
        time.sleep(0.02)
    content = {need: (path / "out.txt").read_text() for need, path in inputs.items()}
    content |= {"seed": str(recipe.seed), "random": uuid.uuid4().hex if script.get("random") else ""}
    (folder / "half.txt").unlink(missing_ok=True)
    (folder / "out.txt").write_text(digest(content | {"name": name}))
    (folder / "metrics.json").write_text(json.dumps({"table": TABLE}) if name == "eval" else "{}")
    metrics = {"loss": 0.25, "lost": float("nan")}
    if "metric" in script:  # the value of a key
        section, key = script["metric"].split(".")
        metrics["metric"] = getattr(getattr(recipe, section), key)
    return metrics


def other_rank(folder: Path, end: str | None, stopped: list[int]) -> dict:
    """What a rank does that writes nothing: it is killed once there is a checkpoint, or works as long as rank 0."""
    while not stopped and not (folder / "out.txt").exists():
        if end == "lose rank" and list(folder.glob("checkpoints/*/COMPLETE")):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
    if stopped:
        sys.exit(75)
    return {}


def full(folder: Path) -> None:
    """As a disk without room does it."""
    with Path("/dev/full").open("w") as file:
        file.write("x")


def fill(folder: Path) -> None:
    """Write until the disk is full, or 64 MiB."""
    with (folder / "big").open("wb") as file:
        for _ in range(64):
            file.write(bytes(2**20))


def starve(folder: Path) -> None:
    """Ask for more memory than `ulimit -v` allows."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    bytearray(2**32)


def eat(folder: Path) -> None:
    """Take memory until the kernel minds, or 1 GiB."""
    kept = []
    for _ in range(64):
        kept.append(b"x" * 2**24)


FAULTS = {"full": full, "fill": fill, "starve": starve, "eat": eat}

TABLE = {"columns": ["model", "wins"], "rows": [["GPT", 0.1], ["PPO", 0.75]], "notes": ["Judged by nobody."]}


def save(folder: Path, step: int) -> None:
    checkpoint = folder / "checkpoints" / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "COMPLETE").touch()


def note(text: str) -> None:
    with Path("ran.log").open("a") as file:
        file.write(f"{text}\n")
