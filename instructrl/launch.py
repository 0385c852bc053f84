"""Starting the process of a stage: its environment, and the check of trainer settings before anything trains."""

import importlib.util
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from instructrl.config import Recipe
from instructrl.errors import StageFailed, UserError
from instructrl.pipeline import Stage
from instructrl.plan import StagePlan
from instructrl.stages import endpoint

PORT = 29400  # torchrun's own
SHARDING_NEEDS = (2, 13)  # of torch: FSDPModule.reset_iter_state
DEEPSPEED_NEEDS = (0, 19, 8)  # what is tested; older ones lack managed_gradient_accumulation
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow", "mlflow-skinny")}
"""`runtime.tracker` -> the packages that will do, if not that of its name."""


def environment(recipe: Recipe) -> dict[str, str]:
    """The stage's environment: what must be set before torch or a Hugging Face library is imported."""
    runtime = recipe.runtime
    beside = runtime.jobs * runtime.num_processes
    threads = runtime.threads or (max(1, (os.cpu_count() or 1) // beside) if beside > 1 else None)
    added = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    if threads and not (runtime.threads is None and "OMP_NUM_THREADS" in os.environ):
        added["OMP_NUM_THREADS"] = str(threads)
    if runtime.offline:
        added |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    if runtime.zero and runtime.device == "cpu":
        added["DS_ACCELERATOR"] = "cpu"  # DeepSpeed takes a GPU wherever there is one
    return os.environ | added


def command(stage: Stage, recipe: Recipe, folder: Path) -> list[str]:
    """What starts the stage whose order lies in the folder: a process, or the parent of several."""
    worker, runtime = ["-m", "instructrl.worker", str(folder)], recipe.runtime
    if not stage.distributed or runtime.ranks == 1:
        return [sys.executable, *worker]
    parent = [sys.executable, "-m", "instructrl.torchrun", f"--nproc-per-node={runtime.num_processes}"]
    if runtime.nodes == 1:  # they meet on the loopback device: what the host's own name resolves to may not be there
        return [*parent, "--standalone", "--local-addr=127.0.0.1", *worker]
    where = runtime.rdzv_endpoint or f"{platform.node()}:{PORT}"
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={where}", f"--rdzv-id={folder.parent.name}-{folder.stem}"]
    everywhere = shlex.split(runtime.node_command.replace("{nodes}", str(runtime.nodes)))
    return [*everywhere, *parent, f"--nnodes={runtime.nodes}", *meeting, *worker]


def tell(process: "subprocess.Popen[bytes]", stage: Stage, recipe: Recipe) -> None:
    """Have a stage save and leave.

    Srun does not pass SIGTERM on, but kills what it started. Slurm sends that to it for `scancel --signal`, and lets it
    take its time; a batch script's shell is not signalled.
    """
    runtime, job = recipe.runtime, os.environ.get("SLURM_JOB_ID")
    if job and stage.distributed and runtime.nodes > 1 and Path(shlex.split(runtime.node_command)[0]).name == "srun":
        subprocess.Popen(["scancel", "--signal=TERM", job])
    else:
        os.killpg(process.pid, signal.SIGTERM)


def check_processes(plan: Sequence[StagePlan], recipe: Recipe) -> None:
    """Miss a batch that the processes cannot share before anything trains.

    Raises:
        UserError: it is not a multiple of their number.
    """
    processes = recipe.runtime.ranks
    key = "runtime.num_processes" if recipe.runtime.nodes == 1 else "runtime.nodes * runtime.num_processes"
    for name in (step.stage.name for step in plan if step.runs and step.stage.distributed):
        section = getattr(recipe, "reward_model" if name == "judge" else name)
        whole, of = getattr(section, "batch_size", processes), ""
        if name in ("ppo", "ppo_ptx"):
            whole, of = section.batch_size // section.num_mini_batches, f" / {name}.num_mini_batches"
        if whole % processes:
            fitting = max(number for number in range(1, processes) if whole % number == 0)
            raise UserError(
                f"{name}.batch_size{of} = {whole} cannot be shared by {key} = {processes} processes: make it a "
                f"multiple of them, or take {fitting}."
            )


def check_trainers(plan: Sequence[StagePlan], recipe: Recipe) -> None:
    """Let stages check what the recipe asks for before anything trains: of TRL's configs and its PPO, of an endpoint.

    Raises:
        UserError: a field is unknown, set elsewhere in the recipe, or refused by TRL; TRL's PPO cannot do it; the
            environment does not name the endpoint that is to judge.
    """
    modules = {step.stage.module or step.stage.name for step in plan if step.runs}
    if recipe.eval.judge == "endpoint" and "eval" in modules:
        endpoint.check()
    asked = {name: bool(getattr(recipe, name).trainer) for name in ("sft", "ppo_init", "reward_model")}
    asked["ppo"] = "trl" in (recipe.ppo.backend, recipe.ppo_ptx.backend)
    modules = [name for name, asks in asked.items() if asks and name in modules]
    if not modules:
        return
    problems, _ = ask(
        "--check", {"modules": modules}, recipe, f"what {' and '.join(modules)} ask of TRL cannot be checked"
    )
    if problems:
        raise UserError("\n".join(problems))


def check_tracker(recipe: Recipe) -> None:
    """Miss a tracker's package before anything trains.

    Raises:
        UserError: it is not installed.
    """
    tracker = recipe.runtime.tracker
    if tracker != "none" and not any(map(installed, TRACKERS.get(tracker, (tracker,)))):
        raise UserError(
            f"runtime.tracker={tracker} needs the package {tracker}, which is not installed: "
            f"pip install 'instructrl[{tracker}]', or set runtime.tracker=none."
        )


def check_libraries(plan: Sequence[StagePlan], recipe: Recipe) -> None:
    """Miss what 4-bit weights and shared ones need before anything trains.

    Raises:
        UserError: a stage that would run needs it, and it is not there.
    """
    if not any(step.runs and step.stage.distributed for step in plan):
        return
    lora, runtime = recipe.model.lora, recipe.runtime
    if lora and lora.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            f"model.lora.quantization={lora.quantization} needs bitsandbytes: pip install 'instructrl[qlora]', or set "
            "it to null."
        )
    if runtime.zero:
        check_deepspeed(runtime.sharding)
    elif runtime.shares:
        there = tuple(int(part) for part in re.findall(r"\d+", version("torch"))[:2])
        if there < SHARDING_NEEDS:
            raise UserError(
                f"runtime.sharding=fsdp needs torch {'.'.join(map(str, SHARDING_NEEDS))} or newer, and this is "
                f"{version('torch')}: upgrade it, or set runtime.sharding=none."
            )


def check_deepspeed(sharding: str) -> None:
    """Raises: UserError: it is not there, or too old."""
    try:
        there = tuple(int(part) for part in re.findall(r"\d+", version("deepspeed"))[:3])
    except PackageNotFoundError:
        there = None
    if there is None or there < DEEPSPEED_NEEDS:
        needed = ".".join(map(str, DEEPSPEED_NEEDS))
        raise UserError(
            f"runtime.sharding={sharding} needs deepspeed {needed} or newer, "
            f"{'which is not installed' if there is None else 'and this is ' + version('deepspeed')}: "
            "pip install 'instructrl[deepspeed]', or set runtime.sharding=fsdp."
        )


def check_rollouts(plan: Sequence[StagePlan], recipe: Recipe) -> None:
    """Miss vLLM before anything trains.

    Raises:
        UserError: a stage that would run needs it, and it is not installed.
    """
    modules = {step.stage.module or step.stage.name for step in plan if step.runs}
    if recipe.runtime.rollouts != "vllm" or "ppo" not in modules:
        return
    # Whatever its distribution is called: there is one for each kind of device.
    found = importlib.util.find_spec("vllm")
    if found is None or found.origin is None:
        raise UserError(
            "runtime.rollouts=vllm needs vLLM, which is not installed: pip install 'instructrl[vllm]', or set "
            "runtime.rollouts=transformers."
        )


def installed(distribution: str) -> bool:
    """Whether it is. (A folder of its name, as W&B makes one, can be imported, too.)"""
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False


def preview(recipe: Recipe, data: Path, count: int) -> tuple[dict[str, Any], list[str]]:
    """What `stages.preview.examples` returns, and the lines that were said on the way.

    Raises:
        UserError: there is no model whose tokenizer could be read, or it does not fit the recipe.
    """
    order = {"data": str(data), "count": count}
    found, said = ask("--preview", order, recipe, "the examples cannot be shown")
    if "error" in found:
        raise UserError(found["error"])
    return found, said


def ask(flag: str, order: dict[str, Any], recipe: Recipe, failed: str) -> tuple[Any, list[str]]:
    """Ask a worker something that needs torch or transformers: its answer, and the lines printed before it.

    Raises:
        StageFailed: no answer came; `failed` is the message's beginning.
    """
    arguments = [sys.executable, "-m", "instructrl.worker", flag]
    text = json.dumps(order | {"recipe": recipe.model_dump(mode="json")})
    done = subprocess.run(arguments, input=text, env=environment(recipe), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    try:
        return json.loads(lines[-1]), lines[:-1]
    except (ValueError, IndexError):
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise StageFailed(f"{failed}: {last}") from None
