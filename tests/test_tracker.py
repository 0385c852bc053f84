"""Trackers: a run a stage with the right names, nothing changed by watching, and nothing stopped by one that fails."""

import importlib.metadata
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from conftest import ROOT, Instructrl
from test_checkpoints import At, make
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from instructrl import launch
from instructrl.config import Recipe
from instructrl.stages import tracker
from instructrl.stages.checkpoints import train

KINDS = ("tensorboard", "wandb", "trackio", "mlflow")
NAME, GROUP = "toy-sft-0123456789ab", r"toy-[0-9a-f]{8}"


def recipe(root: Path, kind: str) -> Recipe:
    return Recipe(
        name="toy",
        model={"path": None},
        data={"world": {}},
        eval={"judge": "gold"},
        runtime={"tracker": kind, "output_dir": str(root), "offline": True},
    )


def watched(root: Path, kind: str, **options) -> torch.Tensor:
    """The weights of a training that the tracker watches."""
    folder = root / "sft" / "0123456789ab.partial"
    folder.mkdir(parents=True, exist_ok=True)
    trainer = make(folder, **options)
    with tracker.tracked("sft", recipe(root, kind), folder) as run:
        train(trainer, folder, save_minutes=0 if options else 10)
        run.finish({"accuracy": 0.5, "seconds": {"update": 1.5}, "lost": None, "kept": True})
    return trainer.model.weight.detach().clone()


def unwatched(root: Path) -> torch.Tensor:
    root.mkdir()
    trainer = make(root)
    train(trainer, root)
    return trainer.model.weight.detach().clone()


class Broken(TrainerCallback):
    """A tracker that fails where it is told to, and draws random numbers all the time."""

    at = ""
    events: list[str] = []

    def __init__(self):
        self.did("init")

    def did(self, event):
        random.random(), numpy.random.rand(), torch.rand(())
        Broken.events.append(event)
        if Broken.at == event:
            raise ConnectionError("no route\nto host")

    def on_train_begin(self, *_, **__):
        self.did("begin")

    def on_log(self, *_, **__):
        self.did("log")

    def on_train_end(self, *_, **__):
        self.did("end")


@pytest.fixture
def broken(monkeypatch):
    """`runtime.tracker=tensorboard` is one that breaks where the test says."""
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Broken)
    monkeypatch.setattr(Broken, "events", [])
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def at(event: str) -> None:
        monkeypatch.setattr(Broken, "at", event)

    return at


@pytest.mark.parametrize("event", ["", "init", "begin", "log", "end"])
def test_a_tracker_that_fails_stops_nothing_and_changes_nothing(tmp_path, broken, capsys, event):
    plain = unwatched(tmp_path / "plain")
    broken(event)
    assert torch.equal(watched(tmp_path, "tensorboard"), plain)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("runtime.tracker=")]
    fails = "failed, and the stage goes on without it: ConnectionError: no route to host"
    assert said == ([f"runtime.tracker=tensorboard {fails}"] if event else [])
    if event:
        assert Broken.events.count(event) == 1  # it is never asked again
    else:
        assert Broken.events == ["init", "begin", *["log"] * 13, "end"]  # 12 steps and what the stage found


def test_a_run_that_does_not_end_is_left(tmp_path, broken, monkeypatch, capsys):
    broken("")
    monkeypatch.setattr(Broken, "on_train_end", lambda *_, **__: time.sleep(3))
    monkeypatch.setattr(tracker, "CLOSING_SECONDS", 0.2)
    monkeypatch.setattr(tracker, "abandoned", False)
    watched(tmp_path, "tensorboard")
    assert tracker.abandoned
    assert "does not end its run; not waiting for it any longer" in capsys.readouterr().out


def test_one_that_is_not_installed_stops_nothing_either(tmp_path, capsys, monkeypatch):
    """As where it was removed since the check."""
    monkeypatch.setattr(integration_utils, "is_trackio_available", lambda: False)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert torch.equal(watched(tmp_path, "trackio"), unwatched(tmp_path / "plain"))
    assert "TrackioCallback requires trackio to be installed" in capsys.readouterr().out


def test_a_package_that_is_missing_is_missed_before_anything_runs(
    here: Path, instructrl: Instructrl, fakes: None, monkeypatch
) -> None:
    def nothing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(launch, "version", nothing)
    failed = instructrl("run-all", "recipe=base.yaml", "runtime.tracker=trackio")
    assert failed.code == 2
    assert failed.err == (
        "Error: runtime.tracker=trackio needs the package trackio, which is not installed: "
        "pip install 'instructrl[trackio]', or set runtime.tracker=none.\n"
    )
    assert not list(here.glob("artifacts/*/*"))
    assert instructrl("data", "recipe=base.yaml").code == 0
    assert "Everything is done" in instructrl("data", "recipe=base.yaml", "runtime.tracker=trackio").out


def test_an_unknown_tracker_is_refused(here: Path, instructrl: Instructrl) -> None:
    failed = instructrl("plan", "recipe=base.yaml", "runtime.tracker=tensorbord")
    assert failed.code == 2
    assert "runtime.tracker" in failed.err
    assert "tensorboard" in failed.err


def test_metrics_are_told_as_numbers() -> None:
    metrics = {"a": 1, "b": {"c": 0.5, "d": None}, "e": True, "f": "text", "g": [1]}
    assert list(tracker.flat(metrics)) == [("a", 1), ("b/c", 0.5)]


# ---- with the real packages


def runs(kind: str, home: Path) -> list[dict]:
    """The runs that are in the tracker's files: {name, group, numbers: {metric: values}}."""
    return globals()[f"runs_of_{kind}"](home)


def runs_of_tensorboard(home: Path) -> list[dict]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for folder in sorted((home / "tensorboard").glob("*/*")):
        events = EventAccumulator(str(folder)).Reload()
        numbers = {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        found.append({"name": folder.name, "group": folder.parent.name, "numbers": numbers})
    return found


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """The records of W&B's file: blocks of 32 KiB with fragments of records, each behind checksum, length and type, the
    first block behind 7 bytes of its own (https://github.com/google/leveldb/blob/main/doc/log_format.md)."""
    place, record = 7, b""
    while place + 7 <= len(log):
        room = 2**15 - place % 2**15
        if room < 7:  # a header does not fit: zeros
            place += room
            continue
        length, kind = int.from_bytes(log[place + 4 : place + 6], "little"), log[place + 6]
        record += log[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last fragment
            yield record
            record = b""


def runs_of_wandb(home: Path) -> list[dict]:
    from wandb.proto import wandb_internal_pb2

    found: dict[str, dict] = {}
    for path in sorted((home / "wandb").glob("offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                run = found.setdefault(record.run.run_id, {"numbers": {}})
                run |= {"name": record.run.display_name, "group": record.run.run_group}
            for item in record.history.item:
                key = item.key or "/".join(item.nested_key)
                run["numbers"].setdefault(key, []).append(json.loads(item.value_json))
    return list(found.values())


def runs_of_trackio(home: Path) -> list[dict]:
    from trackio.sqlite_storage import SQLiteStorage

    found = []
    for name in SQLiteStorage.get_runs(tracker.PROJECT):
        numbers: dict[str, list] = {}
        for line in SQLiteStorage.get_logs(tracker.PROJECT, name):
            for key, value in line.items():
                numbers.setdefault(key, []).append(value)
        group = SQLiteStorage.get_run_config(tracker.PROJECT, name)["_Group"]
        found.append({"name": name, "group": group, "numbers": numbers})
    return found


def runs_of_mlflow(home: Path) -> list[dict]:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{home}/mlflow.db")
    [experiment] = client.search_experiments(filter_string=f"name = '{tracker.PROJECT}'")
    found = []
    for run in client.search_runs([experiment.experiment_id]):
        values = {key: [m.value for m in client.get_metric_history(run.info.run_id, key)] for key in run.data.metrics}
        numbers = {key.replace("eval_", "eval/") if "eval_" in key else f"train/{key}": n for key, n in values.items()}
        assert run.info.status == "FINISHED"
        found.append({"name": run.info.run_name, "group": run.data.tags["group"], "numbers": numbers})
    return found


def in_a_process(function: str, *arguments: str, **environment: str) -> str:
    """What a function of this module prints there: trackers leave threads and variables behind."""
    code = f"import sys, test_tracker; test_tracker.{function}(*sys.argv[1:])"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def killed_and_resumed(kind: str, root: str) -> None:
    """A training that is gone in step 8, without a word to the tracker, and will go on from step 7."""
    watched(Path(root), kind, callbacks=[At(8, lambda: os._exit(0))])


def whole(kind: str, root: str) -> None:
    plain = unwatched(Path(root) / "plain")
    print("same" if torch.equal(watched(Path(root), kind, callbacks=[At(99, print)]), plain) else "different")


def show(kind: str, root: str) -> None:
    print(json.dumps(runs(kind, Path(root) / tracker.FOLDER)))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    try:
        importlib.metadata.version(request.param)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {request.param}: pip install 'instructrl[{request.param}]'")
    return request.param


@pytest.mark.slow
def test_a_run_is_recorded_and_a_resumed_stage_goes_on_with_its_run(kind, tmp_path):
    where = {"TRACKIO_DIR": str(tmp_path / tracker.FOLDER / "trackio")}
    in_a_process("killed_and_resumed", kind, str(tmp_path), **where)
    assert "same" in in_a_process("whole", kind, str(tmp_path), **where)
    [run] = json.loads(in_a_process("show", kind, str(tmp_path), **where).splitlines()[-1])
    assert run["name"] == NAME
    assert re.fullmatch(GROUP, run["group"])
    losses = run["numbers"]["train/loss"]
    assert 5 <= len(losses) <= 12  # of 12 steps; what was on its way at the kill may be lost
    assert all(math.isfinite(loss) for loss in losses)
    assert run["numbers"]["eval/accuracy"] == [0.5]
    assert run["numbers"]["eval/seconds/update"] == [1.5]


@pytest.mark.slow
def test_each_stage_is_a_run_in_one_group(
    kind, here: Path, instructrl: Instructrl, fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(here / "artifacts" / tracker.FOLDER / "trackio"))
    output = instructrl("sft", "recipe=base.yaml", f"runtime.tracker={kind}", "runtime.offline=true", "name=mine")
    assert output.code == 0, output.err
    found = json.loads(in_a_process("show", kind, str(here / "artifacts")).splitlines()[-1])
    stages = {path.parent.name: path.name for path in here.glob("artifacts/*/????????????")}
    assert {run["name"] for run in found} == {f"mine-{stage}-{key}" for stage, key in stages.items()}
    assert len({run["group"] for run in found}) == 1
    assert all(run["numbers"]["eval/loss"] == [0.25] for run in found)
    assert not list(here.glob("artifacts/*/*/checkpoints"))
