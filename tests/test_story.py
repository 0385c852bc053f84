"""The whole pipeline on a shrunken tiny world, with every real stage, by the command line alone."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, Instructrl

SMALL = [
    "data.world.documents=400",
    "data.world.valid_documents=40",
    "data.world.demonstrations=64",
    "data.world.ranked_prompts=24",
    "data.world.valid_ranked_prompts=8",
    "data.world.ppo_prompts=32",
    "data.world.eval_prompts=24",
    "pretrain.steps=12",
    "pretrain.hidden_size=32",
    "pretrain.layers=2",
    "data.max_response_tokens=160",  # a model this raw rambles in bytes
    "sft.epochs=1",
    "label.tie_threshold=0",
    "ppo.total_episodes=16",
    "ppo.batch_size=8",
    "ppo_ptx.total_episodes=16",
    "ppo_ptx.batch_size=8",
    "ppo_ptx.init=ppo_init",  # ppo starts from sft
    "ppo_init.residual_dropout=0.1",
    "eval.num_prompts=16",
    "eval.bootstrap_samples=100",
    "eval.best_of_n=3",
]
EVERY = ["data", "pretrain", "sft", "label", "reward_model", "ppo_init", "ppo", "ppo_ptx", "eval"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `run-all` has run once, and what it printed, in run-all.txt."""
    folder = tmp_path_factory.mktemp("story")
    command = [sys.executable, "-m", "instructrl", "run-all", *SMALL]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "run-all.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def story(here: Path, finished: Path) -> Path:
    """A copy of that folder, and the current directory."""
    shutil.copytree(finished, here, dirs_exist_ok=True)
    return here


def runs(instructrl: Instructrl, *changes: str) -> dict[str, list[str]]:
    """The stages that would run, and why."""
    output = instructrl("plan", "--json", *SMALL, *changes)
    assert output.code == 0, output.err
    return {row["stage"]: row["why"] for row in json.loads(output.out)["stages"] if row["verdict"] == "run"}


def test_run_all_ends_with_the_five_models_and_the_best_of_several_answers(story: Path) -> None:
    printed = (story / "run-all.txt").read_text()
    for model in ("GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx", "SFT, best of 3"):
        assert re.search(rf"{re.escape(model)} .*\[[.\d]+, [.\d]+\]", printed), printed
    [page] = re.findall(r"^The report: (.*report\.html)$", printed, re.MULTILINE)
    written = (story / page).read_text()
    assert all(
        f'id="chart-{name}"' in written for name in ("win_rates", "tax_tasks", "ppo_reward", "ppo_eos", "pretrain_loss")
    )
    assert "not made" not in written
    assert re.search(r"sft: done in", printed)


def test_every_stage_left_a_whole_artifact(story: Path, instructrl: Instructrl) -> None:
    assert sorted(path.name for path in (story / "artifacts").iterdir() if path.is_dir()) == sorted(
        [*EVERY, "recipes", "reports", "runs"]
    )
    for stage in EVERY:
        shown = json.loads(instructrl("show", stage, "--json", *SMALL).out)
        assert (Path(shown["path"]) / "manifest.json").is_file()
        assert shown["metrics"]
    assert not list((story / "artifacts").rglob("*.partial"))


def test_a_second_run_says_that_everything_is_done(story: Path, instructrl: Instructrl) -> None:
    output = instructrl("run-all", *SMALL)
    assert output.code == 0
    assert "Everything is done" in output.out


def test_a_change_runs_exactly_what_depends_on_it(story: Path, instructrl: Instructrl) -> None:
    changed = runs(instructrl, "sft.learning_rate=3e-3")
    assert list(changed) == ["sft", "label", "reward_model", "ppo", "ppo_ptx", "eval"]
    assert list(runs(instructrl, "ppo_init.epochs=1")) == ["ppo_init", "ppo_ptx", "eval"]
    assert changed["sft"] == ["sft.learning_rate: 0.002 -> 0.003"]
    assert changed["eval"] == ["downstream of sft"]
    assert list(runs(instructrl, "ppo_ptx.ptx_coef=0.1")) == ["ppo_ptx", "eval"]
    assert runs(instructrl) == {}
    assert runs(instructrl, "runtime.jobs=1", "runtime.max_tokens=512", "runtime.save_minutes=1") == {}


def test_the_report_judges_the_claims_and_the_metrics_agree_with_it(story: Path, instructrl: Instructrl) -> None:
    folder = Path(json.loads(instructrl("show", "eval", "--json", *SMALL).out)["path"])
    report, metrics = (folder / "report.md").read_text(), json.loads((folder / "metrics.json").read_text())
    assert len(metrics["table"]["rows"]) == 6
    for row in metrics["table"]["rows"]:
        assert f"| {row[0]} | {row[1]} |" in report
    assert re.search(r"\| \**(holds|does not hold|undecided)\** \|", report)


def test_models_load_with_the_stock_classes(story: Path, instructrl: Instructrl) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    paths = {stage: json.loads(instructrl("show", stage, "--json", *SMALL).out)["path"] for stage in EVERY}
    for stage in ("pretrain", "sft", "ppo_init", "ppo", "ppo_ptx"):
        model = AutoModelForCausalLM.from_pretrained(f"{paths[stage]}/model")
        assert len(AutoTokenizer.from_pretrained(f"{paths[stage]}/model")) == model.config.vocab_size
    reward_model = AutoModelForSequenceClassification.from_pretrained(f"{paths['reward_model']}/model")
    assert reward_model.config.num_labels == 1
    assert isinstance(reward_model.config.reward_bias, float)
