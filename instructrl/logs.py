"""The log of a stage, and what is added to it while the stage runs."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from instructrl.display import printable
from instructrl.errors import UserError
from instructrl.find import Place
from instructrl.inventory import locked

POLL_SECONDS = 0.2


def show_log(place: Place, follow: bool, lines: int | None) -> None:
    """Print the log's last lines, all if `lines` is None, and if asked to what comes until the stage ends.

    Raises:
        UserError: there is no log.
    """
    log = place.log
    if log is None:
        raise UserError(f"{place.stage} has no log: it was never begun ({place.path}).")
    with log.open("rb") as file:
        text = file.read()
        whole, newline, rest = text.rpartition(b"\n")
        shown = list(readable(whole.split(b"\n") if newline else []))  # not splitlines: a bar writes \r
        for line in shown[len(shown) - lines if lines is not None and lines < len(shown) else 0 :]:
            print(line)
        if follow:
            for line in readable(added(file, rest, place)):
                print(line, flush=True)
        elif rest:
            print(*readable([rest]))
    sys.stdout.flush()


def added(file: BinaryIO, rest: bytes, place: Place) -> Iterator[bytes]:
    """The lines that a running stage adds, until it ends.

    Args:
        rest: the beginning of a line that the log ends with so far.
    """
    running = True
    while running:
        # asked before the last read, or what was written in between would be lost; a log without a name is nobody's
        running = locked(place.partial) and os.fstat(file.fileno()).st_nlink > 0
        for line in iter(file.readline, b""):
            rest += line
            if rest.endswith(b"\n"):
                yield rest
                rest = b""
        if running:
            time.sleep(POLL_SECONDS)
    if rest:
        yield rest


def readable(lines: Iterable[bytes]) -> Iterator[str]:
    """Lines for a terminal: of one that a progress bar rewrote the last state, control characters as escapes."""
    for line in lines:
        yield printable(line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2])
