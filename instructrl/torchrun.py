"""The parent of a stage's ranks: `torch.distributed.run`, with the signals and the errors that a runner needs.

`python -m instructrl.torchrun OPTIONS -m instructrl.worker FOLDER`, with torchrun's OPTIONS.

torchrun kills its ranks 30 seconds after SIGTERM, and an iteration of PPO may take longer than that to be saved. Here
SIGTERM goes on to the ranks, which save and leave when they can.
"""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from instructrl.artifacts import ERROR, write_atomically

SAVED_AND_STOPPED = 75  # sysexits.h EX_TEMPFAIL


def main(arguments: Sequence[str]) -> int:
    """Run the ranks of this machine to their end. Returns the exit status of the stage."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    signal.signal(signal.SIGTERM, pass_on)
    options = run.parse_args(["--signals-to-handle=SIGQUIT", *arguments])
    try:
        run.run(options)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        ranks = int(options.nproc_per_node) * int(options.nnodes.rpartition(":")[2])  # "1:1", or "2"
        return ended(codes, ranks, Path(arguments[-1]))
    return 0


def pass_on(number: int, _: object = None) -> None:
    """The handler of SIGTERM. (Ranks are sessions of their own: a signal to our process group does not reach them.)"""
    import psutil

    ranks = psutil.Process().children()
    if not ranks:  # there is nothing to save yet
        os._exit(SAVED_AND_STOPPED)
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)


def ended(codes: Mapping[int, int], ranks: int, folder: Path) -> int:
    """The exit status of a stage whose ranks ended with these; a rank that a signal killed leaves no word, so that
    `error.json` is to name it, whatever the others said when they lost it.

    Args:
        codes: rank -> its exit status, of those that ended otherwise than by finishing; below 0 it is the signal's.
    """
    killed = {rank: code for rank, code in codes.items() if code < 0}
    mercilessly = {rank: code for rank, code in killed.items() if code != -signal.SIGTERM}
    if SAVED_AND_STOPPED in codes.values() and not mercilessly:
        return SAVED_AND_STOPPED
    killed = mercilessly or killed
    if killed:
        rank = min(killed)
        with suppress(OSError):
            write_atomically(folder / ERROR, json.dumps({"rank": rank, "ranks": ranks, "code": killed[rank]}))
        return 1
    return next(iter(codes.values()), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
