"""Running a plan: kills at any moment, two runners at once, signals, failures. The stages are fakes."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Instructrl, ran, until

from instructrl import memory
from instructrl.points import choices

Spawn = Callable[..., subprocess.Popen[str]]


def write_script(here: Path, **stages: dict) -> None:
    (here / "script.json").write_text(json.dumps(stages))


def step_reached(here: Path, stage: str, step: int) -> Callable[[], bool]:
    pattern = f"artifacts/{stage}/*.partial/checkpoints/checkpoint-{step}/COMPLETE"
    return lambda: any(here.glob(pattern))


def partials(here: Path) -> list[Path]:
    return list(here.glob("artifacts/*/*.partial"))


def test_second_run_does_nothing_and_says_so(here: Path, instructrl: Instructrl, fakes: None) -> None:
    first = instructrl("run-all", "recipe=base.yaml")
    assert first.code == 0, first.err
    assert ran(here) == ["data from 0", "sft from 0", "ppo from 0", "ppo_ptx from 0", "eval from 0"]
    assert "PPO" in first.out
    assert "0.75" in first.out
    assert "Judged by nobody." in first.out
    second = instructrl("run-all", "recipe=base.yaml")
    assert second.code == 0
    assert "Everything is done" in second.out
    assert "0.75" in second.out
    assert ran(here) == []
    assert not partials(here)


def test_what_changes_runs_and_what_is_below_it(here: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("ppo", "recipe=base.yaml")
    ran(here)
    changed = instructrl("ppo", "recipe=base.yaml", "sft.learning_rate=3e-5")
    assert "sft.learning_rate: 9.65e-06 -> 3e-05" in changed.out
    assert ran(here) == ["sft from 0", "ppo from 0"]
    assert "Everything is done" in instructrl("ppo", "recipe=base.yaml").out  # changed back
    runtime = ("runtime.threads=1", "runtime.save_minutes=3", "runtime.jobs=2", "runtime.device=cpu")
    assert "Everything is done" in instructrl("ppo", "recipe=base.yaml", *runtime).out
    assert ran(here) == []


def test_force_runs_a_stage_and_what_is_below_it(here: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("ppo-ptx", "recipe=base.yaml")
    ran(here)
    instructrl("ppo-ptx", "recipe=base.yaml", "--force", "sft")
    assert ran(here) == ["sft from 0", "ppo_ptx from 0"]  # although sft came out the same
    assert "Everything is done" in instructrl("ppo-ptx", "recipe=base.yaml").out
    assert not list(here.glob("artifacts/*/*.discarded"))


def test_upstream_built_again_and_different_runs_what_is_below_it(
    here: Path, instructrl: Instructrl, fakes: None
) -> None:
    write_script(here, data={"random": True})
    instructrl("ppo", "recipe=base.yaml")
    ran(here)
    instructrl("data", "recipe=base.yaml", "--force=data")
    assert ran(here) == ["data from 0"]
    plan = instructrl("ppo", "recipe=base.yaml", "-n").out
    assert "data was built again" in plan
    assert "2 of 3 stages to run" in plan
    instructrl("ppo", "recipe=base.yaml")
    assert ran(here) == ["sft from 0", "ppo from 0"]


def test_upstream_built_again_to_the_bit_runs_nothing_below_it(here: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("sft", "recipe=base.yaml")
    ran(here)
    remove(here, "data")
    result = instructrl("ppo", "recipe=base.yaml")
    assert ran(here) == ["data from 0", "ppo from 0"]
    assert "sft: still good" in result.out


def remove(here: Path, stage: str) -> None:
    for path in sorted((here / "artifacts" / stage).rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def test_killed_stage_is_resumed(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, sft={"steps": 5, "end": "kill"})
    failed = instructrl("run-all", "recipe=base.yaml")
    assert failed.code == 1
    assert "sft was killed by SIGKILL" in failed.err
    assert "Go on with: instructrl run-all recipe=base.yaml" in failed.err
    assert [path.parent.name for path in partials(here)] == ["sft"]
    assert not list(here.glob("artifacts/sft/*/manifest.json"))
    assert "resumes from step 4" in instructrl("plan", "recipe=base.yaml").out
    write_script(here)
    assert instructrl("sft", "recipe=base.yaml").code == 0
    assert "sft from 4" in ran(here)
    [sft] = here.glob("artifacts/sft/*/manifest.json")
    assert not (sft.parent / "checkpoints").exists()
    assert not (sft.parent / "half.txt").exists()


def test_crash_prints_sentence_log_and_command(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, data={"end": "crash"})
    failed = instructrl("run-all", "recipe=base.yaml", "--force", "data")
    assert failed.code == 1
    assert "data failed: RuntimeError: out of cheese." in failed.err
    assert "  | about to crash" in failed.err
    log = failed.err.split("Its log: ")[1].splitlines()[0]
    assert "about to crash" in (here / log).read_text()
    assert failed.err.splitlines()[-1] == "Go on with: instructrl run-all recipe=base.yaml"


def test_wrong_data_leaves_nothing_half_written(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, data={"end": "user error"})
    failed = instructrl("run-all", "recipe=base.yaml")
    assert failed.code == 2
    assert failed.err == "Error: my.jsonl:3: this line is no JSON.\n"
    assert not partials(here)
    assert not list(here.glob("artifacts/*/*/*"))


def test_a_failure_lets_what_runs_beside_it_finish(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, ppo={"end": "crash"}, ppo_ptx={"steps": 3, "seconds": 0.3})
    failed = instructrl("run-all", "recipe=base.yaml", "runtime.jobs=2")
    assert failed.code == 1
    assert "ppo failed" in failed.err
    assert "ppo_ptx: done" in failed.out
    assert "eval from 0" not in ran(here)


def reads(process: subprocess.Popen[str], words: str) -> str:
    """What the process prints up to a line with these words."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            break
    return "".join(lines)


def test_killed_runner_leaves_an_orphan_that_the_next_one_waits_for(here: Path, spawn: Spawn) -> None:
    write_script(here, data={"until": "go"})
    first = spawn("data", "recipe=base.yaml")
    until(step_reached(here, "data", 1))
    first.kill()
    first.wait()
    second = spawn("data", "recipe=base.yaml")
    assert "another process is making it; waiting" in reads(second, "waiting")
    (here / "go").touch()
    out, err = second.communicate(timeout=30)
    assert "data: done" in out, err
    assert ran(here) == ["data from 0"]  # trained once
    assert len(list(here.glob("artifacts/data/*/manifest.json"))) == 1


def test_orphan_that_finished_is_published(here: Path, spawn: Spawn, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, data={"steps": 3, "seconds": 0.2})
    first = spawn("data", "recipe=base.yaml")
    until(step_reached(here, "data", 1))
    first.kill()
    first.wait()
    until(lambda: any(here.glob("artifacts/data/*.partial/result.json")))
    assert "finished, to be published" in instructrl("plan", "recipe=base.yaml").out
    assert instructrl("data", "recipe=base.yaml").code == 0
    assert ran(here) == ["data from 0"]


def test_two_runners_build_once(here: Path, spawn: Spawn) -> None:
    write_script(here, data={"until": "go"})
    first = spawn("data", "recipe=base.yaml")
    until(step_reached(here, "data", 1))
    second = spawn("data", "recipe=base.yaml")
    assert "waiting" in reads(second, "waiting")
    (here / "go").touch()
    outputs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert first.returncode == second.returncode == 0
    assert "data: done" in outputs[0]
    assert "made meanwhile" in outputs[1]
    assert ran(here) == ["data from 0"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_and_the_next_run_resumes(
    here: Path, spawn: Spawn, instructrl: Instructrl, fakes: None, number: int, code: int
) -> None:
    write_script(here, data={"steps": 50, "seconds": 0.1})
    process = spawn("run-all", "recipe=base.yaml")
    until(step_reached(here, "data", 2))
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Stopping" in out
    assert "data was stopped and saved at step" in err
    assert "Go on with: instructrl run-all recipe=base.yaml" in err
    saved = int(err.split("saved at step ")[1].split(".")[0])
    write_script(here, data={"steps": saved + 1})
    ran(here)
    assert instructrl("data", "recipe=base.yaml").code == 0
    assert ran(here) == [f"data from {saved}"]


def test_stage_stopped_on_its_own_is_no_artifact(here: Path, spawn: Spawn) -> None:
    write_script(here, data={"steps": 50, "seconds": 0.1})
    process = spawn("data", "recipe=base.yaml")
    until(step_reached(here, "data", 1))
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "data was stopped and saved at step" in err
    assert not list(here.glob("artifacts/data/*/manifest.json"))


def test_partial_from_other_inputs_is_started_over(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, data={"random": True}, sft={"steps": 4, "end": "kill"})
    assert instructrl("sft", "recipe=base.yaml").code == 1
    assert instructrl("data", "recipe=base.yaml", "--force=data").code == 0
    write_script(here)
    ran(here)
    assert "resumes" not in instructrl("plan", "recipe=base.yaml").out
    assert instructrl("sft", "recipe=base.yaml").code == 0
    assert ran(here) == ["sft from 0"]


def test_what_was_made_from_an_input_that_changed_meanwhile_is_thrown_away(
    here: Path, spawn: Spawn, instructrl: Instructrl, fakes: None
) -> None:
    assert instructrl("data", "recipe=base.yaml").code == 0
    write_script(here, sft={"until": "go"})
    process = spawn("sft", "recipe=base.yaml")
    until(step_reached(here, "sft", 1))
    [written] = here.glob("artifacts/data/*/out.txt")
    written.write_text(written.read_text()[::-1])
    (here / "go").touch()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "sft: the artifact of data changed meanwhile (out.txt was changed)" in err
    assert not partials(here)
    write_script(here)
    ran(here)
    plan = instructrl("sft", "recipe=base.yaml", "--dry-run")
    assert "out.txt was changed" in plan.out
    assert instructrl("sft", "recipe=base.yaml").code == 0
    assert ran(here) == ["data from 0", "sft from 0"]
    assert len(list(here.glob("artifacts/data/*.damaged"))) == 1


def test_what_was_begun_from_a_damaged_input_is_started_over(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, sft={"steps": 4, "end": "kill"})
    assert instructrl("sft", "recipe=base.yaml").code == 1
    [written] = here.glob("artifacts/data/*/out.txt")
    written.write_text(written.read_text()[::-1])  # perhaps before the killed stage read it
    write_script(here)
    ran(here)
    assert instructrl("sft", "recipe=base.yaml").code == 0
    assert ran(here) == ["data from 0", "sft from 0"]  # although data came out the same


def test_interrupted_force_goes_on_with_the_same_force(here: Path, instructrl: Instructrl, fakes: None) -> None:
    assert instructrl("sft", "recipe=base.yaml").code == 0
    write_script(here, sft={"steps": 4, "end": "kill"})
    failed = instructrl("sft", "recipe=base.yaml", "--force=sft")
    assert "Go on with: instructrl sft recipe=base.yaml --force=sft" in failed.err
    assert "Everything is done" in instructrl("sft", "recipe=base.yaml").out  # the old artifact is still there
    write_script(here)
    ran(here)
    assert instructrl("sft", "recipe=base.yaml", "--force=sft").code == 0
    assert ran(here) == ["sft from 3"]


def test_environment_of_a_stage(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from instructrl.launch import environment
    from instructrl.recipe import load_recipe

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    plain = environment(load_recipe(["recipe=base.yaml"]))
    assert plain["TOKENIZERS_PARALLELISM"] == "false"
    assert "HF_HUB_OFFLINE" not in plain
    assert "OMP_NUM_THREADS" not in plain
    told = environment(load_recipe(["recipe=base.yaml", "runtime.threads=3", "runtime.offline=true"]))
    assert told["OMP_NUM_THREADS"] == "3"
    assert told["HF_HUB_OFFLINE"] == "1"


def test_metrics_and_origin_are_in_the_manifest(here: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("sft", "recipe=base.yaml")
    shown = json.loads(instructrl("show", "sft", "recipe=base.yaml", "--json").out)
    assert shown["metrics"] == {"loss": 0.25, "lost": None}
    assert shown["inputs"]["data"].startswith("artifacts/data/")
    assert shown["current"] is True
    assert shown["made"]["packages"]["pydantic"]
    assert shown["made"]["command"] == "instructrl sft recipe=base.yaml"
    assert shown["key"]["packages"]["trl"].count(".") == 1
    assert shown["key"]["config"]["sft"]["batch_size"] == 32
    assert "runtime" not in shown["key"]["config"]


def test_sweep_shares_what_is_equal(here: Path, instructrl: Instructrl, fakes: None) -> None:
    result = instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.01,0.02", "--multirun")
    assert result.code == 0, result.err
    assert ran(here) == ["data from 0", "sft from 0", "ppo from 0", "ppo from 0"]
    summary = result.out.splitlines()[-5:]
    assert any("ppo.kl_coef=0.01" in line and "done" in line and "0.25" in line for line in summary)
    assert any("ppo.kl_coef=0.02" in line for line in summary)


def test_failed_job_of_a_sweep_leaves_the_others(here: Path, instructrl: Instructrl, fakes: None) -> None:
    write_script(here, ppo={"end": "crash"})
    result = instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.01,0.02", "-m")
    assert result.code == 1
    assert "2 of 2 jobs failed" in result.err
    assert ran(here).count("ppo from 0") == 2


def waiting_at_once(here: Path, stage: str, most: int) -> Callable[[], bool]:
    """Whether so many of the stage's processes have begun; none ends before the file `go` is there."""
    return lambda: (here / "ran.log").exists() and (here / "ran.log").read_text().count(f"{stage} from 0") >= most


def test_points_of_a_sweep_run_side_by_side_and_share_what_is_equal(here: Path, spawn: Spawn) -> None:
    write_script(here, ppo={"until": "go"})
    process = spawn("ppo", "recipe=base.yaml", "ppo.kl_coef=0.01,0.02,0.03", "-m", "--jobs", "2")
    until(waiting_at_once(here, "ppo", 2))  # in vain if one waited for the other
    assert ran(here) == ["data from 0", "sft from 0", "ppo from 0", "ppo from 0"]
    (here / "go").touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert ran(here) == ["ppo from 0"]
    assert "3 jobs of 9 stages, 5 of them different: 5 to run, up to 2 side by side." in out
    assert "ppo [3/3]: done" in out


def test_two_sweeps_at_once_build_what_they_share_once(here: Path, spawn: Spawn) -> None:
    write_script(here, data={"until": "go"}, ppo={"until": "go"})
    first = spawn("ppo", "recipe=base.yaml", "ppo.kl_coef=0.01,0.02", "-m", "--jobs=2")
    until(step_reached(here, "data", 1))
    second = spawn("ppo", "recipe=base.yaml", "ppo.kl_coef=0.02,0.03", "-m", "--jobs=2")
    assert "data [1/2]: another process is making it; waiting" in reads(second, "waiting")
    (here / "go").touch()
    for process in (first, second):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.count(" done ") >= 2
    assert sorted(ran(here)) == ["data from 0", "ppo from 0", "ppo from 0", "ppo from 0", "sft from 0"]
    assert len(list(here.glob("artifacts/ppo/*/manifest.json"))) == 3


def test_a_stage_waits_for_memory(here: Path, spawn: Spawn) -> None:
    # Not in this process: Linux counts what a process was forked from, and this one is large.
    process = spawn("ppo", "recipe=base.yaml")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    [known] = here.glob("artifacts/ppo/*/manifest.json")
    took = json.loads(known.read_text())["made"]["memory"]  # bytes
    assert 10e6 < took < 1e9
    ran(here)
    write_script(here, ppo={"until": "go"})
    for limit, most in ((1.5 * took / 1e9, 1), (3 * took / 1e9, 2)):
        memory = f"runtime.memory_gb={limit:.6f}"
        process = spawn("ppo", "recipe=base.yaml", f"ppo.kl_coef={most},{most}.5", "-m", "--jobs=2", memory)
        until(waiting_at_once(here, "ppo", most))
        if most == 1:
            assert "ppo [2/2]: waits for memory; it is expected to take" in reads(process, "waits for memory")
        assert ran(here) == ["ppo from 0"] * most
        (here / "go").touch()
        _, err = process.communicate(timeout=30)
        assert process.returncode == 0, err
        assert ran(here) == ["ppo from 0"] * (2 - most)
        (here / "go").unlink()


@pytest.mark.parametrize(
    ("needed", "free", "running", "limit", "there_is"),
    [
        (4, 4, [], None, True),
        (5, 4, [], None, False),
        (4, 9, [(6, 1)], None, True),  # the other will take 5 more of the 9
        (4, 8, [(6, 1)], None, False),
        (4, 4, [(6, 7)], None, True),  # it has taken more than was expected, and is no longer growing
        (4, 99, [(6, 1)], 10, True),
        (4, 99, [(6, 1)], 9, False),
        (4, 99, [(2, 7)], 10, False),
        (0, 0, [(0, 5)], None, True),  # nothing known
    ],
)
def test_room_beside_others(
    needed: int, free: int, running: list[tuple[int, int]], limit: int | None, there_is: bool
) -> None:
    assert memory.fits(needed, free, running, limit) is there_is


def test_memory_that_a_stage_is_expected_to_take() -> None:
    assert memory.expected("ppo", [3, 4], {"ppo": 5, "sft": 9}, 6) == 5  # in this run
    assert memory.expected("ppo", [3, 4], {"sft": 9}, 6) == 6  # in an earlier one
    assert memory.expected("ppo", [3, 4], {}, None) == 7  # what it is made from


def test_memory_of_a_process_and_what_it_starts() -> None:
    script = "import subprocess, sys; held = b'x' * 50_000_000; print(flush=True); "
    inner = f"[sys.executable, '-c', {script + 'sys.stdin.read()'!r}]"
    command = [sys.executable, "-c", f"{script}subprocess.run({inner}, stdin=0)"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.readline()  # of the one that it started
        assert 100e6 < memory.resident(process.pid) < 250e6
        process.communicate()
    assert memory.resident(process.pid) == 0


def test_ranges_and_lists_of_several_keys(instructrl: Instructrl) -> None:
    sweep = ("seed=range(1,3)", "ppo.kl_coef=range(0.1,0.4,0.1)", "label.labelers=3,5", "name=choice(a,b)")
    found = json.loads(instructrl("plan", "recipe=base.yaml", *sweep, "-m", "--json").out)
    assert len(found) == 2 * 3 * 2 * 2  # 0.4 is not in the range
    assert found[0]["arguments"][1:] == ["seed=1", "ppo.kl_coef=0.1", "label.labelers=3", "name=a"]
    assert found[-1]["arguments"][1:] == ["seed=2", "ppo.kl_coef=0.3", "label.labelers=5", "name=b"]
    assert len({stage["fingerprint"] for job in found for stage in job["stages"] if stage["stage"] == "ppo"}) == 12


@pytest.mark.parametrize(
    ("sweep", "values"),
    [
        ("ppo.kl_coef=range(0.1,0.4,0.1)", [0.1, 0.2, 0.3]),  # Hydra: 0.30000000000000004 and 0.4
        ("ppo.kl_coef=range(0.3,0,-0.1)", [0.3, 0.2, 0.1]),
        ("ppo.kl_coef=range(1,2,0.25)", [1.0, 1.25, 1.5, 1.75]),
        ("seed=range(3)", [0, 1, 2]),
        ("seed=range(4,1,-2)", [4, 2]),
        ("seed=sort(3,1,2)", [1, 2, 3]),
        ("name=1e-4,other", [1e-4, "other"]),
    ],
)
def test_values_of_a_sweep(sweep: str, values: list[object]) -> None:
    assert [choice.value for choice in choices(sweep)] == values


def test_a_sweep_without_a_value_is_refused(instructrl: Instructrl) -> None:
    refused = instructrl("run-all", "recipe=base.yaml", "seed=range(3,3)", "-m")
    assert (refused.code, refused.err) == (2, "Error: seed=range(3,3): there is no value in it.\n")
