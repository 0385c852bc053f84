"""The short version of `make chaos`: three signals, on a stage that trains."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("psutil", reason="the chaos test finds the processes of stages with psutil")


def test_after_every_fault_the_run_ends_as_if_nothing_was(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tests" / "chaos" / "chaos.py"),
        "--first=1",
        "--faults=3",
        "--until=pretrain",
    ]
    done = subprocess.run([*command, f"--folder={tmp_path}"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    *_, times, met, wrong, word = done.stdout.splitlines()[-1].split()
    assert (times, wrong, word) == ("3", "none", "wrong")
    assert int(met) >= 1
    assert not list(tmp_path.iterdir())
