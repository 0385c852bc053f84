"""Fixtures of the tests of the command line, the plan and the runner."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from instructrl import cli, jobs

ROOT = Path(__file__).resolve().parent.parent
BASE = "model: {path: null}\ndata: {world: {}}\neval: {judge: gold}\nppo: {init: sft}\nppo_ptx: {init: sft}\n"


@dataclass(frozen=True)
class Output:
    """What a command printed, and its exit status."""

    code: int
    out: str
    err: str


Instructrl = Callable[..., Output]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with a recipe `base.yaml`, from which processes find the package and the fakes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


@pytest.fixture
def instructrl(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Instructrl:
    """Runs a command in this process."""

    def command(*arguments: str) -> Output:
        monkeypatch.setattr(sys, "argv", ["instructrl", *arguments])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return Output(code, out, err)

    return command


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake stages: data -> sft -> ppo and ppo_ptx -> eval."""
    from fakes.cli import stages

    monkeypatch.setattr(jobs, "stages", stages)


@pytest.fixture
def spawn(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a command on the fake stages as a process of its own."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fakes.cli", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def ran(folder: Path) -> list[str]:
    """What the fake stages noted since the last call: `["data from 0", "sft from 0"]`."""
    log = folder / "ran.log"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines
