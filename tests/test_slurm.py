"""Batch scripts: their text, what is submitted after what, and what they do when told to stop. Slurm's commands are
stood in for by scripts that note what they are given; test_slurm_cluster.py has the real ones."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Instructrl, ran, until

from instructrl import launch, slurm
from instructrl.pipeline import stages
from instructrl.recipe import compose_recipe

SBATCH = """#!/bin/bash
[ -e {cluster}/refuse ] && cat {cluster}/refuse >&2 && exit 1
number=$(($(ls {cluster}/jobs | wc -l) + 101))
cp "${{@: -1}}" {cluster}/jobs/$number
echo "$number;here"
"""


@pytest.fixture
def cluster(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the scripts that were submitted in `jobs/`, by their numbers, what squeue prints in `queue`, and
    what the other commands were given in `told`."""
    cluster, commands = here / "cluster", here / "cluster" / "bin"
    (cluster / "jobs").mkdir(parents=True)
    commands.mkdir()
    (cluster / "queue").touch()
    texts = {"sbatch": SBATCH.format(cluster=cluster), "squeue": f"#!/bin/bash\ncat {cluster}/queue\n"}
    texts |= {name: f'#!/bin/bash\necho {name} "$@" >> {cluster}/told\n' for name in ("scancel", "scontrol")}
    texts["sinfo"] = "#!/bin/bash\nprintf 'short\\nlong\\n'\n"
    for name, text in texts.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "PROGRAM", (sys.executable, "-m", "fakes.cli"))
    return cluster


def jobs(cluster: Path) -> dict[str, str]:
    """The scripts that were submitted: `{"101": "..."}`."""
    return {path.name: path.read_text() for path in sorted((cluster / "jobs").iterdir())}


def waits(text: str) -> list[str]:
    """The jobs that a script waits for."""
    found = re.search(r"^#SBATCH --dependency=afterok:(\S+)$", text, re.MULTILINE)
    return found[1].split(":") if found else []


def name(text: str) -> str:
    """The stage of a script."""
    found = re.search(r"^#SBATCH --job-name=(\w+)-[0-9a-f]{12}$", text, re.MULTILINE)
    assert found
    return found[1]


def enqueue(cluster: Path, **states: str) -> None:
    """Let squeue list the jobs of these stages."""
    rows = []
    for number, text in jobs(cluster).items():
        found = re.search(r"--job-name=(\S+)", text)
        if found and name(text) in states:
            rows.append(f"{number} {states[name(text)]} {found[1]}")
    (cluster / "queue").write_text("1 RUNNING somebody's job\n" + "".join(f"{row}\n" for row in rows))


def test_a_job_a_stage_after_those_it_needs(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    result = instructrl("run-all", "recipe=base.yaml", "--slurm")
    assert result.code == 0, result.err
    submitted = jobs(cluster)
    assert [name(text) for text in submitted.values()] == ["data", "sft", "ppo", "ppo_ptx", "eval"]
    assert [waits(text) for text in submitted.values()] == [
        [],
        ["101"],
        ["101", "102"],
        ["101", "102"],
        ["101", "102", "103", "104"],
    ]
    assert "sft: job 102, after 101\n" in result.out
    assert not list(Path("artifacts").glob("*/*.partial"))  # nothing was run
    assert "eval" in instructrl("clean").out or "nothing to clean" in instructrl("clean").out


def test_what_is_done_is_not_submitted(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    assert instructrl("data", "recipe=base.yaml").code == 0
    assert instructrl("sft", "recipe=base.yaml", "--slurm").code == 0
    [text] = jobs(cluster).values()
    assert name(text) == "sft"
    assert waits(text) == []
    assert "Everything is done" in instructrl("data", "recipe=base.yaml", "--slurm").out


def test_a_sweep_submits_what_is_shared_once(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    result = instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.1,0.2", "-m", "--slurm")
    assert result.code == 0, result.err
    assert [name(text) for text in jobs(cluster).values()] == ["data", "sft", "ppo", "ppo"]
    assert [waits(text) for text in jobs(cluster).values()][2:] == [["101", "102"]] * 2
    assert "ppo [2/2]: job 104, after 101, 102" in result.out
    recipes = [yaml_of(text) for text in jobs(cluster).values()]
    assert ["kl_coef: 0.1" in recipe for recipe in recipes[2:]] == [True, False]


def yaml_of(text: str) -> str:
    """The recipe that a script runs."""
    found = re.search(r"recipe=(\S+)", text)
    assert found
    return Path(found[1]).read_text()


def test_a_stage_that_is_queued_is_not_submitted_again(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("ppo", "recipe=base.yaml", "--slurm")
    enqueue(cluster, data="COMPLETING", sft="PENDING", ppo="PENDING")
    result = instructrl("run-all", "recipe=base.yaml", "--slurm")
    assert result.code == 0, result.err
    assert [name(text) for text in jobs(cluster).values()] == ["data", "sft", "ppo", "ppo_ptx", "eval"]
    assert waits(jobs(cluster)["105"]) == ["101", "102", "103", "104"]
    assert "sft: job 102 is PENDING already" in result.out
    assert not (cluster / "told").exists()


def test_a_job_number_that_is_another_job_by_now_does_not_count(
    cluster: Path, instructrl: Instructrl, fakes: None
) -> None:
    instructrl("data", "recipe=base.yaml", "--slurm")
    (cluster / "queue").write_text("101 RUNNING data-0123456789ab\n")
    instructrl("data", "recipe=base.yaml", "--slurm")
    assert list(jobs(cluster)) == ["101", "102"]


def test_what_waits_for_a_job_that_failed_is_replaced(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("sft", "recipe=base.yaml", "--slurm")
    enqueue(cluster, sft="PENDING")  # data has failed
    result = instructrl("sft", "recipe=base.yaml", "--slurm")
    assert result.code == 0, result.err
    assert [name(text) for text in jobs(cluster).values()] == ["data", "sft", "data", "sft"]
    assert waits(jobs(cluster)["104"]) == ["103"]
    assert (cluster / "told").read_text() == "scancel 102\n"
    enqueue(cluster, sft="RUNNING")
    refused = instructrl("sft", "recipe=base.yaml", "--slurm")
    assert refused.code == 2
    assert "sft is RUNNING as job 104, on what is to be made again: scancel 104 first." in refused.err


def test_force_is_passed_on(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    assert instructrl("sft", "recipe=base.yaml").code == 0
    instructrl("sft", "recipe=base.yaml", "--slurm", "--force", "data")
    forced = [re.search(r"--force (\w+) &", text) for text in jobs(cluster).values()]
    assert [found[1] for found in forced if found] == ["data", "sft"]
    ran(Path())
    job = started(cluster, "101")
    assert job.wait(timeout=120) == 0
    assert ran(Path()) == ["data from 0"]


def test_printed_scripts(here: Path, instructrl: Instructrl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # no Slurm is needed
    keys = ("partition=long", "account=us", "time=1-00:00:00", "cpus=8", "mem_gb=64", "gpus=2", "save_seconds=600")
    extra = "runtime.slurm.extra=['--qos=low', 'module load cuda', '#SBATCH --mail-type=FAIL']"
    result = instructrl(
        "sft",
        "recipe=base.yaml",
        "model.path=null",
        extra,
        *(f"runtime.slurm.{key}" for key in keys),
        "--slurm",
        "--print",
    )
    assert result.code == 0, result.err
    scripts = result.out.split("#!/bin/bash\n")[1:]
    assert [name(text) for text in scripts] == ["data", "pretrain", "sft"]
    options = re.findall("^#SBATCH (.*)$", scripts[2], re.MULTILINE)
    folder = here / "artifacts" / "slurm" / "sft" / options[0][-12:]
    assert options[1:] == [
        f"--chdir={here}",
        f"--output={folder}/%j.log",
        "--open-mode=append",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--requeue",
        "--signal=B:TERM@600",
        "--dependency=afterok:<data>:<pretrain>",
        "--kill-on-invalid-dep=yes",
        "--partition=long",
        "--account=us",
        "--time=1-00:00:00",
        "--cpus-per-task=8",
        "--mem=64G",
        "--gres=gpu:2",
        "--qos=low",
        "--mail-type=FAIL",
    ]
    lines = [line for line in scripts[2].splitlines() if not line.startswith("#")]
    assert lines[:2] == ["", "module load cuda"]
    assert f"{sys.executable} -m instructrl sft recipe={folder}/recipe.yaml --only {folder.name} &" in lines
    assert not (here / "artifacts").exists()
    for text in scripts:
        assert subprocess.run(["/bin/bash", "-n"], input=text, text=True).returncode == 0


def test_processes_on_several_nodes(cluster: Path, instructrl: Instructrl) -> None:
    keys = ("runtime.nodes=2", "runtime.num_processes=4", "runtime.slurm.cpus=4")
    result = instructrl("sft", "recipe=base.yaml", *keys, "--slurm")
    assert result.code == 0, result.err
    found = [re.findall("^#SBATCH --nodes=(.*)|^export (.*?) #", text, re.MULTILINE) for text in jobs(cluster).values()]
    assert found == [[("1", "")], [("1", "")], [("2", ""), ("", "SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK")]]


def test_what_srun_started_is_told_by_slurm(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Srun kills it at SIGTERM."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    recipe = compose_recipe(["recipe=base.yaml", "runtime.nodes=2"]).recipe
    process = subprocess.Popen(["sleep", "120"], start_new_session=True)
    launch.tell(process, stages(recipe)["ppo"], recipe)
    until((cluster / "told").exists, seconds=60)
    assert (cluster / "told").read_text() == "scancel --signal=TERM 7\n"
    assert process.poll() is None
    launch.tell(process, stages(recipe)["data"], recipe)  # which is one process, on this node
    assert process.wait(timeout=60) == -signal.SIGTERM


def test_documented_script_is_the_one_that_is_printed(instructrl: Instructrl, here: Path) -> None:
    shown = re.search(r"```bash\n(.*?)```", (ROOT / "docs" / "slurm.md").read_text(), re.DOTALL)
    assert shown
    told = re.search(r"^\$ instructrl (.*)$", (ROOT / "docs" / "slurm.md").read_text(), re.MULTILINE)
    assert told
    printed = instructrl(*told[1].split(), "--print").out
    scripts = [f"# {text}" for text in re.split(r"^# (?=/)", printed, flags=re.MULTILINE)[1:]]
    [ppo] = [text for text in scripts if "--job-name=ppo-" in text]
    ppo = ppo.replace(str(here), "/home/me/mine").replace(sys.executable, "/home/me/.venv/bin/python")
    fingerprint = re.search(r"--only (\w+)", ppo)
    documented = re.search(r"--only (\w+)", shown[1])
    assert fingerprint
    assert documented
    assert ppo.replace(fingerprint[1], documented[1]).strip() == shown[1].strip()


def test_folders_with_odd_names(
    cluster: Path, instructrl: Instructrl, fakes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = Path("my $HOME's 100%").absolute()
    odd.mkdir()
    shutil.copy("base.yaml", odd)
    monkeypatch.chdir(odd)
    assert instructrl("data", "recipe=base.yaml", "--slurm").code == 0
    [text] = jobs(cluster).values()
    assert "100%%" in text
    assert subprocess.run(["bash", "-c", text], env={**os.environ, "SLURM_JOB_ID": "7"}).returncode == 0
    assert list(odd.glob("artifacts/data/*/manifest.json"))


def started(cluster: Path, number: str) -> subprocess.Popen[str]:
    """A script as Slurm starts it."""
    environment = {**os.environ, "SLURM_JOB_ID": number}
    return subprocess.Popen(
        ["bash", str(cluster / "jobs" / number)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def step_reached(stage: str, step: int) -> Callable[[], bool]:
    pattern = f"artifacts/{stage}/*.partial/checkpoints/checkpoint-{step}/COMPLETE"
    return lambda: any(Path().glob(pattern))


@pytest.mark.parametrize("whom", ["shell", "all"])
def test_a_job_that_is_told_to_stop_saves_and_is_queued_again(
    cluster: Path, instructrl: Instructrl, fakes: None, whom: str
) -> None:
    Path("script.json").write_text(json.dumps({"data": {"steps": 60, "seconds": 0.1}}))
    instructrl("data", "recipe=base.yaml", "--slurm")
    (cluster / "queue").write_text("RUNNING\n")
    job = started(cluster, "101")
    until(step_reached("data", 2), seconds=120)
    if whom == "shell":  # as --signal=B:TERM does it
        job.send_signal(signal.SIGTERM)
    else:  # the runner gets it twice, from Slurm and from the shell
        os.killpg(job.pid, signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 143, out
    saved = int(out.split("saved at step ")[1].split(".")[0])
    assert (cluster / "told").read_text() == "scontrol requeue 101\n"
    Path("script.json").write_text(json.dumps({"data": {"steps": saved + 1}}))
    ran(Path())
    again = started(cluster, "101")
    assert again.communicate(timeout=120)
    assert again.returncode == 0
    assert ran(Path()) == [f"data from {saved}"]


@pytest.mark.parametrize(
    ("state", "saves", "told", "said"),
    [
        ("RUNNING", True, "scontrol requeue 101\n", ""),
        ("COMPLETING", True, "", ""),  # scancel
        ("RUNNING", False, "", "Not queued again: nothing was saved."),
    ],
)
def test_what_is_queued_again(
    cluster: Path, instructrl: Instructrl, fakes: None, monkeypatch: pytest.MonkeyPatch,
    state: str, saves: bool, told: str, said: str,
) -> None:  # fmt: skip
    save = "mkdir -p artifacts/data/$FINGERPRINT.partial/checkpoints/checkpoint-1; " if saves else ""
    wait = f"trap '{save}exit 143' TERM; touch started; while :; do sleep 0.05; done"
    monkeypatch.setattr(slurm, "PROGRAM", ("bash", "-c", wait))
    instructrl("data", "recipe=base.yaml", "--slurm")
    found = re.search(r"--job-name=data-(\w+)", jobs(cluster)["101"])
    assert found
    monkeypatch.setenv("FINGERPRINT", found[1])
    (cluster / "queue").write_text(f"{state}\n")
    job = started(cluster, "101")
    until(Path("started").exists, seconds=60)
    time.sleep(0.1)
    job.send_signal(signal.SIGTERM)
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 143
    assert said in out
    assert (cluster / "told").exists() == bool(told)
    if told:
        assert (cluster / "told").read_text() == told


def test_a_stage_that_fails_is_not_queued_again(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    Path("script.json").write_text(json.dumps({"data": {"end": "crash"}}))
    instructrl("data", "recipe=base.yaml", "--slurm")
    (cluster / "queue").write_text("RUNNING\n")
    job = started(cluster, "101")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 1
    assert "out of cheese" in out
    assert not (cluster / "told").exists()


def test_editing_the_recipe_after_submission_changes_nothing(
    cluster: Path, instructrl: Instructrl, fakes: None
) -> None:
    instructrl("data", "recipe=base.yaml", "seed=3", "--slurm")
    Path("base.yaml").write_text("nonsense: 1\n")
    job = started(cluster, "101")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    [order] = Path().glob("artifacts/data/*/order.json")
    assert json.loads(order.read_text())["recipe"]["seed"] == 3


def test_only(here: Path, instructrl: Instructrl, fakes: None) -> None:
    planned = json.loads(instructrl("plan", "recipe=base.yaml", "--json").out)["stages"]
    prints = {row["stage"]: row["fingerprint"] for row in planned}
    missing = instructrl("sft", "recipe=base.yaml", "--only", prints["sft"])
    assert missing.code == 2
    assert "sft needs what would have to run first: data (never ran)." in missing.err
    other = instructrl("data", "recipe=base.yaml", "seed=1", "--only", prints["data"])
    assert other.code == 2
    assert f"--only {prints['data']}: data would be " in other.err
    assert ran(here) == []
    assert instructrl("data", "recipe=base.yaml", "--only", prints["data"]).code == 0
    assert ran(here) == ["data from 0"]
    assert "leave --slurm and --multirun out" in instructrl("sft", "seed=1,2", "-m", "--only", prints["sft"]).err


def test_what_other_jobs_of_a_sweep_refer_to_is_kept(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("data", "recipe=base.yaml", "seed=1,2", "-m", "--slurm")
    for number in jobs(cluster):
        assert started(cluster, number).wait(timeout=120) == 0
    assert len(list(Path().glob("artifacts/data/*/manifest.json"))) == 2
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml").out


@pytest.mark.parametrize(
    ("said", "key", "message"),
    [
        (
            "sbatch: error: invalid partition specified: lon\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "partition=lon",
            "Error: runtime.slurm.partition=lon: sbatch refuses data: Invalid partition name specified. Did you mean "
            "long?",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified\n",
            "account=they",
            "Error: runtime.slurm.account=they: sbatch refuses data: Invalid account or account/partition combination",
        ),
        (
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)\n",
            "cpus=2",
            "Error: sbatch refuses data: Unable to contact slurm controller (connect failure).",
        ),
    ],
)
def test_refusals(cluster: Path, instructrl: Instructrl, fakes: None, said: str, key: str, message: str) -> None:
    (cluster / "refuse").write_text(said)
    result = instructrl("run-all", "recipe=base.yaml", f"runtime.slurm.{key}", "--slurm")
    assert result.code == 2
    assert message in result.err
    assert len(result.err.splitlines()) == 1
    (cluster / "refuse").unlink()
    assert instructrl("run-all", "recipe=base.yaml", "--slurm").code == 0
    assert len(jobs(cluster)) == 5


def test_a_refusal_names_file_and_line(cluster: Path, instructrl: Instructrl, fakes: None) -> None:
    with Path("base.yaml").open("a") as file:
        file.write("runtime:\n  slurm:\n    partition: gpu\n")
    (cluster / "refuse").write_text("sbatch: error: Batch job submission failed: Invalid partition name specified\n")
    result = instructrl("data", "recipe=base.yaml", "--slurm")
    line = len(Path("base.yaml").read_text().splitlines())
    assert f"Error: base.yaml:{line}: runtime.slurm.partition=gpu: sbatch refuses data" in result.err
    assert "There are short, long." in result.err


def test_no_slurm(here: Path, instructrl: Instructrl, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = instructrl("run-all", "recipe=base.yaml", "--slurm")
    assert result.code == 2
    assert result.err.startswith("Error: --slurm needs sbatch, which is not on this machine")
    assert "--slurm" in instructrl("run-all", "recipe=base.yaml", "--print").err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("time=3", "runtime.slurm.time: write hours, minutes and seconds in quotes, '24:00:00'"),
        ("time=1:00", "runtime.slurm.time: write hours, minutes and seconds"),
        ("time=0:05:00", "save_seconds=300 is not less than time=0:05:00"),
        ("partition='a b'", "runtime.slurm.partition='a b'"),
        ("partitoin=a", "Did you mean runtime.slurm.partition?"),
    ],
)
def test_mistakes(here: Path, instructrl: Instructrl, given: str, message: str) -> None:
    result = instructrl("run-all", "recipe=base.yaml", f"runtime.slurm.{given}", "--slurm", "--print")
    assert result.code == 2
    assert message in result.err


def test_a_time_without_quotes_in_a_file(here: Path, instructrl: Instructrl) -> None:
    with Path("base.yaml").open("a") as file:
        file.write("runtime:\n  slurm:\n    time: 24:00:00\n")
    result = instructrl("plan", "recipe=base.yaml")
    line = len(Path("base.yaml").read_text().splitlines())
    if result.code:  # YAML 1.1 reads a number in base 60
        assert f"base.yaml:{line}: runtime.slurm.time: write hours, minutes and seconds in quotes" in result.err
    else:
        assert compose_recipe(["recipe=base.yaml"]).recipe.runtime.slurm.time == "24:00:00"


def test_nothing_of_it_changes_a_fingerprint(here: Path, instructrl: Instructrl) -> None:
    plain = instructrl("plan", "recipe=base.yaml").out
    assert plain == instructrl("plan", "recipe=base.yaml", "runtime.slurm.partition=a", "runtime.slurm.gpus=8").out
