"""A stage's run in TensorBoard, Weights & Biases, Trackio or MLflow (`runtime.tracker`), by transformers' `report_to`.

A tracker only watches: what it raises is printed once, and training goes on without it; random numbers that it draws
are put back, so that the weights are the same to the bit with and without it.

https://huggingface.co/docs/transformers/main_classes/callback
"""

import contextvars
import copy
import functools
import importlib
import json
import os
import random
import threading
import types
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from instructrl.artifacts import CHECKPOINTS, read_json
from instructrl.config import Recipe
from instructrl.key import digest

FOLDER = "trackers"  # in runtime.output_dir: what trackers keep on this disk
NAMED = "tracker.json"  # among the checkpoints, so that a resumed stage goes on with its run: {"id": ...}
CLOSING_SECONDS = 60  # for what is not sent yet
PROJECT = "instructrl"

_current: "Tracker | None" = None  # a process runs one stage
abandoned = False
"""Whether a run does not end, and the process had better not wait for what the tracker left to be done at its end."""


def current() -> "Tracker | None":
    """The run of the stage that this process runs."""
    return _current


@contextmanager
def tracked(stage: str, recipe: Recipe, folder: Path) -> Iterator["Tracker"]:
    """The stage's run, which is begun when the first number comes and closed at the end, as failed if the stage is."""
    global _current
    tracker = _current = Tracker(stage, recipe, folder)
    finished = False
    try:
        yield tracker
        finished = True
    finally:
        tracker.close(finished)
        _current = None


class Tracker:
    """One run of a tracker.

    Its name is `RECIPE-STAGE-FINGERPRINT`, its group `RECIPE-HASH`, in which all stages of a recipe are; the hash is of
    all its values but those of `runtime`.

    Args:
        folder: the stage's folder, whose name is the fingerprint.
    """

    def __init__(self, stage: str, recipe: Recipe, folder: Path) -> None:
        self.kind, self.folder = recipe.runtime.tracker, folder
        self.home = (Path(recipe.runtime.output_dir).expanduser() / FOLDER).absolute()
        self.name = f"{recipe.name}-{stage}-{folder.stem}"
        self.group = f"{recipe.name}-{digest(recipe.model_dump(mode='json', exclude={'runtime'}))[:8]}"
        self.tags = {"recipe": recipe.name, "stage": stage, "fingerprint": folder.stem, "group": self.group}
        self.offline = recipe.runtime.offline
        self.callback: Any = None
        self.begun = self.failed = False
        self.last: tuple[Any, Any, Any] | None = None

    def begin(self, args: Any, state: Any, control: Any, model: Any = None) -> None:
        """Open the run.

        Args:
            args: the trainer's; state, control: as a `TrainerCallback` is given them.
        """
        if self.begun or self.failed:
            return
        self.begun = True
        self.attempt(self.open, self.own(args), state, control, model)

    def open(self, args: Any, state: Any, control: Any, model: Any) -> None:
        """What may raise of `begin`."""
        from transformers.integrations import get_reporting_integration_callbacks

        known = read_json(self.folder / CHECKPOINTS / NAMED).get("id")
        for name, value in environment(self, known).items():
            os.environ.setdefault(name, value)
        self.home.mkdir(parents=True, exist_ok=True)
        self.callback = get_reporting_integration_callbacks([self.kind])[0]()
        if self.kind == "trackio":  # the callback has no argument for the group
            module = importlib.import_module("trackio")
            grouped = {"init": functools.partial(module.init, group=self.group)}
            self.callback._trackio = types.SimpleNamespace(**vars(module) | grouped)
        self.callback.on_train_begin(args, state, control, model=model)
        if self.kind == "mlflow" and not known:
            known = self.callback._ml_flow.active_run().info.run_id
        remember(self.folder / CHECKPOINTS / NAMED, known or os.environ.get("WANDB_RUN_ID"))

    def log(self, args: Any, state: Any, control: Any, logs: dict[str, Any]) -> None:
        """Numbers of a step."""
        self.begin(args, state, control)
        self.last = (args, state, control)
        if not self.failed:
            self.attempt(self.callback.on_log, self.own(args), state, control, logs=dict(logs))

    def finish(self, metrics: dict[str, Any]) -> None:
        """What the stage found in the end, as `eval/...`."""
        self.attempt(self.tell, metrics)

    def tell(self, metrics: dict[str, Any]) -> None:
        """What may raise of `finish`."""
        from transformers import TrainerControl, TrainerState, TrainingArguments

        if self.last is None:  # the stage trains nothing
            args = TrainingArguments(output_dir=str(self.folder / CHECKPOINTS), report_to=[], use_cpu=True)
            self.last = (args, TrainerState(), TrainerControl())
        self.log(*self.last, logs={f"eval_{name}": value for name, value in flat(metrics)})

    def close(self, finished: bool) -> None:
        """End the run. A server that does not answer is waited for a minute."""
        global abandoned
        if not self.begun or self.failed:
            return
        context = contextvars.copy_context()  # where Trackio keeps its run
        closing = threading.Thread(target=context.run, args=(self.survived, self.end, finished), daemon=True)
        closing.start()
        closing.join(CLOSING_SECONDS)
        if closing.is_alive():
            abandoned = True
            self.say("does not end its run; not waiting for it any longer")

    def end(self, finished: bool) -> None:
        """What may raise of `close`."""
        if self.kind == "wandb":
            self.callback._wandb.finish(exit_code=0 if finished else 1)
        elif self.kind == "mlflow":
            self.callback._ml_flow.end_run("FINISHED" if finished else "FAILED")
        else:
            args, state, control = self.last or (None, None, None)
            if state is not None:
                self.callback.on_train_end(self.own(args), state, control)

    def own(self, args: Any) -> Any:
        """The trainer's arguments with the names of the run."""
        named = copy.copy(args)
        named.run_name, named.project = self.name, PROJECT
        return named

    def attempt(self, work: Any, *args: Any, **kwargs: Any) -> None:
        """Whatever a tracker raises ends the tracking, not the training; whatever it draws is put back."""
        if not self.failed:
            with undisturbed():
                self.survived(work, *args, **kwargs)

    def survived(self, work: Any, *args: Any, **kwargs: Any) -> None:
        """Call what may raise anything."""
        try:
            work(*args, **kwargs)
        except Exception as error:
            self.failed = True
            self.say(
                f"failed, and the stage goes on without it: {type(error).__name__}: {' '.join(str(error).split())}"
            )

    def say(self, what: str) -> None:
        """A line in the stage's log."""
        print(f"runtime.tracker={self.kind} {what}", flush=True)


def environment(tracker: Tracker, known: str | None) -> dict[str, str]:
    """The variables by which trackers are told what `report_to` has no argument for. Those that are set stay.

    Args:
        known: the id of the run that the stage began before it was stopped.
    """
    home = tracker.home
    if tracker.kind == "tensorboard":
        return {"TENSORBOARD_LOGGING_DIR": str(home / "tensorboard" / tracker.group / tracker.name)}
    if tracker.kind == "wandb":
        offline = {"WANDB_MODE": "offline"} if tracker.offline else {}
        run = {"WANDB_RUN_ID": known or uuid.uuid4().hex[:12], "WANDB_RESUME": "allow"}
        tags = {"WANDB_RUN_GROUP": tracker.group, "WANDB_JOB_TYPE": tracker.tags["stage"]}
        return {"WANDB_PROJECT": PROJECT, "WANDB_DIR": str(home)} | tags | run | offline
    if tracker.kind == "trackio":
        return {"TRACKIO_DIR": str(home / "trackio")}
    again = {"MLFLOW_RUN_ID": known, "MLFLOW_MAX_LOG_PARAMS": "0"} if known else {}
    # its own patience with a server that does not answer is minutes a request
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    where = {"MLFLOW_TRACKING_URI": f"sqlite:///{home}/mlflow.db", "MLFLOW_EXPERIMENT_NAME": PROJECT}
    return where | {"MLFLOW_TAGS": json.dumps(tracker.tags)} | again | patience


def remember(path: Path, run: str | None) -> None:
    """Note the run's id where it lasts as long as the stage may be resumed."""
    if run:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"id": run}))


@contextmanager
def undisturbed() -> Iterator[None]:
    """What draws random numbers inside leaves no trace outside."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


def flat(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number in nested metrics: {"seconds": {"ptx": 1.5}} is ("seconds/ptx", 1.5)."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
