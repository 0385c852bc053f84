"""Runs a plan: one process a stage, so a crash or a leak in one never reaches the next. Never imports torch."""

import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

from instructrl import __version__
from instructrl.artifacts import ERROR, LOG, ORDER, RESULT, Artifact, Store, read_json, write_atomically
from instructrl.config import Recipe
from instructrl.display import Display
from instructrl.errors import StageFailed, UserError
from instructrl.failure import cause, oom_kills, writing
from instructrl.launch import environment
from instructrl.packages import packages
from instructrl.plan import StagePlan, checkpoint_steps, continues, origin
from instructrl.progress import read_progress

SAVED_AND_STOPPED = 75  # sysexits.h EX_TEMPFAIL: the stage was asked to stop, saved a checkpoint and left
POLL_SECONDS = 0.2
LOG_LINES = 15  # of a failed stage's log


class Stopped(UserError):
    """The run was stopped by a signal, after its stages saved what they had."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


def run_plan(
    plan: Sequence[StagePlan],
    recipe: Recipe,
    store: Store,
    display: Display,
    command: Sequence[str] = ("instructrl",),
    began: float | None = None,
) -> dict[str, Artifact]:
    """Run what the plan says must run. Returns every artifact of the plan that exists afterwards.

    Args:
        command: what was typed, for the message that says how to go on.
        began: when it was typed, in seconds since the epoch; what was made since is not made again, even if forced.

    Raises:
        UserError: the recipe or its data is wrong, as a stage found out.
        StageFailed: a stage's process ended with an error; the stages beside it were allowed to finish.
        Stopped: on SIGINT, SIGTERM or SIGHUP.
    """
    run = Run(plan, recipe, store, display, command, time.time() if began is None else began)
    try:
        with run.signals(), display:
            run.loop()
    finally:
        with suppress(OSError):  # it is of use to the next plan only
            store.remember(recipe.name, {p.stage.name: p.key for p in plan if p.stage.name in run.artifacts})
    run.conclude()
    return run.artifacts


class Run:
    """A plan as it is being run: one thread a running stage, which waits for the stage's process."""

    def __init__(
        self,
        plan: Sequence[StagePlan],
        recipe: Recipe,
        store: Store,
        display: Display,
        command: Sequence[str],
        began: float,
    ) -> None:
        self.plan = {step.stage.name: step for step in plan}
        self.recipe, self.store, self.display, self.command = recipe, store, display, command
        self.artifacts = {step.stage.name: step.artifact for step in plan if step.artifact and not step.runs}
        self.failures: dict[str, Exception] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.guard = threading.Lock()  # a process is either started before a stop, and gets its signal, or not at all
        self.stop_signal = 0
        self.began = began

    def loop(self) -> None:
        """Start each stage once those it needs are done, `runtime.jobs` at a time, until all are done or one failed."""
        names = [name for name, step in self.plan.items() if step.runs]
        sorter = TopologicalSorter({name: set(self.plan[name].stage.needs) & {*names} for name in names})
        sorter.prepare()
        ready: list[str] = []
        announced = False
        futures: dict[Future[Artifact], str] = {}
        with ThreadPoolExecutor(self.recipe.runtime.jobs) as threads:
            while True:
                ready += sorter.get_ready() if sorter.is_active() else ()
                while ready and len(futures) < self.recipe.runtime.jobs and not self.failures and not self.stop_signal:
                    name = min(ready, key=names.index)
                    ready.remove(name)
                    futures[threads.submit(self.build, self.plan[name])] = name
                if not futures:
                    return
                for future in wait(futures, POLL_SECONDS, FIRST_COMPLETED).done:
                    name = futures.pop(future)
                    error = future.exception()
                    if error is None:
                        self.artifacts[name] = future.result()
                        self.store.remember(self.recipe.name, {name: self.plan[name].key})
                        sorter.done(name)
                    elif isinstance(error, OSError):
                        self.failures[name] = StageFailed(f"{name} {writing(error, self.store.root)}.")
                    elif isinstance(error, Exception):
                        self.failures[name] = error
                if self.stop_signal and not announced:  # not in the handler: it may interrupt a print
                    announced = True
                    self.display.say("Stopping: waiting for the stages to save. A second signal kills them.")
                for name in futures.values():
                    snapshot = read_progress(self.store.partial(name, self.plan[name].key))
                    if snapshot:
                        self.display.update(name, snapshot)

    def build(self, step: StagePlan) -> Artifact:
        """Make one stage's artifact, or take the one that another process has just made."""
        name, key = step.stage.name, step.key
        inputs = {need: self.artifacts[need] for need in step.stage.needs}
        digests = {need: artifact.digest for need, artifact in inputs.items()}
        partial = self.store.partial(name, key)

        def waiting() -> None:
            self.display.say(f"{name}: another process is making it; waiting")

        with self.store.lock(name, key, waiting, stop=lambda: bool(self.stop_signal)) as lock:
            if lock is None:
                raise StageFailed(f"{name}: stopped while waiting for another process.")
            there = self.store.find(name, key)
            if there and there.inputs == digests:
                if there.made.get("published", 0) > self.began:
                    self.display.say(f"{name}: made meanwhile")
                    return there
                if not step.forced:  # upstream was built again and came out the same, to the bit
                    self.display.say(f"{name}: still good, what it was made from came out the same")
                    return there
            begun = read_json(partial / ORDER)
            if not continues(begun, inputs, step.forced):
                shutil.rmtree(partial, ignore_errors=True)  # begun from other inputs: not to be resumed
                begun = {}
            partial.mkdir(parents=True, exist_ok=True)
            order: dict[str, Any] = begun
            if not (partial / RESULT).exists():  # else an orphan finished the work after its runner was killed
                order = {
                    "stage": name,
                    "module": step.stage.module or name,
                    "recipe": self.recipe.model_dump(mode="json"),
                    "inputs": {need: str(artifact.path) for need, artifact in inputs.items()},
                    **origin(inputs),
                    "forced": step.forced,
                    "spent": begun.get("spent", 0.0),  # seconds, by earlier attempts
                    "started": time.time(),
                }
                write_atomically(partial / ORDER, json.dumps(order, indent=2))
                (partial / ERROR).unlink(missing_ok=True)
                self.process(step, partial, order, lock)
            self.check_inputs(step, inputs, partial)
            spent = order["spent"] + max(0.0, (partial / RESULT).stat().st_mtime - order["started"])
            metrics = read_json(partial / RESULT)
            artifact = self.store.publish(name, key, digests, made(spent, self.command), metrics)
        self.display.end(name, spent, metrics)
        return artifact

    def check_inputs(self, step: StagePlan, inputs: dict[str, Artifact], partial: Path) -> None:
        """See that what the stage was made from is still what it was when the stage began.

        Raises:
            StageFailed: it is not. What the stage made is thrown away.
        """
        for need, artifact in inputs.items():
            there, damage = self.store.look(need, artifact.key)
            if damage or (there and there.digest != artifact.digest):
                shutil.rmtree(partial, ignore_errors=True)
                what = damage or "it was made again and came out otherwise"
                raise StageFailed(
                    f"{step.stage.name}: the artifact of {need} changed meanwhile ({what}), so what was made from it "
                    "is thrown away."
                )

    def process(self, step: StagePlan, partial: Path, order: dict, lock: int) -> None:
        """Run the stage's process to its end.

        Raises:
            UserError: the stage says that the recipe or the data is wrong.
            StageFailed: it ended otherwise than by finishing.
        """
        name, log, kills = step.stage.name, partial / LOG, oom_kills()
        with log.open("ab") as output:
            begin = output.tell()
            with self.guard:
                if self.stop_signal:
                    raise StageFailed(f"{name}: stopped before it began.")
                process = subprocess.Popen(
                    [sys.executable, "-m", "instructrl.worker", str(partial)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(self.recipe),
                    start_new_session=True,  # the terminal's Ctrl-C reaches the runner only, which passes it on once
                    pass_fds=[lock],
                )
                self.processes[name] = process
        self.display.start(name, log)
        code = process.wait()
        with self.guard:
            del self.processes[name]
        if code == 0 and (partial / RESULT).exists():
            return
        self.display.drop(name)
        order["spent"] += time.time() - order["started"]
        with suppress(OSError):  # the disk may be what failed
            write_atomically(partial / ORDER, json.dumps(order | {"started": time.time()}, indent=2))
        raise self.failure(step, partial, code, begin, starved=oom_kills() > kills)

    def failure(self, step: StagePlan, partial: Path, code: int, begin: int, starved: bool) -> UserError:
        """What to tell about a process that ended with this status, and whether to keep what it left."""
        name, said = step.stage.name, read_json(partial / ERROR)
        steps = checkpoint_steps(partial)
        if said.get("exit_code") == UserError.exit_code:
            if not steps:
                shutil.rmtree(partial, ignore_errors=True)
            return UserError(said["message"])
        if self.stop_signal or code == SAVED_AND_STOPPED:
            saved = f"saved at step {max(steps)}" if steps else "had nothing to save yet"
            return StageFailed(f"{name} was stopped and {saved}.")
        lines = tail(partial / LOG, begin)
        told = cause(said, code, lines, starved, name, self.recipe, partial)
        shown = "".join(f"\n  | {line}" for line in lines)
        return StageFailed(f"{name} {told.rstrip('.')}.{shown}\nIts log: {partial / LOG}")

    def conclude(self) -> None:
        """Say what went wrong, if anything did."""
        sentences = list(dict.fromkeys(str(error) for error in self.failures.values()))
        if self.stop_signal:
            raise Stopped("\n".join([*sentences, f"Go on with: {self.again()}"]), self.stop_signal)
        for error in self.failures.values():
            if not isinstance(error, UserError):
                raise error
        if any(isinstance(error, StageFailed) for error in self.failures.values()):
            raise StageFailed("\n".join([*sentences, f"Go on with: {self.again()}"]))
        if sentences:
            raise UserError("\n".join(sentences))

    def again(self) -> str:
        """The command that goes on: what was typed, with --force only for a stage that still waits for it."""
        words, skip = [], False
        for word in self.command:
            if skip or word == "--force" or word.startswith("--force="):
                skip = word == "--force" and not skip
                continue
            words.append(word)
        waiting = [name for name, step in self.plan.items() if step.forced and step.artifact and name in self.failures]
        return shlex.join([*words, *(f"--force={name}" for name in waiting[:1])])

    @contextmanager
    def signals(self) -> Generator[None]:
        """Pass SIGINT, SIGTERM and SIGHUP on to the stages, which save and leave. A second one kills them."""
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():  # called from a notebook's thread
            numbers = []
        before = {number: signal.signal(number, self.stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, number: int, _: FrameType | None = None) -> None:
        """The handler of a signal: runs in the main thread, which never holds the guard."""
        again, self.stop_signal = bool(self.stop_signal), self.stop_signal or number
        with self.guard:
            for process in self.processes.values():
                try:
                    os.killpg(process.pid, signal.SIGKILL if again else signal.SIGTERM)
                except ProcessLookupError:  # it has just ended
                    continue


def made(seconds: float, command: Sequence[str]) -> dict:
    """What a manifest says about how the artifact came about. None of it is in the key."""
    return {
        "seconds": round(seconds, 1),
        "published": time.time(),
        "at": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": platform.node(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "instructrl": __version__,
        "command": shlex.join(command),
        "packages": packages(),
    }


def tail(log: Path, begin: int) -> list[str]:
    """The last lines that this attempt wrote to the log; of a line that a progress bar rewrote, the last state."""
    try:
        with log.open("rb") as file:
            file.seek(max(begin, log.stat().st_size - 65536))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    lines = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in lines if line][-LOG_LINES:]
