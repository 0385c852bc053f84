"""Slurm: a batch script a stage, submitted so that its job starts when those it builds on have succeeded.

A job runs one stage alone, from the recipe as it was when it was submitted. Script, recipe, logs and the number of the
job are in `<output_dir>/slurm/<stage>/<fingerprint>/`.
"""

import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock

from instructrl import printout
from instructrl.artifacts import CHECKPOINTS, read_json, write_atomically
from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.graph import Node, Place, graph
from instructrl.jobs import Job, check, note_references
from instructrl.keys import closest, did_you_mean

FOLDER, SCRIPT, RECIPE, RECORD = "slurm", "stage.sh", "recipe.yaml", "job.json"
PROGRAM = (sys.executable, "-m", "instructrl")
STOPPED = 143  # 128 + SIGTERM: the status of a run that was told to stop

# With --signal=B:TERM the shell is signalled, and not what it runs: sbatch(1). The shell asks Slurm whether its job is
# to be queued again: `scancel` sends SIGTERM, too, and a job that was cancelled, or that Slurm itself has queued again,
# is not RUNNING any more.
BODY = """\
saved() {{ ls -R {checkpoints} 2> /dev/null; }}
before=$(saved)
{command} &
stage=$!
trap 'kill -TERM $stage 2> /dev/null' TERM # the time is nearly up, or the job is to end: the stage saves and leaves
while kill -0 $stage 2> /dev/null; do wait $stage; done # a signal ends wait, and not the stage
wait $stage
status=$?
if [ $status = {stopped} ] && [ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ]; then
  if [ "$(saved)" = "$before" ]; then
    echo 'Not queued again: nothing was saved. Give it longer: runtime.slurm.time, runtime.slurm.save_seconds.' >&2
  else
    scontrol requeue $SLURM_JOB_ID
  fi
fi
exit $status
"""

REFUSALS = {"account": "account", "partition": "partition", "time limit": "time", "memory": "mem_gb", "gres": "gpus"}
"""What sbatch says -> the key of `runtime.slurm` that it is about."""


# ---- scripts


def script(node: Node, after: Sequence[str]) -> str:
    """The batch script of a stage.

    Args:
        after: the jobs that must succeed first.
    """
    setup = [line for line in node.recipe.runtime.slurm.extra if not is_option(line)]
    if nodes_of(node) > 1 and node.recipe.runtime.slurm.cpus:
        setup.append("export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take over since Slurm 22.05")
    partial = node.store.partial(node.step.stage.name, node.step.key).absolute()
    body = BODY.format(checkpoints=shlex.quote(str(partial / CHECKPOINTS)), command=command(node), stopped=STOPPED)
    return "\n".join(["#!/bin/bash", *(f"#SBATCH {option}" for option in options(node, after)), "", *setup, body])


def options(node: Node, after: Sequence[str]) -> Iterator[str]:
    """What the script asks sbatch for: `--job-name=sft-15ef34ca24d6`, ..."""
    asked, nodes = node.recipe.runtime.slurm, nodes_of(node)
    yield f"--job-name={job_name(node)}"
    yield f"--chdir={shlex.quote(str(Path.cwd()))}"
    yield f"--output={shlex.quote(str(folder(node)).replace('%', '%%') + '/%j.log')}"
    yield from ("--open-mode=append", f"--nodes={nodes}", "--ntasks-per-node=1")
    yield from ("--requeue", f"--signal=B:TERM@{asked.save_seconds}")
    if after:
        yield from (f"--dependency=afterok:{':'.join(after)}", "--kill-on-invalid-dep=yes")
    given = {"partition": asked.partition, "account": asked.account, "time": asked.time, "cpus-per-task": asked.cpus}
    given["mem"] = asked.mem_gb and f"{asked.mem_gb}G"
    given["gres"] = asked.gpus and f"gpu:{asked.gpus}"
    yield from (f"--{option}={value}" for option, value in given.items() if value)
    yield from (line.removeprefix("#SBATCH").strip() for line in asked.extra if is_option(line))


def nodes_of(node: Node) -> int:
    """How many nodes the stage's processes are on: `launch.command` has srun start them there, in this allocation."""
    return node.recipe.runtime.nodes if node.step.stage.distributed else 1


def is_option(line: str) -> bool:
    """Whether a line of `runtime.slurm.extra` is for sbatch, and not for the shell."""
    return line.startswith(("-", "#SBATCH"))


def command(node: Node) -> str:
    """What makes the stage, and nothing else."""
    stage, force = node.step.stage.name, ("--force", node.step.stage.name) if node.step.forced else ()
    recipe = f"recipe={folder(node) / RECIPE}"
    return shlex.join([*PROGRAM, stage.replace("_", "-"), recipe, "--only", node.step.fingerprint, *force])


def job_name(node: Node) -> str:
    """The job's name in Slurm, by which it is known again."""
    return f"{node.step.stage.name}-{node.step.fingerprint}"


def folder(node: Node) -> Path:
    """Where all is that belongs to the stage's job."""
    return node.store.root.absolute() / FOLDER / node.step.stage.name / node.step.fingerprint


def to_run(planned: Sequence[Job]) -> dict[Place, Node]:
    """The stages that are to be made, upstream first; what two jobs share, once."""
    return {place: node for place, node in graph(planned).items() if node.step.runs}


def show_scripts(planned: Sequence[Job]) -> None:
    """Print what would be submitted, with `<sft>` for the number that the job of sft would get."""
    nodes = to_run(planned)
    for node in nodes.values():
        after = [f"<{nodes[at].label}>" for at in node.needs.values() if at in nodes]
        print(f"# {folder(node) / SCRIPT}\n{script(node, after)}")
    if not nodes:
        printout.show_plans(planned)


# ---- jobs


def submit(planned: Sequence[Job]) -> None:
    """Submit a job for each stage that is to be made, unless it has one that has not ended.

    Raises:
        UserError: there is no Slurm, or it refuses.
    """
    nodes = to_run(planned)
    if not nodes:
        printout.show_plans(planned)
        return
    if not shutil.which("sbatch"):
        raise UserError(
            "--slurm needs sbatch, which is not on this machine: submit from a login node of the cluster, or see what "
            "would be submitted with --slurm --print."
        )
    check(planned)
    note_references(planned)
    printout.show_work(planned, graph(planned))
    submitted: dict[Place, str] = {}
    with alone({node.store.root for node in nodes.values()}):
        queue = queued() if any((folder(node) / RECORD).exists() for node in nodes.values()) else {}
        for place, node in nodes.items():
            after = [submitted[at] for at in node.needs.values() if at in submitted]
            job = standing(node, after, queue)
            if job:
                print(f"{node.label}: job {job} is {queue[job][1]} already", flush=True)
            else:
                job = send(node, after, planned[node.wanted_by[0]])
                waits = f", after {', '.join(after)}" if after else ""
                print(f"{node.label}: job {job}{waits}", flush=True)
            submitted[place] = job
    first = next(iter(nodes.values()))
    print(f"Their scripts, recipes and logs: {first.store.root / FOLDER}. To see them: squeue --me")


@contextmanager
def alone(roots: set[Path]) -> Generator[None]:
    """Let nobody else submit for these stores meanwhile."""
    with ExitStack() as held:
        for root in sorted(roots):
            (root / FOLDER).mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(root / FOLDER / "submit.lock", preserve_lock_file=True))
        yield


def queued() -> dict[str, tuple[str, str]]:
    """Every job that has not ended: its number -> its name and its state.

    Raises:
        UserError: Slurm does not say.
    """
    done = subprocess.run(["squeue", "--noheader", "--format=%A %T %j"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"What is queued already cannot be told: squeue says {brief(done.stderr)}.")
    rows = (line.split(maxsplit=2) for line in done.stdout.splitlines())
    return {number: (name, state) for number, state, name in rows}


def standing(node: Node, after: Sequence[str], queue: dict[str, tuple[str, str]]) -> str | None:
    """The stage's job that has not ended. One that waits for jobs which others have replaced is cancelled.

    Raises:
        UserError: it runs, on what is to be made again.
    """
    record = read_json(folder(node) / RECORD)
    job = record.get("job", "")
    known, state = queue.get(job, ("", ""))
    if known != job_name(node):
        return None
    if set(after) <= set(record.get("after", ())):
        return job
    if state != "PENDING":
        raise UserError(f"{node.label} is {state} as job {job}, on what is to be made again: scancel {job} first.")
    subprocess.run(["scancel", job], check=False)
    return None


def send(node: Node, after: Sequence[str], job: Job) -> str:
    """Write what the job needs, and submit it. Returns its number.

    Raises:
        UserError: sbatch refuses it.
    """
    place = folder(node)
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / RECIPE, printout.recipe_as_yaml(node.recipe))
    write_atomically(place / SCRIPT, script(node, after))
    done = subprocess.run(["sbatch", "--parsable", str(place / SCRIPT)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise refused(node.label, job, done.stderr)
    number = done.stdout.strip().partition(";")[0]  # the cluster's name may follow
    write_atomically(place / RECORD, json.dumps({"job": number, "after": list(after), "submitted": time.time()}))
    return number


def refused(label: str, job: Job, said: str) -> UserError:
    """The sentence for what sbatch would not take, with the key that it is about."""
    reason = brief(said)
    asked: Recipe = job.composition.recipe
    key = next((key for words, key in REFUSALS.items() if words in reason.lower()), "")
    value = getattr(asked.runtime.slurm, key) if key else None
    if value is None:
        return UserError(f"sbatch refuses {label}: {reason}.")
    there = partitions() if key == "partition" else []
    close = closest(str(value), there)
    known = f" There are {', '.join(there)}." if there and not close else ""
    where = job.composition.where(("runtime", "slurm", key))
    told = f"{where}runtime.slurm.{key}={value}: sbatch refuses {label}: {reason}."
    return UserError(f"{told}{did_you_mean([close] if close else [])}{known}")


def partitions() -> list[str]:
    """The cluster's partitions; none if it does not say."""
    try:
        done = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False)
    except OSError:
        return []
    return done.stdout.split()


def brief(said: str) -> str:
    """The last line that one of Slurm's commands said, without what stands before every line."""
    last = (said.strip().splitlines() or ["nothing"])[-1]
    return last.split("error: ")[-1].removeprefix("Batch job submission failed: ").rstrip(".")
