"""How far a stage is: it writes `progress.json`, the runner reads it for the display."""

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = "progress.json"
INTERVAL = 0.2  # seconds between two writes; a step may take a millisecond


class Progress:
    """Tells the display where a stage is.

    Args:
        folder: the stage's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.written = -INTERVAL
        self.start: tuple[float, int] | None = None  # time and step of the first update: a resumed stage begins later

    def update(self, step: int, total: int, **numbers: float) -> None:
        """Step `step` of `total` is done; `numbers` are those worth watching. Cheap enough to call at every step."""
        now = time.time()
        self.start = self.start or (now, step)
        if time.monotonic() - self.written < INTERVAL and step != total:
            return
        self.written = time.monotonic()
        started, first = self.start
        state = {"step": step, "total": total, "first": first, "started": started, "now": now}
        temporary = self.path.with_name(f"{FILE}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(state | {"numbers": {name: float(n) for name, n in numbers.items()}}))
        temporary.replace(self.path)


@dataclass(frozen=True)
class Snapshot:
    """What a stage last wrote."""

    step: int
    total: int
    numbers: dict[str, float] = field(default_factory=dict)
    seconds_left: float | None = None


def read_progress(folder: Path) -> Snapshot | None:
    """Where the stage that writes into the folder is; None before its first step."""
    try:
        state: dict[str, Any] = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    done, spent = state["step"] - state["first"], state["now"] - state["started"]
    left = spent / done * (state["total"] - state["step"]) if done > 0 else None
    return Snapshot(state["step"], state["total"], state["numbers"], left)
