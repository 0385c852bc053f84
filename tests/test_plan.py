"""The plan: what runs, and the root cause it gives. Artifacts are published by hand, nothing runs."""

import json
from collections.abc import Collection, Iterable
from pathlib import Path

import pytest

from instructrl.artifacts import Store
from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.jobs import make_jobs
from instructrl.key import file_sha256
from instructrl.pipeline import stages
from instructrl.plan import StagePlan, changes, make_plan
from instructrl.recipe import load_recipe


class Bench:
    """A store in which stages are made by publishing a text."""

    def __init__(self, here: Path) -> None:
        self.store = Store(here / "artifacts")
        self.texts: dict[str, str] = {}
        self.took: dict[str, float] = {}
        self.recipes: dict[tuple[str, ...], Recipe] = {}

    def plan(self, *overrides: str, force: Collection[str] = (), targets: Iterable[str] = ("eval",)) -> list[StagePlan]:
        recipe = self.recipe(*overrides)
        return make_plan(stages(recipe), recipe, targets, self.store, force)

    def why(self, *overrides: str, force: Collection[str] = (), targets: Iterable[str] = ("eval",)) -> dict[str, str]:
        """The reasons of the stages that run."""
        return {
            step.stage.name: ", ".join(step.why)
            for step in self.plan(*overrides, force=force, targets=targets)
            if step.runs
        }

    def recipe(self, *overrides: str) -> Recipe:
        if overrides not in self.recipes:
            self.recipes[overrides] = load_recipe(["recipe=base.yaml", *overrides])
        return self.recipes[overrides]

    def make(self, *overrides: str, targets: Iterable[str] = ("eval",), force: Collection[str] = ()) -> None:
        """What running the plan would leave."""
        plan = self.plan(*overrides, targets=targets, force=force)
        keys = {step.stage.name: step.key for step in plan}
        for step in plan:
            if step.runs:
                partial = self.store.partial(step.stage.name, step.key)
                partial.mkdir(parents=True, exist_ok=True)
                (partial / "out").write_text(self.texts.get(step.stage.name, ""))
                upstream = {need: self.store.find(need, keys[need]) for need in step.stage.needs}
                digests = {need: artifact.digest for need, artifact in upstream.items() if artifact}
                seconds = self.took.get(step.stage.name, 60.0)
                self.store.publish(step.stage.name, step.key, digests, {"seconds": seconds}, {})
            self.store.remember(self.recipe(*overrides).name, {step.stage.name: step.key})


@pytest.fixture
def bench(here: Path) -> Bench:
    return Bench(here)


@pytest.fixture
def made(bench: Bench) -> Bench:
    bench.make()
    return bench


ALL = ["data", "pretrain", "sft", "label", "reward_model", "ppo", "ppo_ptx", "eval"]


def test_first_run(bench: Bench) -> None:
    assert bench.why() == dict.fromkeys(ALL, "never ran")


def test_nothing_to_do(made: Bench) -> None:
    assert made.why() == {}
    assert made.why("runtime.jobs=2", "runtime.device=cpu", "runtime.save_minutes=1") == {}


def test_root_cause_and_what_is_downstream_of_it(made: Bench) -> None:
    assert made.why("sft.learning_rate=3e-5") == {
        "sft": "sft.learning_rate: 9.65e-06 -> 3e-05",
        "label": "downstream of sft",
        "reward_model": "downstream of sft",
        "ppo": "downstream of sft",
        "ppo_ptx": "downstream of sft",
        "eval": "downstream of sft",
    }


def test_two_root_causes(made: Bench) -> None:
    assert made.why("reward_model.epochs=2", "ppo.kl_coef=0.1") == {
        "reward_model": "reward_model.epochs: 1.0 -> 2.0",
        "ppo": "ppo.kl_coef: 0.02 -> 0.1, downstream of reward_model",
        "ppo_ptx": "downstream of reward_model",
        "eval": "downstream of reward_model and ppo",
    }


def test_a_change_that_all_stages_read_is_told_once(made: Bench) -> None:
    why = made.why("seed=1")
    assert why.pop("data") == "seed: 0 -> 1"
    assert why == dict.fromkeys(ALL[1:], "downstream of data")


def test_changing_back(made: Bench) -> None:
    made.make("sft.epochs=2")
    assert made.why("sft.epochs=2") == {}
    assert made.why() == {}


def test_changed_where_only_the_upper_stage_was_run(made: Bench) -> None:
    made.make("sft.epochs=2", targets=["sft"])
    assert made.why("sft.epochs=2") == {
        "label": "sft changed",
        "reward_model": "downstream of label",
        "ppo": "downstream of label",
        "ppo_ptx": "downstream of label",
        "eval": "downstream of label",
    }


def test_artifact_that_is_gone(made: Bench) -> None:
    [label] = [step for step in made.plan() if step.stage.name == "label"]
    [evaluation] = [step for step in made.plan() if step.stage.name == "eval"]
    assert label.artifact is not None
    assert evaluation.artifact is not None
    (label.artifact.path / "manifest.json").unlink()
    assert made.why() == {}  # nothing needs it
    [label] = [step for step in made.plan() if step.stage.name == "label"]
    assert label.why == ("its artifact is gone, and nothing that runs needs it",)
    (evaluation.artifact.path / "manifest.json").unlink()
    why = made.why()
    assert why.pop("label") == "its artifact is gone"
    assert why.pop("eval") == "its artifact is gone, downstream of label"
    assert why == dict.fromkeys(("reward_model", "ppo", "ppo_ptx"), "downstream of label")


def test_built_again_with_another_result(made: Bench) -> None:
    made.texts["reward_model"] = "other weights"
    made.make(targets=["reward_model"], force=["reward_model"])
    assert made.why() == {
        "ppo": "reward_model was built again",
        "ppo_ptx": "reward_model was built again",
        "eval": "downstream of ppo and ppo_ptx",
    }


def test_built_again_with_the_same_result(made: Bench) -> None:
    made.make(targets=["reward_model"], force=["reward_model"])
    assert made.why() == {}


def test_forced(made: Bench) -> None:
    assert made.why(force=["ppo"]) == {"ppo": "forced", "eval": "downstream of ppo"}
    plans = {step.stage.name: step for step in made.plan(force=["ppo"])}
    assert plans["eval"].forced
    assert not plans["ppo_ptx"].forced


def test_ppo_init_is_there_where_a_policy_starts_from_it(bench: Bench) -> None:
    """And not above the policies that do not."""
    assert list(bench.why("ppo.init=ppo_init", targets=["ppo"])) == [*ALL[:5], "ppo_init", ALL[5]]
    bench.make()
    assert bench.why("ppo.init=ppo_init", "ppo_ptx.init=ppo_init") == {
        "ppo_init": "never ran",
        "ppo": "ppo.init: sft -> ppo_init, downstream of ppo_init",
        "ppo_ptx": "ppo_ptx.init: sft -> ppo_init, downstream of ppo_init",
        "eval": "downstream of ppo and ppo_ptx",
    }
    bench.make("ppo.init=ppo_init")
    assert bench.why("ppo.init=ppo_init", "ppo_init.epochs=3") == {
        "ppo_init": "ppo_init.epochs: 2.0 -> 3.0",
        "ppo": "downstream of ppo_init",
        "eval": "downstream of ppo_init",
    }
    assert bench.why("ppo_init.epochs=3") == {}


def test_a_target_needs_only_what_is_above_it(bench: Bench) -> None:
    assert list(bench.why(targets=["sft"])) == ["data", "pretrain", "sft"]


def test_trainer_mapping_and_lists(made: Bench) -> None:
    assert made.why("sft.trainer.packing=true")["sft"] == "sft.trainer.packing: (absent) -> true"
    assert made.why("eval.prompted_templates=['{prompt} A']") == {
        "eval": "eval.prompted_templates: [] -> ['{prompt} A']"
    }


def test_content_of_a_file(bench: Bench, here: Path) -> None:
    own = ["data.world=null", "eval.judge=reward_model", "data.text=[{path: t.txt}]", "model.path=gpt2"]
    (here / "t.txt").write_text("one")
    bench.make(*own)
    (here / "t.txt").write_text("two")
    assert bench.why(*own)["data"] == "data.text[0].path: its content changed"


def test_content_of_an_evaluation_set(bench: Bench, here: Path) -> None:
    """What training may not overlap with decides what is left of training."""
    own = ["data.world=null", "eval.judge=reward_model", "data.text=[{path: t.txt}]", "model.path=gpt2"]
    own.append("data.evaluation_sets=[{path: exam.jsonl}]")
    (here / "t.txt").write_text("one")
    with pytest.raises(UserError, match=r"data\.evaluation_sets\[0\]\.path: there is no file or folder exam\.jsonl"):
        bench.plan(*own)
    (here / "exam.jsonl").write_text('{"question": "one"}\n')
    bench.make(*own)
    (here / "exam.jsonl").write_text('{"question": "two"}\n')
    assert bench.why(*own)["data"] == "data.evaluation_sets[0].path: its content changed"


def test_version_of_a_stage() -> None:
    assert changes({"version": 1, "config": {}}, {"version": 2, "config": {}}) == ["the stage's version: 1 -> 2"]
    assert changes({"packages": {"trl": "1.15"}}, {"packages": {"trl": "1.16"}}) == ["trl: 1.15 -> 1.16"]


def test_resumes_from_the_last_complete_checkpoint(bench: Bench) -> None:
    [data] = bench.plan(targets=["data"])
    partial = bench.store.partial("data", data.key)
    for step, complete in ((20, True), (100, True), (120, False)):
        checkpoint = partial / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        if complete:
            (checkpoint / "COMPLETE").touch()
    assert bench.why(targets=["data"]) == {"data": "never ran"}  # no order: not begun by a runner
    (partial / "order.json").write_text(json.dumps({"digests": {}, "mended": {}}))
    assert bench.why(targets=["data"]) == {"data": "never ran, resumes from step 100"}
    assert bench.why(targets=["data"], force=["data"]) == {"data": "forced"}
    (partial / "order.json").write_text(json.dumps({"digests": {"other": "inputs"}}))
    assert bench.why(targets=["data"]) == {"data": "never ran"}


def estimates(plan: list[StagePlan]) -> dict[str, tuple[float, bool]]:
    """Stage -> how long it takes, and whether by the recipe's own last run."""
    return {step.stage.name: (step.estimate.seconds, step.estimate.same_recipe) for step in plan if step.estimate}


def test_time_of_last_time(made: Bench) -> None:
    assert estimates(made.plan("ppo.kl_coef=0.5")) == {"ppo": (60.0, True), "eval": (60.0, True)}


def test_time_by_the_run_of_another_recipe_that_is_most_like_it(bench: Bench) -> None:
    took = bench.took
    took["sft"] = 10.0
    bench.make("name=one", "sft.epochs=5", "sft.batch_size=64", targets=["sft"])
    took["sft"] = 20.0
    bench.make("name=two", "sft.batch_size=64", targets=["sft"])
    took["sft"] = 30.0
    bench.make("name=three", "sft.epochs=5", targets=["sft"])
    assert estimates(bench.plan("sft.batch_size=64", "sft.learning_rate=1e-3", targets=["sft"])) == {
        "sft": (20.0, False)
    }
    assert estimates(bench.plan(targets=["sft"])) == {"sft": (30.0, False)}  # of equals the newest
    assert estimates(bench.plan("name=one", targets=["sft"])) == {"sft": (10.0, True)}  # its own
    assert estimates(bench.plan("sft.batch_size=64", targets=["sft"])) == {}  # done
    assert "reward_model" not in estimates(bench.plan())  # never ran anywhere


def test_planning_writes_nothing(bench: Bench, here: Path) -> None:
    bench.plan()
    assert [path.name for path in here.iterdir()] == ["base.yaml"]


def test_a_sweep_reads_each_file_once(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five hundred points are planned in the time of a few: nothing is composed, hashed or checked for each."""
    (here / "t.txt").write_text("A text.\n")
    own = ["data.world=null", "eval.judge=reward_model", "data.text=[{path: t.txt}]", "model.path=gpt2"]
    own += ["data.demonstrations=[{path: d.jsonl}]", "data.rankings=[{path: r.jsonl}]"]
    (here / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (here / "r.jsonl").write_text('{"prompt": "a", "responses": ["b", "c"], "ranks": [1, 2]}\n')
    hashed: list[Path] = []
    monkeypatch.setattr("instructrl.key.file_sha256", lambda path: hashed.append(path) or file_sha256(path))
    planned = make_jobs(None, ["recipe=base.yaml", *own, "ppo.kl_coef=range(0.01,1,0.02)"], [], multirun=True)
    assert len(planned) == 50
    assert len({job.plan[-1].fingerprint for job in planned}) == 50
    assert sorted(path.name for path in hashed) == ["d.jsonl", "r.jsonl", "t.txt"]
    [alone] = make_jobs(None, planned[7].arguments, [], multirun=False)
    assert alone.plan == planned[7].plan
