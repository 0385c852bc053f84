"""The shipped recipes: complete, pinned, and runnable on the data that they name."""

import json
from pathlib import Path

import pytest

from instructrl.recipe import load_recipe
from instructrl.stages import data as stage
from instructrl.stages import sources
from instructrl.stages.tables import read_table

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
PIN = set("0123456789abcdef")


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_what_comes_from_the_hub_is_pinned_to_a_commit(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe([f"recipe={path.stem}"])
    assert recipe.name == path.stem
    pinned = {key: (source.path, source.revision) for _, key, source in sources.named_sources(recipe.data)}
    pinned["model"] = (recipe.model.path, recipe.model.revision)
    for key, (where, revision) in pinned.items():
        if where and not sources.is_local(where):
            assert revision is not None, key
            assert len(revision) == 40, key
            assert set(revision) <= PIN, key


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_says_what_it_needs(path):
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"instructrl run-all recipe={path.stem}" in header or path.stem == "tiny"
    assert any(word in header for word in ("CPU", "GPU"))


def test_gpt2_small_is_the_papers():
    """Ouyang et al. 2022, App. C, for 1.3B."""
    recipe = load_recipe(["recipe=gpt2-small"])
    assert (recipe.sft.learning_rate, recipe.sft.batch_size, recipe.sft.epochs) == (9.65e-6, 32, 16)
    assert recipe.sft.residual_dropout == 0.2
    assert (recipe.reward_model.learning_rate, recipe.reward_model.batch_size, recipe.reward_model.epochs) == (
        9e-6,
        64,
        1,
    )
    for ppo, gamma in ((recipe.ppo, 0), (recipe.ppo_ptx, 27.8)):
        assert (ppo.total_episodes, ppo.batch_size, ppo.batch_size // ppo.num_mini_batches) == (256_000, 512, 64)
        assert (ppo.kl_coef, ppo.cliprange, ppo.temperature, ppo.num_ppo_epochs) == (0.02, 0.2, 1, 1)
        assert (ppo.critic_learning_rate, ppo.warmup_iterations, ppo.ptx_coef) == (9e-6, 10, gamma)
    assert recipe.ppo_ptx.ptx_ratio == 8


def test_gpt2_small_runs_on_local_files(tmp_path):
    """Its data stage with the Hub's three data sets given as files with the columns that they have on the Hub."""
    dialogue = "\n\nHuman: Count to {n}.\n\nAssistant: {end}"
    rows = {
        "dolly": [{"instruction": f"Add {n}", "context": "1" * (n % 2), "response": str(n)} for n in range(40)],
        "hh": [{name: dialogue.format(n=n, end=name) for name in ("chosen", "rejected")} for n in range(40)],
        "wikitext": [{"text": " = Title = \n" if n % 2 else ""} | {"n": n} for n in range(3)] + [{"text": "More."}],
    }
    for name, listed in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in listed))
    recipe = load_recipe(["recipe=gpt2-small"])
    changed = recipe.model_dump()
    for kind, name in (("demonstrations", "dolly"), ("rankings", "hh"), ("text", "wikitext")):
        changed["data"][kind][0]["path"] = f"{tmp_path / name}.jsonl"
    recipe = type(recipe).model_validate(changed)
    sources.check(recipe)
    (tmp_path / "out").mkdir()
    metrics = stage.run("data", recipe, {}, tmp_path / "out")
    assert metrics["demonstrations_train"] + metrics["demonstrations_valid"] == 40
    assert sum(metrics[f"rankings_{part}"] for part in ("train", "valid", "judge")) == 40
    assert metrics["dropped"] == 2  # empty paragraphs


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_real_cpu_reads_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTRL_DATA", str(REAL))
    recipe = load_recipe(["recipe=real-cpu"])
    sources.check(recipe)
    metrics = stage.run("data", recipe, {}, tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    assert metrics["demonstrations_train"] + metrics["demonstrations_valid"] == 741 + 175
    assert all(reading["kept"] for reading in card["sources"].values())
    sizes = {len(row["responses"]) for row in read_table(tmp_path / "rankings.train.parquet")}
    assert {2, 4, 9} <= sizes
    assert metrics["prompts_eval"] >= 150
