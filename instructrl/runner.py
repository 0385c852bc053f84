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
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path
from types import FrameType
from typing import Any

from instructrl import __version__, memory
from instructrl.artifacts import ERROR, LOG, ORDER, RESULT, Artifact, read_json, write_atomically
from instructrl.config import Runtime
from instructrl.display import Display
from instructrl.errors import StageFailed, UserError
from instructrl.failure import cause, oom_kills, writing
from instructrl.graph import Node, Place
from instructrl.launch import command, environment, tell
from instructrl.packages import packages
from instructrl.pipeline import Stage
from instructrl.plan import checkpoint_steps, continues, origin
from instructrl.progress import read_progress

SAVED_AND_STOPPED = 75  # sysexits.h EX_TEMPFAIL: the stage was asked to stop, saved a checkpoint and left
POLL_SECONDS = 0.2
LOG_LINES = 15  # of a failed stage's log
WAY = {"processes": 1, "sharding": "none", "rollouts": "transformers"}
"""How a stage computes, where that decides its last bits: what is otherwise than this stands in the manifest."""


class Stopped(UserError):
    """The run was stopped by a signal, after its stages saved what they had."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class Run:
    """A graph of stages as it is being run: one thread a running stage, which waits for the stage's process.

    Args:
        nodes: what there is and what is to be made, upstream first.
        display: shows it.
        command: what was typed, for the message that says how to go on.
        began: when it was typed, in seconds since the epoch; what was made since is not made again, even if forced.
        jobs: how many stages may run side by side.
        memory_limit: bytes that stages side by side may take together; None: what is free.
        sweep: a stage that fails keeps only what builds on it from running.
    """

    def __init__(
        self,
        nodes: Mapping[Place, Node],
        display: Display,
        command: Sequence[str] = ("instructrl",),
        began: float | None = None,
        jobs: int = 1,
        memory_limit: int | None = None,
        sweep: bool = False,
    ) -> None:
        self.nodes, self.display, self.command, self.jobs, self.sweep = nodes, display, command, jobs, sweep
        self.memory_limit = memory_limit
        self.artifacts = {p: n.step.artifact for p, n in nodes.items() if n.step.artifact and not n.step.runs}
        self.failures: dict[Place, Exception] = {}
        self.processes: dict[Place, subprocess.Popen[bytes]] = {}
        self.guard = threading.Lock()  # a process is either started before a stop, and gets its signal, or not at all
        self.stop_signal = 0
        self.began = time.time() if began is None else began
        self.gauge = memory.Gauge()
        self.peaks: dict[str, int] = {}  # stage -> bytes that it took in this run
        self.told: set[Place] = set()  # of which was said that they wait for memory

    def run(self) -> None:
        """Run all that is to be made. Afterwards `artifacts` has what there is, and `failures` what failed."""
        with self.signals(), self.display:
            self.loop()

    def loop(self) -> None:
        """Start each stage once those it needs are done, `jobs` at a time, until all are done or one failed."""
        places = [place for place, node in self.nodes.items() if node.step.runs]
        order = {place: position for position, place in enumerate(places)}
        sorter = TopologicalSorter({place: {*self.nodes[place].needs.values()} & order.keys() for place in places})
        sorter.prepare()
        ready: list[Place] = []
        announced = False
        futures: dict[Future[Artifact], Place] = {}
        with ThreadPoolExecutor(self.jobs) as threads:
            while True:
                ready += sorter.get_ready() if sorter.is_active() else ()
                ready.sort(key=order.__getitem__)
                while ready and len(futures) < self.jobs and not self.stop_signal:
                    if (self.failures and not self.sweep) or not self.has_room(ready[0], list(futures.values())):
                        break
                    beside = min(self.jobs, len(futures) + len(ready))
                    place = ready.pop(0)
                    futures[threads.submit(self.build, self.nodes[place], max(1, self.jobs // beside))] = place
                if not futures:
                    return
                for future in wait(futures, POLL_SECONDS, FIRST_COMPLETED).done:
                    place = futures.pop(future)
                    self.settle(place, future)
                    if place in self.artifacts:
                        sorter.done(place)
                if self.stop_signal and not announced:  # not in the handler: it may interrupt a print
                    announced = True
                    self.display.say("Stopping: waiting for the stages to save. A second signal kills them.")
                self.look(futures.values())

    def settle(self, place: Place, future: Future[Artifact]) -> None:
        """Note how a stage ended."""
        node, error = self.nodes[place], future.exception()
        if error is None:
            self.artifacts[place] = future.result()
            node.store.remember(node.recipe.name, {node.step.stage.name: node.step.key})
        elif isinstance(error, OSError):
            self.failures[place] = StageFailed(f"{node.label} {writing(error, node.store.root)}.")
        elif isinstance(error, Exception):
            self.failures[place] = error
        if self.sweep and place in self.failures and not self.stop_signal:
            self.display.say(f"Error: {self.failures[place]}")

    def look(self, running: Iterable[Place]) -> None:
        """See how far the running stages are, and how much memory they take."""
        self.measure()
        for place in running:
            node = self.nodes[place]
            snapshot = read_progress(node.store.partial(node.step.stage.name, node.step.key))
            if snapshot:
                self.display.update(node.label, snapshot)
        self.display.refresh()

    def measure(self) -> None:
        """Measure the memory of what runs."""
        with self.guard:
            pids = [process.pid for process in self.processes.values()]
        self.gauge.measure(pids)

    def has_room(self, place: Place, running: Sequence[Place]) -> bool:
        """Whether the machine has memory for the stage beside those that run; alone it always has."""
        if not running:
            return True
        self.measure()
        with self.guard:
            now = {other: self.gauge.now.get(process.pid, 0) for other, process in self.processes.items()}
        needed = self.expected(place)
        beside = [(self.expected(other), now.get(other, 0)) for other in running]
        if memory.fits(needed, memory.available(), beside, self.memory_limit):
            return True
        if place not in self.told:
            self.told.add(place)
            label = self.nodes[place].label
            self.display.say(f"{label}: waits for memory; it is expected to take {needed / 1e9:.2g} GB")
        return False

    def expected(self, place: Place) -> int:
        """Bytes that the stage is expected to take at most; 0 if nothing is known."""
        node = self.nodes[place]
        made = (self.artifacts[need].made for need in node.needs.values() if need in self.artifacts)
        estimate = node.step.estimate.memory if node.step.estimate else None
        return memory.expected(node.step.stage.name, (one.get("memory", 0) for one in made), self.peaks, estimate)

    def build(self, node: Node, jobs: int) -> Artifact:
        """Make one stage's artifact, or take the one that another process has just made.

        Args:
            jobs: `runtime.jobs` for the stage itself: the processes in which it samples are so many.
        """
        step, store, label = node.step, node.store, node.label
        name, key = step.stage.name, step.key
        inputs = {need: self.artifacts[place] for need, place in node.needs.items()}
        digests = {need: artifact.digest for need, artifact in inputs.items()}
        partial = store.partial(name, key)

        def waiting() -> None:
            self.display.say(f"{label}: another process is making it; waiting")

        with store.lock(name, key, waiting, stop=lambda: bool(self.stop_signal)) as lock:
            if lock is None:
                raise StageFailed(f"{label}: stopped while waiting for another process.")
            there = store.find(name, key)
            if there and there.inputs == digests:
                if there.made.get("published", 0) > self.began:
                    self.display.say(f"{label}: made meanwhile")
                    return there
                if not step.forced:  # upstream was built again and came out the same, to the bit
                    self.display.say(f"{label}: still good, what it was made from came out the same")
                    return there
            begun = read_json(partial / ORDER)
            if not continues(begun, inputs, step.forced):
                shutil.rmtree(partial, ignore_errors=True)  # begun from other inputs: not to be resumed
                begun = {}
            partial.mkdir(parents=True, exist_ok=True)
            order: dict[str, Any] = begun
            if not (partial / RESULT).exists():  # else an orphan finished the work after its runner was killed
                recipe = node.recipe.model_dump(mode="json")
                recipe["runtime"]["jobs"] = jobs
                way = way_of(step.stage, node.recipe.runtime)
                if begun and checkpoint_steps(partial):
                    before = WAY | {key: begun[key] for key in WAY if key in begun}
                    for sentence in inexact(before, way):
                        self.display.say(f"{label}: {sentence}")
                    if before["rollouts"] == "vllm":  # then not all of it will have been sampled as now
                        way["rollouts"] = "vllm"
                order = {
                    "stage": name,
                    "module": step.stage.module or name,
                    "recipe": recipe,
                    "inputs": {need: str(artifact.path) for need, artifact in inputs.items()},
                    **origin(inputs),
                    "forced": step.forced,
                    **way,
                    "spent": begun.get("spent", 0.0),  # seconds, by earlier attempts
                    "memory": begun.get("memory", 0),  # bytes, by the hungriest of them
                    "started": time.time(),
                }
                write_atomically(partial / ORDER, json.dumps(order, indent=2))
                (partial / ERROR).unlink(missing_ok=True)
                self.process(node, partial, order, lock)
            self.check_inputs(node, inputs, partial)
            spent = order["spent"] + max(0.0, (partial / RESULT).stat().st_mtime - order["started"])
            metrics = read_json(partial / RESULT)
            how = made(spent, self.command) | ({"memory": order["memory"]} if order.get("memory") else {})
            how |= {key: order[key] for key, usual in WAY.items() if order.get(key, usual) != usual}
            artifact = store.publish(name, key, digests, how, metrics)
        self.display.end(label, spent, metrics)
        return artifact

    def check_inputs(self, node: Node, inputs: dict[str, Artifact], partial: Path) -> None:
        """See that what the stage was made from is still what it was when the stage began.

        Raises:
            StageFailed: it is not. What the stage made is thrown away.
        """
        for need, artifact in inputs.items():
            there, damage = node.store.look(need, artifact.key)
            if damage or (there and there.digest != artifact.digest):
                shutil.rmtree(partial, ignore_errors=True)
                self.display.drop(node.label)
                what = damage or "it was made again and came out otherwise"
                raise StageFailed(
                    f"{node.label}: the artifact of {need} changed meanwhile ({what}), so what was made from it "
                    "is thrown away."
                )

    def process(self, node: Node, partial: Path, order: dict, lock: int) -> None:
        """Run the stage's process to its end.

        Raises:
            UserError: the stage says that the recipe or the data is wrong.
            StageFailed: it ended otherwise than by finishing.
        """
        name, log, kills = node.label, partial / LOG, oom_kills()
        with log.open("ab") as output:
            begin = output.tell()
            with self.guard:
                if self.stop_signal:
                    raise StageFailed(f"{name}: stopped before it began.")
                process = subprocess.Popen(
                    command(node.step.stage, node.recipe, partial),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=environment(node.recipe),
                    start_new_session=True,  # the terminal's Ctrl-C reaches the runner only, which passes it on once
                    pass_fds=[lock],
                )
                self.processes[node.place] = process
        self.display.start(name, log)
        code, peak = waited(process)
        with self.guard:
            del self.processes[node.place]
        peak = max(peak, self.gauge.peak.pop(process.pid, 0))
        order["memory"] = max(peak, order["memory"])
        self.peaks[node.step.stage.name] = max(peak, self.peaks.get(node.step.stage.name, 0))
        if code == 0 and (partial / RESULT).exists():
            return
        self.display.drop(name)
        order["spent"] += time.time() - order["started"]
        with suppress(OSError):  # the disk may be what failed
            write_atomically(partial / ORDER, json.dumps(order | {"started": time.time()}, indent=2))
        raise self.failure(node, partial, code, begin, starved=oom_kills() > kills)

    def failure(self, node: Node, partial: Path, code: int, begin: int, starved: bool) -> UserError:
        """What to tell about a process that ended with this status, and whether to keep what it left."""
        name, said = node.label, read_json(partial / ERROR)
        steps = checkpoint_steps(partial)
        if said.get("exit_code") == UserError.exit_code:
            if not steps:
                shutil.rmtree(partial, ignore_errors=True)
            return UserError(said["message"])
        if self.stop_signal or code == SAVED_AND_STOPPED:
            saved = f"saved at step {max(steps)}" if steps else "had nothing to save yet"
            return StageFailed(f"{name} was stopped and {saved}.")
        lines = tail(partial / LOG, begin)
        told = cause(said, code, lines, starved, node.step.stage.name, node.recipe, partial)
        shown = "".join(f"\n  | {line}" for line in lines)
        return StageFailed(f"{name} {told.rstrip('.')}.{shown}\nIts log: {partial / LOG}")

    def conclude(self) -> None:
        """Say what went wrong, if anything did.

        Raises:
            UserError: the recipe or its data is wrong, as a stage found out.
            StageFailed: a stage's process ended with an error; the stages beside it were allowed to finish.
            Stopped: on SIGINT, SIGTERM or SIGHUP.
        """
        sentences = list(dict.fromkeys(str(error) for error in self.failures.values()))
        if self.stop_signal:
            raise Stopped("\n".join([*sentences, f"Go on with: {self.again()}"]), self.stop_signal)
        for error in self.failures.values():
            if not isinstance(error, UserError):
                raise error
        if self.sweep:  # each was told when it happened
            return
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
        steps = (self.nodes[place].step for place in self.failures)
        waiting = [step.stage.name for step in steps if step.forced and step.artifact]
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
        if number == self.stop_signal == signal.SIGTERM and "SLURM_JOB_ID" in os.environ:
            return  # one is Slurm's own, one its script's: who has no time left sends SIGKILL
        again, self.stop_signal = bool(self.stop_signal), self.stop_signal or number
        with self.guard:
            for place, process in self.processes.items():
                try:
                    if again:
                        os.killpg(process.pid, signal.SIGKILL)
                    else:
                        tell(process, self.nodes[place].step.stage, self.nodes[place].recipe)
                except ProcessLookupError:  # it has just ended
                    continue


def waited(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """The status of a process that has ended, and the resident bytes that it, or one that it started, had at most."""
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except ChildProcessError:  # someone else has waited for it
        return process.wait(), 0
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def way_of(stage: Stage, runtime: Runtime) -> dict[str, Any]:
    """How a stage computes, as far as that changes its last bits: see `WAY`."""
    processes = runtime.ranks if stage.distributed else 1
    return {
        "processes": processes,
        "sharding": runtime.sharding if processes > 1 else "none",
        "rollouts": runtime.rollouts if stage.name in ("ppo", "ppo_ptx") else "transformers",
    }


def inexact(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Why a stage that goes on from a checkpoint does not end with the bits that it would have had."""
    one, other = (counted(way["processes"], way["sharding"]) for way in (before, now))
    if one != other:
        yield (
            f"goes on with {other} from a checkpoint of {one}, so that it ends as without the interruption to "
            "rounding, not to the bit"
        )
    if "vllm" in (before["rollouts"], now["rollouts"]):
        yield (
            "goes on from a checkpoint; vLLM may sample other responses than without the interruption, so that it does "
            "not end with the same bits"
        )


def counted(processes: int, sharding: str = "none") -> str:
    """`1 process`, `2 processes`, `2 processes with sharding=fsdp`."""
    how = f" with sharding={sharding}" if sharding != "none" else ""
    return f"{processes} process{'es' * (processes > 1)}{how}"


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
