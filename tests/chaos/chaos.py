"""`make chaos`: faults at random moments in every stage; then the same command again, and all is as if nothing was.

A trial takes a copy of a finished run, deletes one stage's artifact, has it made again, and does to it one of the
faults below. Then the command is repeated until it succeeds. After that

    every folder with a manifest is whole
    every stage that was finished still is, unless the fault took it and nothing needed it
    every artifact is to the byte that of the run that nothing was done to, and so is its log but for times

The moments are drawn from a seed. Prints a line a trial and a table; the folder of a trial that went wrong is kept.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import psutil

from instructrl.artifacts import MANIFEST, Artifact
from instructrl.key import Hashes
from instructrl.pipeline import LAST, Stage, stages
from instructrl.recipe import load_recipe
from instructrl.verification import verify

ROOT = Path(__file__).resolve().parents[2]
RECIPE = Path(__file__).with_name("chaos.yaml")
ATTEMPTS = 4  # to bring it to its end after the fault
PATIENCE = 600  # seconds that one command may take
CLOCK_JUMPS = ("-400d", "-1h", "+1h", "+400d")
FAKETIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)


@cache
def pipeline() -> dict[str, Stage]:
    """The stages, upstream first. (Hydra composes for one thread at a time: ask before threads begin.)"""
    return stages(load_recipe([f"recipe={RECIPE}"]))


@dataclass
class Trial:
    """One run that something is done to."""

    folder: Path
    stage: str
    moment: float  # seconds after its start
    rng: random.Random
    ranks: int = 1  # processes of the stage
    command: str = ""  # by default the stage's own
    environment: dict[str, str] = field(default_factory=dict)
    beside: list[subprocess.Popen[bytes]] = field(default_factory=list)  # further runners
    undo: list[Callable[[], None]] = field(default_factory=list)
    said: str = ""
    met: bool = False  # whether it was still running then
    runner: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Path:
        return self.folder / "artifacts"

    def start(self) -> subprocess.Popen[bytes]:
        """The command, in a process of its own; what it prints is added to `output.txt`."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | self.environment
        command = [sys.executable, "-m", "instructrl", self.command or self.stage.replace("_", "-")]
        command += [f"recipe={RECIPE}", f"runtime.output_dir={self.store}", f"runtime.num_processes={self.ranks}"]
        with (self.folder / "output.txt").open("ab") as output:
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL)

    def workers(self) -> list[psutil.Process]:
        """The processes of stages that the runner has started."""
        try:
            return psutil.Process(self.runner.pid).children()
        except psutil.NoSuchProcess:
            return []

    def pids_of_ranks(self) -> list[int]:
        """The processes that share the stage's work, from rank 0."""
        found = {}
        for process in [child for worker in self.workers() for child in worker.children()]:
            with suppress(psutil.NoSuchProcess):
                found[process.environ().get("RANK", "")] = process.pid
        return [pid for rank, pid in sorted(found.items()) if rank]

    def inputs(self) -> list[Path]:
        """The artifacts that the stage is made from."""
        needs = pipeline()[self.stage].needs
        return [manifest.parent for need in needs for manifest in self.store.glob(f"{need}/*/{MANIFEST}")]


# ---- faults


def kill_runner(number: signal.Signals) -> Callable[[Trial], None]:
    return lambda trial: trial.runner.send_signal(number)


def kill_worker(number: signal.Signals) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        for worker in trial.workers():
            worker.send_signal(number)

    return fault


def kill_rank(number: signal.Signals) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        ranks = trial.pids_of_ranks()
        if ranks:
            rank = trial.rng.randrange(len(ranks))
            trial.said = f"rank {rank}"
            with suppress(ProcessLookupError):
                os.kill(ranks[rank], number)

    return fault


def fill_disk(trial: Trial) -> None:
    """A few kilobytes are left on the file system of the artifacts, which is one of its own."""
    size = shutil.disk_usage(trial.store)
    filler = trial.store / "filler"
    with filler.open("wb") as file:
        file.write(bytes(max(0, size.free - trial.rng.choice((0, 4096, 65536, 300_000)))))
    trial.undo.append(filler.unlink)


def read_only(trial: Trial) -> None:
    """No file can be made, renamed or deleted in any folder of the store."""
    folders = [trial.store, *(path for path in trial.store.rglob("*") if path.is_dir())]
    root = os.geteuid() == 0  # whom permissions do not stop, but the attribute does

    def set_all(on: bool) -> None:
        for folder in folders:
            if root and folder.exists():
                subprocess.run(["chattr", "+i" if on else "-i", folder], capture_output=True, check=False)
            elif folder.exists():
                folder.chmod(0o555 if on else 0o755)

    set_all(True)
    trial.undo.append(lambda: set_all(False))


def delete_input(trial: Trial) -> None:
    chosen = trial.rng.choice(trial.inputs())
    trial.said = chosen.parent.name
    shutil.rmtree(chosen)


def flip_byte(trial: Trial) -> None:
    """One bit of one published file, manifest included, of what the stage is made from."""
    chosen = trial.rng.choice(trial.inputs())
    file = trial.rng.choice(sorted(path for path in chosen.rglob("*") if path.is_file() and path.stat().st_size))
    trial.said = f"{chosen.parent.name}/{file.relative_to(chosen)}"
    with file.open("r+b") as opened:
        position = trial.rng.randrange(file.stat().st_size)
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << trial.rng.randrange(8)]))


def second_run_all(trial: Trial) -> None:
    """Both make the stage and then, as nothing else changed, `eval`."""
    trial.beside.append(trial.start())


def move_clock(trial: Trial) -> None:
    (trial.folder / "clock").write_text(trial.rng.choice(CLOCK_JUMPS))


SECOND = "second run-all"
FAULTS: dict[str, Callable[[Trial], None]] = {
    "SIGKILL to the runner": kill_runner(signal.SIGKILL),
    "SIGTERM to the runner": kill_runner(signal.SIGTERM),
    "SIGINT to the runner": kill_runner(signal.SIGINT),
    "SIGKILL to the worker": kill_worker(signal.SIGKILL),
    "SIGTERM to the worker": kill_worker(signal.SIGTERM),
    "SIGINT to the worker": kill_worker(signal.SIGINT),
    "SIGKILL to one rank of two": kill_rank(signal.SIGKILL),
    "SIGTERM to one rank of two": kill_rank(signal.SIGTERM),
    "SIGINT to one rank of two": kill_rank(signal.SIGINT),
    "disk full": fill_disk,
    "folder read-only": read_only,
    "input deleted": delete_input,
    "bit of an input flipped": flip_byte,
    SECOND: second_run_all,
    "clock moved": move_clock,
}
TWO_RANKS = tuple(fault for fault in FAULTS if fault.endswith("of two"))
UNHARMED = (SECOND, "clock moved")  # the run itself must succeed


def possible(scratch: Path) -> Iterator[tuple[str, str]]:
    """The faults that cannot be provoked here, and why."""
    if os.geteuid():
        yield "disk full", "mounting a small file system needs root"
    elif subprocess.run(["chattr", "-i", scratch], capture_output=True, check=False).returncode:
        yield "folder read-only", "as root it needs chattr and a file system that knows it"
    if FAKETIME is None:
        yield "clock moved", "it needs libfaketime (Debian: apt install faketime)"


# ---- a trial


def prepare(trial: Trial, fault: str, reference: Path) -> None:
    """A copy of the finished run without the stage, on a small file system or under a clock of its own if need be."""
    trial.store.mkdir(parents=True)
    if fault == "disk full":
        used = sum(path.stat().st_size + 8192 for path in reference.rglob("*"))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={2 * used + 2**24}", "tmpfs", trial.store], check=True)
    shutil.copytree(reference, trial.store, dirs_exist_ok=True)
    shutil.rmtree(trial.store / trial.stage)
    if fault == SECOND:
        trial.command = "run-all"
        shutil.rmtree(trial.store / LAST, ignore_errors=True)
    if fault == "clock moved":
        (trial.folder / "clock").write_text("+0")
        # a moved clock moves the time of day, never the monotonic clock
        trial.environment = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(trial.folder / "clock"),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }


def run(trial: Trial, fault: str) -> list[str]:
    """Start, do it, and run again to the end. What went wrong."""
    problems: list[str] = []
    trial.runner = trial.start()
    time.sleep(trial.moment)
    trial.met = trial.runner.poll() is None
    FAULTS[fault](trial)
    codes = [process.wait(PATIENCE) for process in (trial.runner, *trial.beside)]
    if fault in UNHARMED and any(codes):
        problems.append(f"exit codes {codes}")
    for undo in reversed(trial.undo):
        undo()
    for _ in range(ATTEMPTS):
        code = trial.start().wait(PATIENCE)
        if code == 0:
            break
    else:
        problems.append(f"exit code {code} in {ATTEMPTS} attempts")
    output = (trial.folder / "output.txt").read_text(errors="replace")
    own = "\n".join(line for line in output.splitlines() if not line.startswith("  | "))  # a stage's log may have one
    for stage in {trial.stage, LAST} if fault == SECOND else ():
        if own.count(f"{stage}: started") != 1:
            problems.append(f"{stage} was started {own.count(f'{stage}: started')} times")
    return problems + ["a traceback"] * ("Traceback" in own)


def differences(trial: Trial, reference: Path) -> list[str]:
    """How the trial's artifacts are other than those of the run that nothing was done to."""
    problems = []
    for manifest in sorted(reference.glob(f"*/*/{MANIFEST}")):
        path = manifest.parent.relative_to(reference)
        if not (trial.store / path / MANIFEST).exists():
            if path.parts[0] != trial.stage and trial.said.split("/")[0] == path.parts[0]:
                continue  # the fault took it, and nothing needed it
            problems.append(f"{path} is lost")
            continue
        try:
            found, expected = Artifact.read(trial.store / path), Artifact.read(reference / path)
            damage = found.damage(Hashes())
        except ValueError as error:
            damage = str(error)
        if damage:
            if path.parts[0] != trial.stage and trial.said.split("/")[0] == path.parts[0]:
                continue
            problems.append(f"{path}: {damage}")
        elif found.digest != expected.digest:
            problems.append(f"{path} is another")
        elif trial.said == f"{path.parts[0]}/log.jsonl":  # the fault's: no stage reads it, so that only verify looks
            problems += [] if verify(found.path).noted else [f"{path}: verify finds nothing"]
        elif log(found.path) != log(expected.path):
            problems.append(f"{path}: another log")
    return problems


def log(folder: Path) -> list[dict]:
    """What training logged, without what depends on the clock."""
    file = folder / "log.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [{key: value for key, value in line.items() if not is_time(key)} for line in lines]


def is_time(name: str) -> bool:
    return "second" in name or "runtime" in name or name in ("eps", "tokens_per_s")


@dataclass(frozen=True)
class Outcome:
    """What became of one trial."""

    number: int
    fault: str
    stage: str
    moment: float
    met: bool
    said: str
    problems: list[str]
    seconds: float


@dataclass(frozen=True)
class Reference:
    """The run that nothing was done to."""

    store: Path
    durations: dict[str, float]  # stage -> seconds, as a command of its own
    ranks: int = 1

    def stages(self, fault: str) -> list[str]:
        """Those that the fault can be done to."""
        shared = [name for name in self.durations if self.ranks == 1 or pipeline()[name].distributed]
        if fault == SECOND:  # run-all makes what `eval` needs
            return [name for name in shared if name in (*pipeline()[LAST].needs, LAST)]
        return [name for name in shared if name != "data" or "input" not in fault]


def attempt(number: int, seed: int, scratch: Path, references: Mapping[int, Reference], faults: list) -> Outcome:
    """One trial, the same for the same number and seed but for the machine's pace."""
    rng = random.Random(f"{seed} {number}")
    fault = faults[number % len(faults)]
    reference = references[ranks_for(fault)]
    stage = rng.choice(reference.stages(fault))
    moment = rng.uniform(0.2, 1.05 * reference.durations[stage])
    trial = Trial(scratch / f"trial-{number}", stage, moment, rng, reference.ranks)
    began = time.monotonic()
    prepare(trial, fault, reference.store)
    try:
        problems = run(trial, fault) + differences(trial, reference.store)
    except subprocess.TimeoutExpired:
        problems = [f"still running after {PATIENCE} s"]
    finally:
        for process in (trial.runner, *trial.beside):
            if process and process.poll() is None:
                process.kill()
    if problems:
        shutil.copytree(trial.store, trial.folder / "kept", dirs_exist_ok=True)
    if os.path.ismount(trial.store):
        subprocess.run(["umount", "--lazy", trial.store], check=False)
    if not problems:
        shutil.rmtree(trial.folder)
    return Outcome(number, fault, stage, trial.moment, trial.met, trial.said, problems, time.monotonic() - began)


def ranks_for(fault: str) -> int:
    return 2 if fault in TWO_RANKS else 1


def undisturbed(folder: Path, targets: list[str], ranks: int) -> Reference:
    """Make the stages once, each by a command of its own."""
    folder.mkdir()
    durations = {}
    for name in targets:
        trial = Trial(folder, name, 0, random.Random(0), ranks)
        began = time.monotonic()
        if trial.start().wait(PATIENCE):
            raise SystemExit((folder / "output.txt").read_text())
        durations[name] = time.monotonic() - began
    spelt = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in durations.items())
    print(f"undisturbed{', two ranks' if ranks == 2 else ''}: {spelt}", flush=True)
    return Reference(trial.store, durations, ranks)


def table(outcomes: list[Outcome]) -> str:
    """Fault, how often, how often while the command still ran, and the outcome."""
    rows = [("fault", "times", "while it ran", "outcome")]
    for fault in (*FAULTS, "in all"):
        its = [outcome for outcome in outcomes if fault in (outcome.fault, "in all")]
        wrong = sum(bool(outcome.problems) for outcome in its)
        if its:
            rows.append((fault, len(its), sum(outcome.met for outcome in its), f"{wrong or 'none'} wrong"))
    return "\n".join(f"{fault:<26}{times:>6}{met:>15}   {outcome}" for fault, times, met, outcome in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split(";")[0])
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    parser.add_argument("--first", type=int, default=0, help="number of the first trial, to repeat one")
    parser.add_argument("--fault", choices=FAULTS, help="only this one")
    parser.add_argument("--until", default="eval", help="the last stage that anything is done to")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary one")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="chaos-", dir=options.folder))
    targets = list(pipeline())[: list(pipeline()).index(options.until) + 1]
    missing = dict(possible(scratch))
    if not any(pipeline()[name].distributed for name in targets):
        missing |= dict.fromkeys(TWO_RANKS, "none of these stages shares its work")
    if LAST not in targets:
        missing[SECOND] = "it makes all stages"
    for fault, why in missing.items():
        print(f"left out: {fault}: {why}")
    faults = [fault for fault in FAULTS if fault not in missing and options.fault in (None, fault)]
    numbers = range(options.first, options.first + options.faults)
    needed = sorted({ranks_for(faults[number % len(faults)]) for number in numbers})
    references = {ranks: undisturbed(scratch / f"undisturbed-{ranks}", targets, ranks) for ranks in needed}
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as threads:
        for outcome in threads.map(lambda number: attempt(number, options.seed, scratch, references, faults), numbers):
            outcomes.append(outcome)
            words = [f"{outcome.number:>4}", f"{outcome.fault}, {outcome.stage} after {outcome.moment:.1f} s"]
            words += [
                "" if outcome.met else "(at its end)",
                outcome.said,
                "; ".join(outcome.problems).upper() or "as if nothing was",
                f"{outcome.seconds:.0f} s",
            ]
            print("  ".join(filter(None, words)), flush=True)
    print(table(outcomes))
    wrong = any(outcome.problems for outcome in outcomes)
    if wrong:
        print(f"What went wrong is kept in {scratch}")
    else:
        shutil.rmtree(scratch)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
