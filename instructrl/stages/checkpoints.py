"""Checkpoints one can resume from after a kill at any moment, and the log of a training stage."""

import functools
import json
import math
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, set_seed

from instructrl.progress import Progress
from instructrl.stages import tracker
from instructrl.stages.divergence import Rows, check_finite, diverged, watched

FOLDER = "checkpoints"  # in the stage's folder; deleted when its artifact is published
LOG = "log.jsonl"
MARK = "COMPLETE"
EX_TEMPFAIL = 75  # sysexits.h: try again later
RANK_SEED = 100_003  # so far are the seeds of two ranks from each other

SHOWN = {  # names in the log -> names in the progress display
    "loss": "loss",
    "accuracy": "accuracy",
    "mean_token_accuracy": "accuracy",
    "objective/scores": "reward",
    "objective/kl": "kl",
    "completions/mean_length": "length",
}


class Checkpoints(TrainerCallback):
    """Saves every few minutes and on SIGTERM, and marks each checkpoint once it is complete.

    Trainer writes a checkpoint file by file and would resume from the newest folder whether or not it was finished
    (https://github.com/huggingface/transformers/issues/35782), so only folders with the mark count.

    A trainer may put a save off, as PPO does to the end of an iteration: the wish stands until a checkpoint is there,
    and only then does a stop take effect.
    """

    def __init__(self, save_minutes: float) -> None:
        self.save_seconds = save_minutes * 60
        self.stopping = False
        self.last_save = time.monotonic()
        self.settle: Callable[[], None] = lambda: None
        """Looks at what a GPU has not told yet, and raises where a step diverged."""

    def stop(self, *_: object) -> None:
        """The handler of SIGTERM."""
        self.stopping = True

    def on_step_end(self, args, state, control, model=None, **_):
        done = state.global_step >= state.max_steps  # what follows a finished training takes seconds: no need to stop
        due = not done and (self.stopping or time.monotonic() - self.last_save > self.save_seconds)
        if any_rank(due, args.device):  # all ranks must leave the loop at the same step
            check_finite(model, state.global_step)
            control.should_save = True

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.settle()
        args.distributed_state.wait_for_everyone()
        if not folder.is_dir():  # the trainer put it off
            return
        if state.is_world_process_zero:
            (folder / MARK).touch()
        self.last_save = time.monotonic()
        if any_rank(self.stopping, args.device):
            self.stopping = control.should_training_stop = True


class Sums(TrainerCallback):
    """What Trainer and TRL add up between two lines of the log is saved with a checkpoint, by rank, and put back.

    Trainer begins anew where it resumes, so that the next line would be the mean over fewer steps than without the
    kill, and the mean loss of the training that of its last part. Of a checkpoint saved by another number of ranks,
    each takes the ranks' mean, which is all that the log ever shows.
    """

    NUMBERS = ("_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")

    def __init__(self, trainer: Trainer, checkpoint: str | None) -> None:
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args, state, control, **_):
        found = self.saved(args)
        if not found:
            return
        self.trainer._initial_global_step = 0  # the mean loss is that of all steps
        self.trainer._tr_loss += found["loss"]
        for name, value in found["numbers"].items():
            setattr(self.trainer, name, value)
        for name, values in found["metrics"].items():
            self.trainer._metrics["train"][name] = values

    def saved(self, args) -> dict[str, Any]:
        """What this rank saved in the checkpoint, or the mean over the ranks that there were; {} without any."""
        folder = Path(self.checkpoint or "nowhere")
        if (folder / self.file(args)).exists():
            return json.loads((folder / self.file(args)).read_text())
        every = [json.loads(path.read_text()) for path in sorted(folder.glob("sums-*.json"))]
        return every[0] | {"loss": fmean(one["loss"] for one in every)} if every else {}

    def on_save(self, args, state, control, **_):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not folder.is_dir():  # the trainer put it off
            return
        trainer = self.trainer
        found = {
            "loss": trainer._tr_loss.item(),
            "numbers": {name: getattr(trainer, name) for name in self.NUMBERS if hasattr(trainer, name)},
            "metrics": dict(trainer._metrics["train"]) if hasattr(trainer, "_metrics") else {},
        }
        (folder / self.file(args)).write_text(json.dumps(found))

    def file(self, args) -> str:
        return f"sums-{args.process_index}-of-{args.world_size}.json"


class Log(TrainerCallback):
    """One JSON object a logged step in `log.jsonl`, the numbers that matter to the progress display, and all of them to
    the tracker, if there is one.

    Raises:
        StageFailed: the loss is not a number, after which training cannot recover.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOG
        self.progress = Progress(folder)
        self.shown: dict[str, float] = {}
        self.tracker = tracker.current()

    def on_train_begin(self, args, state, control, model=None, **_):
        """Drop what was logged after the checkpoint that training resumes from: those steps will be logged again."""
        if not state.is_world_process_zero:
            return
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    if json.loads(line)["step"] <= state.global_step:
                        kept.append(line + "\n")
                except (ValueError, KeyError):  # half a line, written as the process was killed
                    break
        self.path.write_text("".join(kept), encoding="utf-8")
        if self.tracker:
            self.tracker.begin(args, state, control, model)
        self.progress.update(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **_):
        if state.is_world_process_zero:
            self.progress.update(state.global_step, state.max_steps, **self.shown)

    def on_log(self, args, state, control, logs=None, **_):
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        loss = logs.get("loss")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step} | jsonable(logs)) + "\n")
        if self.tracker:
            self.tracker.log(args, state, control, logs)
        if loss is not None and not math.isfinite(loss):
            raise diverged(f"the loss is {loss}", state.global_step)
        self.shown |= {SHOWN[key]: value for key, value in logs.items() if key in SHOWN}
        self.progress.update(state.global_step, state.max_steps, **self.shown)


def train(trainer: Trainer, folder: Path, save_minutes: float = 10.0, tables: Sequence[Rows] = ()) -> float:
    """Train to the end, from the last complete checkpoint in `folder / "checkpoints"` if there is one.

    On SIGTERM: saves, and exits with code 75 once the checkpoint is complete.

    Args:
        trainer: its `args.output_dir` must be `folder / "checkpoints"`; its own saving is best left off
            (`save_strategy="no"`), with `save_total_limit` at 2: the oldest is deleted before the newest is marked.
        folder: the stage's folder, which gets `log.jsonl` and `progress.json`.
        save_minutes: time between checkpoints.
        tables: where the rows of the training set come from, for the message of a training that diverges.

    Returns:
        The mean training loss since the start, however often it was resumed.

    Raises:
        StageFailed: a loss, a gradient or a weight is not a number.
    """
    checkpoints, resumed = Checkpoints(save_minutes), last_checkpoint(folder / FOLDER)
    trainer.add_callback(Sums(trainer, resumed))  # before what marks a checkpoint as complete
    trainer.add_callback(checkpoints)
    trainer.add_callback(Log(folder))
    if trainer.args.process_index:  # dropout is another one on each rank; a checkpoint has the state of each
        set_seed(trainer.args.seed + RANK_SEED * trainer.args.process_index)
    previous = signal.signal(signal.SIGTERM, checkpoints.stop)
    try:
        with watched(trainer, tables, lambda: last_checkpoint(folder / FOLDER)) as watch:
            checkpoints.settle = functools.partial(watch.settle, wait=True)
            loss = trainer.train(resume_from_checkpoint=resumed).training_loss
    finally:
        signal.signal(signal.SIGTERM, previous)
    if trainer.state.global_step < trainer.state.max_steps:
        print(f"stopped at step {trainer.state.global_step} of {trainer.state.max_steps}", flush=True)
        sys.exit(EX_TEMPFAIL)
    check_finite(trainer.model, trainer.state.global_step)
    return loss


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in the folder."""
    complete = [mark.parent for mark in folder.glob(f"checkpoint-*/{MARK}")]
    return str(max(complete, key=lambda path: int(path.name.split("-")[1]))) if complete else None


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every process if it is true on one."""
    if not torch.distributed.is_initialized():
        return flag
    flags = torch.tensor(int(flag), device=device)
    torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return bool(flags)


def jsonable(logs: dict[str, Any]) -> dict[str, Any]:
    """Numbers as JSON can hold them: nan and infinity become null."""
    return {key: value if not isinstance(value, float) or math.isfinite(value) else None for key, value in logs.items()}
