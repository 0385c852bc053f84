"""The command line: what it prints, its exit status, and how fast it is."""

import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Instructrl

from instructrl import __version__, cli, drift, options
from instructrl.display import Plain, duration, number
from instructrl.packages import installed
from instructrl.pipeline import LAST, NAMES
from instructrl.progress import Progress, Snapshot, read_progress

HEAVY = ("torch", "transformers", "trl", "datasets", "accelerate")


def cpu_seconds(*arguments: str) -> float:
    """The CPU time of a process, the least of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(times)


def test_help_is_quick(here: Path) -> None:
    assert cpu_seconds("-m", "instructrl", "--help") < 0.3


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "recipe=base.yaml"], ["config", "recipe=base.yaml"]])
def test_nothing_heavy_is_imported(here: Path, arguments: list[str]) -> None:
    script = (
        "import sys\nfrom instructrl import cli\n"
        f"sys.argv = ['instructrl', *{arguments!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\nassert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_second_run_is_quick(here: Path, instructrl: Instructrl, fakes: None) -> None:
    assert instructrl("data", "recipe=base.yaml").code == 0
    assert cpu_seconds("-m", "fakes.cli", "data", "recipe=base.yaml") < 1.5  # 0.6 on an idle core


def test_a_large_sweep_is_planned_quickly(here: Path) -> None:
    one = cpu_seconds("-m", "instructrl", "plan", "recipe=base.yaml")
    many = cpu_seconds("-m", "instructrl", "plan", "recipe=base.yaml", "seed=range(0,500)", "--multirun")
    assert many < 3.5 * one  # where one takes half a second, under two


def test_help_names_every_command(instructrl: Instructrl) -> None:
    result = instructrl("--help")
    assert result.code == 0
    listed = re.findall(r"^  ([a-z-]+) ", result.out.split("Commands:")[1], re.MULTILINE)
    assert listed == [
        "run-all",
        "plan",
        "estimate",
        "config",
        "show",
        "runs",
        "diff",
        "verify",
        "logs",
        "clean",
        "report",
        "compare",
        *(name.replace("_", "-") for name in NAMES),
    ]
    assert "..." not in result.out.split("Commands:")[1]  # every line is whole


def test_stages_are_those_of_the_pipeline() -> None:
    assert tuple(cli.STAGES) == NAMES
    assert NAMES[-1] == LAST


def test_version(instructrl: Instructrl) -> None:
    assert instructrl("--version").out == f"instructrl {__version__}\n"


def test_config_prints_the_recipe(instructrl: Instructrl) -> None:
    result = instructrl("config", "recipe=base.yaml", "sft.epochs=3")
    values = yaml.safe_load(result.out)
    assert values["sft"]["epochs"] == 3
    assert values["name"] == "base"
    assert values["ppo_ptx"]["ptx_coef"] == 27.8


def test_plan_and_dry_run_print_the_same(instructrl: Instructrl) -> None:
    plan = instructrl("plan", "recipe=base.yaml")
    assert plan.code == 0
    assert plan.out == instructrl("run-all", "recipe=base.yaml", "--dry-run").out
    assert plan.out.splitlines()[0].split()[:2] == ["run", "data"]
    *_, count, memory = plan.out.splitlines()
    assert count == "8 of 8 stages to run."
    assert memory.startswith("Memory: about ")
    assert [line.split()[1] for line in instructrl("sft", "-n", "recipe=base.yaml").out.splitlines()[:-2]] == [
        "data",
        "pretrain",
        "sft",
    ]
    assert not Path("artifacts").exists()


def test_plan_as_json(instructrl: Instructrl) -> None:
    plan = json.loads(instructrl("plan", "recipe=base.yaml", "--json").out)
    assert [stage["stage"] for stage in plan["stages"]] == [
        "data", "pretrain", "sft", "label", "reward_model", "ppo", "ppo_ptx", "eval",
    ]  # fmt: skip
    assert plan["stages"][0] == {
        "stage": "data",
        "verdict": "run",
        "fingerprint": plan["stages"][0]["path"].rpartition("/")[2],
        "path": plan["stages"][0]["path"],
        "why": ["never ran"],
        "estimate": None,
        "needs": [],
    }
    sweep = json.loads(instructrl("plan", "recipe=base.yaml", "seed=1,2", "--multirun", "--json").out)
    assert [job["arguments"] for job in sweep] == [["recipe=base.yaml", "seed=1"], ["recipe=base.yaml", "seed=2"]]


def test_plan_check(instructrl: Instructrl, fakes: None) -> None:
    """What a cron job or a continuous integration asks."""
    assert instructrl("plan", "--check", "recipe=base.yaml").code == 3
    assert instructrl("run-all", "recipe=base.yaml").code == 0
    done = instructrl("plan", "--check", "recipe=base.yaml")
    assert done.code == 0
    assert done.out == instructrl("plan", "recipe=base.yaml").out
    assert instructrl("plan", "--check", "--json", "recipe=base.yaml", "--force", "eval").code == 3
    assert instructrl("plan", "--check", "--mermaid", "-m", "recipe=base.yaml", "seed=0,1").code == 3
    assert instructrl("plan", "--check", "recipe=base.yaml", "sft.epoch=2").code == 2


def test_plan_as_mermaid(instructrl: Instructrl, fakes: None) -> None:
    instructrl("sft", "recipe=base.yaml")
    chart = instructrl("plan", "--mermaid", "recipe=base.yaml").out.splitlines()
    prints = {
        step["stage"]: step["fingerprint"]
        for step in json.loads(instructrl("plan", "recipe=base.yaml", "--json").out)["stages"]
    }
    assert chart[0] == "flowchart TD"
    sft, ppo = f"sft_{prints['sft']}", f"ppo_{prints['ppo']}"
    assert f'  {sft}["<b>sft</b><br>{prints["sft"]}"]:::done' in chart
    assert f'  {ppo}["<b>ppo</b><br>{prints["ppo"]}<br>never ran"]:::run' in chart
    assert f"  {sft} --> {ppo}" in chart
    assert sum("-->" in line for line in chart) == 5  # data needs no line to ppo, which needs sft
    # a sweep is one chart, in which points meet in what they share
    sweep = instructrl("plan", "--mermaid", "-m", "recipe=base.yaml", "ppo.kl_coef=0.1,0.2").out
    assert len(re.findall(r"^  data_\w+\[", sweep, re.MULTILINE)) == 1
    assert len(re.findall(r"^  ppo_[0-9a-f]{12}\[", sweep, re.MULTILINE)) == 2
    assert len(re.findall(r"^  sft_\w+ --> ppo_[0-9a-f]{12}$", sweep, re.MULTILINE)) == 2
    # what a value may hold ends no label
    changed = instructrl("plan", "--mermaid", "recipe=base.yaml", 'model.template="{prompt}\\"];<b>"').out
    assert "#34;#93;#59;#60;b#62;" in changed
    assert all(line.count('"') in (0, 2) for line in changed.splitlines())
    both = instructrl("plan", "--mermaid", "--json", "recipe=base.yaml")
    assert both.code == 2
    assert both.err == "Error: --json and --mermaid are two forms of the same plan; choose one.\n"


def test_another_version_is_a_warning(instructrl: Instructrl, fakes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    instructrl("run-all", "recipe=base.yaml")
    assert "Warning" not in instructrl("plan", "recipe=base.yaml").out
    before = drift.installed("transformers")
    monkeypatch.setattr(drift, "installed", lambda name: "99.1" if name == "transformers" else installed(name))
    plan = instructrl("plan", "recipe=base.yaml")
    assert plan.out.splitlines()[-1] == (
        f"Warning: transformers 99.1 is installed; data, sft, ppo, ppo_ptx and eval were made with {before}. "
        "This makes nothing run again."
    )
    assert "Everything is done" in plan.out
    again = instructrl("plan", "recipe=base.yaml", "sft.epochs=2")
    assert f"Warning: transformers 99.1 is installed; data was made with {before}. " in again.out  # sft is made anew
    [warning] = json.loads(instructrl("plan", "recipe=base.yaml", "--json").out)["warnings"]
    assert warning.startswith("Warning: transformers 99.1 is installed; data, sft, ")


def test_show(instructrl: Instructrl, fakes: None) -> None:
    before = instructrl("show", "sft", "recipe=base.yaml")
    assert before.code == 1
    assert before.err == (
        "Error: sft is not made for this recipe (never ran). Make it with: instructrl sft recipe=base.yaml\n"
    )
    instructrl("sft", "recipe=base.yaml")
    shown = instructrl("show", "sft", "recipe=base.yaml").out
    assert re.search(r"^path: artifacts/sft/[0-9a-f]{12}$", shown, re.MULTILINE)
    assert re.search(r"^  data: artifacts/data/[0-9a-f]{12}$", shown, re.MULTILINE)
    assert "  loss: 0.25" in shown
    assert "    batch_size: 32" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["plan", "sft.learning_rat=1"],
            "Error: There is no key 'sft.learning_rat'. Did you mean sft.learning_rate?\n",
        ),
        (["run-all", "--force", "stf"], "Error: There is no stage 'stf'. Did you mean sft? The stages: "),
        (["data", "--force", "sft"], "Error: --force sft: data does not need it; it needs data.\n"),
        (["show", "reward"], "Error: There is no stage 'reward'. Did you mean reward_model? The stages: "),
        (
            ["pretrain", "model.path=gpt2"],
            "Error: This recipe has no stage pretrain: it starts from the model that model.path names; "
            "model.path=null makes one from scratch.\n",
        ),
        (["judge"], "Error: This recipe has no stage judge: only eval.judge=reward_model trains one.\n"),
        (
            ["ppo-init"],
            "Error: This recipe has no stage ppo_init: its policies start from sft; ppo.init=ppo_init or "
            "ppo_ptx.init=ppo_init trains one.\n",
        ),
        (["plan", "eval.weights=ema", "ppo.ema_decay=0"], "Error: eval.weights=ema needs ppo.ema_decay and ppo_ptx"),
        (["plan", "eval.best_of_n=4", "eval.temperature=0"], "Error: eval.best_of_n needs eval.temperature above 0: "),
        (["plan", "model.path=./none"], "Error: model.path: there is no folder ./none.\n"),
        (["plan", "seed=1,2,x", "-m"], "Error: seed='x': input should be a valid integer"),
        (["plan", "seed=glob(*)", "-m"], "Error: seed=glob(*): "),
    ],
)
def test_mistakes(instructrl: Instructrl, arguments: list[str], message: str) -> None:
    result = instructrl(*arguments, "recipe=base.yaml")
    assert result.code == 2
    assert result.err.startswith(message)
    assert result.out == ""
    assert not Path("artifacts").exists()


def test_unknown_command_and_option(instructrl: Instructrl) -> None:
    result = instructrl("sftt")
    assert result.code == 2
    assert "No such command 'sftt'" in result.err
    assert "sft" in result.err.split("No such command")[1]
    assert instructrl("plan", "--dryrun").code == 2


def test_missing_files_are_found_while_planning(instructrl: Instructrl, here: Path) -> None:
    (here / "own.yaml").write_text(
        "model: {path: model}\ndata:\n  demonstrations:\n    - {path: d.jsonl}\n  rankings:\n    - {path: r.jsonl}\n"
        "  text: [{path: t.txt}]\n"
    )
    (here / "model").mkdir()
    (here / "t.txt").write_text("")
    for command in ("plan", "run-all"):
        result = instructrl(command, "recipe=own.yaml")
        assert result.code == 2
        lines = result.err.removeprefix("Error: ").splitlines()
        assert len(lines) == 4
        assert lines[0].startswith("own.yaml:4: data.demonstrations[0].path: there is no file or folder d.jsonl")
        assert lines[1].startswith("own.yaml:6: data.rankings[0].path: there is no file or folder r.jsonl")
        assert lines[2] == "own.yaml:7: data.text[0].path: t.txt is empty."
        assert lines[3] == "own.yaml:1: model.path: the folder model has no config.json, so it holds no model."
        assert all(line.endswith((".", "?")) for line in lines)
    assert not (here / "artifacts").exists()
    assert instructrl("config", "recipe=own.yaml").code == 0  # needs no file


def test_columns_are_checked_while_planning(instructrl: Instructrl, here: Path) -> None:
    (here / "own.yaml").write_text(
        "model: {path: gpt2}\ndata:\n  demonstrations:\n    - {path: d.jsonl}\n  rankings: [{path: r.jsonl}]\n"
        "  text: [{path: t.txt}]\n"
    )
    (here / "d.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    (here / "r.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}\n')
    (here / "t.txt").write_text("text")
    result = instructrl("plan", "recipe=own.yaml")
    assert result.code == 2
    assert result.err.startswith("Error: own.yaml:4: data.demonstrations[0]")
    assert "'instruction'" in result.err


@pytest.mark.slow  # imports TRL, as the check must
def test_trainer_mappings_are_checked_before_anything_runs(instructrl: Instructrl, here: Path) -> None:
    result = instructrl("run-all", "recipe=base.yaml", "sft.trainer.max_grad_nrm=1")
    assert result.code == 2
    assert "max_grad_norm" in result.err
    assert not (here / "artifacts").exists()
    result = instructrl("run-all", "recipe=base.yaml", "reward_model.trainer.learning_rate=1")
    assert result.code == 2
    assert "reward_model.learning_rate" in result.err
    result = instructrl("run-all", "recipe=base.yaml", "ppo.init=ppo_init", "ppo_init.trainer.max_grad_nrm=1")
    assert result.code == 2
    assert "ppo_init.trainer.max_grad_norm" in result.err


def test_output_folder_that_cannot_be_written(instructrl: Instructrl, fakes: None, here: Path) -> None:
    (here / "file").touch()
    result = instructrl("data", "recipe=base.yaml", "runtime.output_dir=file/artifacts")
    assert result.code == 1
    assert result.err.startswith("Error: ")
    assert "file/artifacts" in result.err
    assert "Traceback" not in result.err


def test_reader_that_goes_away(here: Path) -> None:
    command = f"{sys.executable} -m instructrl config recipe=base.yaml | head -1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True)
    assert done.stdout == "name: base\n"
    assert done.stderr == ""


def test_completion(here: Path) -> None:
    assert "recipe=tiny" in options.complete("recipe=")
    assert options.complete("sft.ep") == ["sft.epochs="]
    assert options.complete_stage("ppo_") == ["ppo_init", "ppo_ptx"]


def test_completion_in_a_shell(here: Path) -> None:
    environment = os.environ | {
        "_INSTRUCTRL_COMPLETE": "complete_bash",
        "COMP_WORDS": "instructrl plan sft.ep",
        "COMP_CWORD": "2",
    }
    script = "import sys; sys.argv = ['instructrl']; from instructrl.cli import app; app(prog_name='instructrl')"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["sft.epochs="]


# Progress and display


def test_progress_round_trip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr("instructrl.progress.time.time", lambda: next(clock))
    assert read_progress(tmp_path) is None
    progress = Progress(tmp_path)
    progress.written = float("-inf")
    progress.update(20, 100, loss=3)  # resumed at step 20
    first = read_progress(tmp_path)
    assert first == Snapshot(20, 100, {"loss": 3.0}, None)
    progress.update(30, 100, loss=2)  # too soon after the first: not written
    assert read_progress(tmp_path) == first
    progress.written = float("-inf")
    progress.update(60, 100, loss=1.5)
    assert read_progress(tmp_path) == Snapshot(60, 100, {"loss": 1.5}, 30.0)  # 40 steps took 30 s, 40 are left


def test_last_step_is_always_written(tmp_path: Path) -> None:
    progress = Progress(tmp_path)
    progress.update(1, 2)
    progress.update(2, 2)
    assert read_progress(tmp_path) == Snapshot(2, 2, {}, 0.0)


def test_plain_display_says_little(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("instructrl.display.time.monotonic", lambda: clock[0])
    display = Plain()
    display.start("sft", Path("x.log"))
    for second in range(1, 31):
        clock[0] = float(second)
        display.update("sft", Snapshot(second, 300, {"loss": 2.5, "accuracy": 0.5}, 100.0))
    display.end("sft", 31.4, {"train_loss": 2.25, "steps": 300, "table": []})
    assert capsys.readouterr().out.splitlines() == [
        "sft: started, log in x.log",
        "sft: step 10 of 300, 1 min 40 s left, loss 2.5, accuracy 0.5",
        "sft: step 20 of 300, 1 min 40 s left, loss 2.5, accuracy 0.5",
        "sft: step 30 of 300, 1 min 40 s left, loss 2.5, accuracy 0.5",
        "sft: done in 31 s, train_loss 2.25, steps 300",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (65, "1 min 5 s"), (7800, "2 h 10 min")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(0.123456, "0.123"), (3, "3"), (12345.6, "12,346"), (9e-6, "9e-06")])
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_live_display_on_a_terminal(here: Path, spawn: object) -> None:
    """Under a pseudo-terminal the bar, the step and the loss appear."""
    (here / "script.json").write_text(json.dumps({"data": {"steps": 6, "seconds": 0.3}}))
    script = (
        "import pty, sys\n"
        f"sys.exit(pty.spawn([{sys.executable!r}, '-m', 'fakes.cli', 'data', 'recipe=base.yaml']) >> 8)\n"
    )
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"data.*\d/6.*loss", done.stdout)
    assert "data: done in" in done.stdout


# Packaging


@pytest.mark.slow  # builds in an environment of its own
def test_wheel_and_sdist_hold_recipes_and_groups(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    [wheel], [sdist] = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    for path in [*(ROOT / "recipes").glob("*.yaml"), *(ROOT / "conf").rglob("*.yaml")]:
        assert f"instructrl/{path.relative_to(ROOT)}" in names
    assert not [name for name in names if name.startswith(("recipes/", "conf/", "tests/"))]
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/recipes/tiny.yaml") for name in archive.getnames())
