"""What a run looks like: a line a stage that moves on a terminal, plain lines elsewhere."""

import sys
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any, Protocol, Self

from instructrl.progress import Snapshot

PLAIN_SECONDS = 10  # between two plain lines of one stage


class Display(Protocol):
    """What the runner tells. Called from several threads."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def start(self, stage: str, log: Path) -> None:
        """The stage's process has started."""

    def update(self, stage: str, snapshot: Snapshot) -> None:
        """How far it is."""

    def refresh(self) -> None:
        """Called a few times a second."""

    def end(self, stage: str, seconds: float, metrics: dict[str, Any]) -> None:
        """Its artifact is there."""

    def drop(self, stage: str) -> None:
        """It ended without an artifact; the error follows."""

    def say(self, text: str) -> None:
        """Anything else worth a line."""


def open_display() -> Display:
    """The display for the standard output there is."""
    return Live() if sys.stdout.isatty() else Plain()


class Plain:
    """A line when a stage starts and ends, and one every ten seconds in between."""

    def __init__(self) -> None:
        self.last: dict[str, tuple[float, Snapshot]] = {}
        self.guard = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, stage: str, log: Path) -> None:
        """`sft: started, log in ...`."""
        self.last[stage] = (time.monotonic(), Snapshot(-1, 0))
        self.say(f"{stage}: started, log in {log}")

    def update(self, stage: str, snapshot: Snapshot) -> None:
        """`sft: step 40 of 200, 1 min left, loss 2.31`, if the last such line is ten seconds old."""
        then, last = self.last.setdefault(stage, (time.monotonic(), Snapshot(-1, 0)))
        if time.monotonic() - then < PLAIN_SECONDS or snapshot == last:
            return
        self.last[stage] = (time.monotonic(), snapshot)
        left = f"{duration(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
        parts = [f"step {snapshot.step} of {snapshot.total}", left, numbers(snapshot.numbers)]
        self.say(f"{stage}: {', '.join(part for part in parts if part)}")

    def refresh(self) -> None:
        """Nothing: a line stays as it is."""

    def end(self, stage: str, seconds: float, metrics: dict[str, Any]) -> None:
        """`sft: done in 1 min 5 s, loss 2.31`."""
        self.last.pop(stage, None)
        self.say(finished(stage, seconds, metrics))

    def drop(self, stage: str) -> None:
        """Nothing: the error follows."""
        self.last.pop(stage, None)

    def say(self, text: str) -> None:
        """One line, at once."""
        with self.guard:
            print(text, flush=True)


class Live:
    """A line for each running stage: a bar, the step, the time left, and the numbers that matter.

    Rich's own thread is not used: one that redraws while another prints now and then erases a line above.
    """

    def __init__(self) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[where]}"),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[numbers]}"),
            auto_refresh=False,
        )
        self.tasks: dict[str, Any] = {}
        self.guard = threading.RLock()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        for stage in list(self.tasks):
            self.drop(stage)
        self.progress.stop()

    def start(self, stage: str, log: Path) -> None:
        """A new line; its bar pulses until the first step."""
        with self.guard:
            self.task(stage)
            self.progress.refresh()

    def task(self, stage: str) -> Any:
        """The stage's line."""
        if stage not in self.tasks:
            self.tasks[stage] = self.progress.add_task(stage, total=None, where="starting", left="", numbers="")
        return self.tasks[stage]

    def update(self, stage: str, snapshot: Snapshot) -> None:
        """Move the bar."""
        left = f"{duration(snapshot.seconds_left)} left" if snapshot.seconds_left is not None else ""
        with self.guard:
            self.progress.update(
                self.task(stage),
                total=snapshot.total or None,
                completed=snapshot.step,
                where=f"{snapshot.step}/{snapshot.total}",
                left=left,
                numbers=numbers(snapshot.numbers),
            )

    def refresh(self) -> None:
        """Draw the lines as they are now."""
        with self.guard:
            self.progress.refresh()

    def end(self, stage: str, seconds: float, metrics: dict[str, Any]) -> None:
        """The line leaves, and a plain one stays above."""
        with self.guard:
            self.drop(stage)
            self.say(finished(stage, seconds, metrics))

    def drop(self, stage: str) -> None:
        """The line leaves."""
        with self.guard:
            if stage in self.tasks:
                self.progress.remove_task(self.tasks.pop(stage))
                self.progress.refresh()

    def say(self, text: str) -> None:
        """A line above the moving ones."""
        with self.guard:
            self.progress.console.print(text, markup=False, highlight=False)


def finished(stage: str, seconds: float, metrics: dict[str, Any]) -> str:
    """The line of a stage that is done."""
    told = numbers({name: value for name, value in metrics.items() if is_number(value)}, most=4)
    return f"{stage}: done in {duration(seconds)}{', ' if told else ''}{told}"


def numbers(values: dict[str, float], most: int = 6) -> str:
    """`loss 2.31, accuracy 0.64`."""
    return ", ".join(f"{name} {number(value)}" for name, value in list(values.items())[:most])


def number(value: float) -> str:
    """Three digits, and never an exponent for what a person counts."""
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def is_number(value: object) -> bool:
    """Whether JSON's value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def duration(seconds: float) -> str:
    """`4.2 s`, `1 min 5 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def printable(text: str) -> str:
    """Control, direction and other invisible characters as escapes, so that they cannot change what surrounds them."""
    shown = []
    for letter in text.replace("\r\n", "\n"):
        hidden = unicodedata.category(letter) in ("Cc", "Cf", "Co", "Cs", "Zl", "Zp") and letter not in "\n\t"
        shown.append(f"\\u{ord(letter):04x}" if hidden else letter)
    return "".join(shown)
