"""The tiny world through a real Slurm of one node, with requeues in the middle of training: `make test-slurm`."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from test_story import EVERY, SMALL

from instructrl.progress import read_progress

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
MISSING = [name for name in DAEMONS if not shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="a node's daemon runs as root"),
]
LONG = ["pretrain.steps=60", "sft.epochs=10"]  # seconds of training, in which to interrupt
PATIENCE = 1800  # seconds; Slurm lets a requeued job wait for up to two minutes

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE
"""


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> None:
    """Wait for something that Slurm does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.3)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Cluster:
    """Slurm on this machine, as a user sees it from a folder."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def __call__(self, *command: str) -> str:
        """What the command prints."""
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def instructrl(self, *arguments: str) -> str:
        """What `instructrl` prints."""
        return self(sys.executable, "-m", "instructrl", *arguments)

    def queue(self) -> dict[str, str]:
        """The state of every job that has not ended."""
        return dict(line.split() for line in self("squeue", "--noheader", "--format=%A %T").splitlines())

    def step(self, stage: str) -> int:
        """How far the stage's training is."""
        snapshots = (read_progress(path) for path in self.folder.glob(f"artifacts/{stage}/*.partial"))
        return max((snapshot.step for snapshot in snapshots if snapshot), default=0)

    def log(self, stage: str) -> str:
        """What the stage's jobs printed."""
        return "".join(path.read_text() for path in self.folder.glob(f"artifacts/slurm/{stage}/*/*.log"))

    def job(self, stage: str) -> str:
        """The number of the stage's job."""
        [record] = self.folder.glob(f"artifacts/slurm/{stage}/*/job.json")
        return json.loads(record.read_text())["job"]


@pytest.fixture(scope="module")
def daemons() -> Iterator[dict[str, str]]:
    """munged, slurmctld and slurmd in a temporary folder, until the tests are over. Yields a user's environment."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short: a socket's path may have 107 bytes
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(0o600)
    key.write_bytes(secrets.token_bytes(128))
    host = socket.gethostname().partition(".")[0]
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, ports=(free_port(), free_port())))
    environment = {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PATH": "/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(folder),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    files = {name: f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed", "key")}
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files.values()]
    started: list[subprocess.Popen[bytes]] = []

    def start(*command: str) -> None:
        with (folder / f"{command[0]}.log").open("wb") as log:
            started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def idle() -> bool:
        shown = subprocess.run(["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True)
        return shown.stdout.strip() == "idle"

    try:
        start(*munged)
        wait_for((folder / "munge.socket").exists, seconds=10)
        start("slurmctld", "-D")
        start("slurmd", "-D")
        try:
            wait_for(idle, seconds=60)
        except AssertionError:
            pytest.fail("".join(path.read_text()[-3000:] for path in folder.glob("*.log")))
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root"], env=environment)  # what a test that failed left running
        time.sleep(5)
        for daemon in reversed(started):
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def cluster(daemons: dict[str, str], tmp_path: Path) -> Cluster:
    """Slurm, from an empty folder."""
    return Cluster(daemons, tmp_path)


def weights(folder: Path) -> dict[str, str]:
    """The sha256 of all weights: `{"sft/model/model.safetensors": "..."}`."""
    found = {}
    for manifest in folder.glob("artifacts/*/*/manifest.json"):
        outputs = json.loads(manifest.read_text())["outputs"]
        stage = manifest.parent.parent.name
        found |= {f"{stage}/{name}": one["sha256"] for name, one in outputs.items() if name.endswith(".safetensors")}
    return found


def test_the_tiny_world_is_the_same_through_slurm(cluster: Cluster, tmp_path: Path) -> None:
    printed = cluster.instructrl("run-all", *SMALL, *LONG, "--slurm")
    assert len(re.findall(r"^\w+: job \d+", printed, re.MULTILINE)) == len(EVERY)

    wait_for(lambda: cluster.step("pretrain") >= 5)
    cluster("scontrol", "requeue", cluster.job("pretrain"))  # as an administrator does it, or Slurm that pre-empts
    again = re.findall(r"^\w+: job .*$", cluster.instructrl("run-all", *SMALL, *LONG, "--slurm"), re.MULTILINE)
    assert again
    assert all(line.endswith(" already") for line in again)

    wait_for(lambda: cluster.step("sft") >= 5)
    cluster("scancel", "--batch", "--signal=TERM", cluster.job("sft"))  # what --signal=B:TERM does before the end
    wait_for(lambda: not cluster.queue())
    for stage in ("pretrain", "sft"):
        saved = re.search(r"was stopped and saved at step (\d+)", cluster.log(stage))
        assert saved, cluster.log(stage)
        assert f"resumes from step {saved[1]}" in cluster.log(stage)
    assert "Everything is done" in cluster.instructrl("run-all", *SMALL, *LONG, "--slurm")

    (tmp_path / "plain").mkdir()
    plain = Cluster(cluster.environment, tmp_path / "plain")
    plain.instructrl("run-all", *SMALL, *LONG)
    assert len(weights(cluster.folder)) >= 6
    assert weights(cluster.folder) == weights(plain.folder)


def test_a_cancelled_job_does_not_come_back_and_nothing_waits_for_it(cluster: Cluster) -> None:
    cluster.instructrl("sft", *SMALL, "pretrain.steps=5000", "--slurm")
    wait_for(lambda: cluster.step("pretrain") >= 5)
    cluster("scancel", cluster.job("pretrain"))
    wait_for(lambda: not cluster.queue())
    assert "saved at step" in cluster.log("pretrain")
    assert "resumes from step" in cluster.instructrl("plan", *SMALL, "pretrain.steps=5000")
    assert not cluster.log("sft")


def test_a_refusal(cluster: Cluster) -> None:
    command = [sys.executable, "-m", "instructrl", "data", "--slurm", "runtime.slurm.partition=mian"]
    done = subprocess.run(command, cwd=cluster.folder, env=cluster.environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "Error: runtime.slurm.partition=mian: sbatch refuses data: Invalid partition name specified. "
        "Did you mean main?\n"
    )
    assert not cluster.queue()
