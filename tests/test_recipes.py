"""The shipped recipes: complete, honest about what they need, and runnable, here on small copies of what they name."""

import importlib
import json
import math
import re
import socket
from pathlib import Path

import pytest
import toy_hub
import yaml

from instructrl.config import Recipe
from instructrl.estimate import estimate
from instructrl.hardware import GPUS
from instructrl.jobs import make_jobs
from instructrl.pipeline import ordered, stages
from instructrl.recipe import load_recipe
from instructrl.shapes import shape
from instructrl.stages import data as stage
from instructrl.stages import sources
from instructrl.stages.tables import read_table

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data"
PIN = set("0123456789abcdef")
SHIPPED = sorted(ROOT.glob("recipes/*.yaml"))
HUB = {"gpt2-small": "gpt2", "gpt2-xl": "gpt2-xl", "llama-1b": "llama-1b", "llama-8b-lora": "llama-8b"}
HUB |= {"tldr-pythia-1b": "pythia-1b"}
"""The recipes that name a model on the Hub, and its name in conf/model."""
SECTIONS = ("model", "data", "sft", "reward_model", "ppo_init", "ppo", "ppo_ptx", "eval")


def header(path):
    """The comment at the beginning of a file, as one line."""
    lines = path.read_text().splitlines()
    return " ".join(line.lstrip("# ") for line in lines[: next(n for n, line in enumerate(lines) if line[:1] != "#")])


def text_of(path):
    """A recipe, the files of conf that it chooses, and the recipe that it changes."""
    defaults = yaml.safe_load(path.read_text()).get("defaults", [])
    chosen = [f"{group}/{name}" for one in defaults if isinstance(one, dict) for group, name in one.items()]
    files = [path, *(ROOT / "conf" / f"{name}.yaml" for name in chosen)]
    files += [ROOT / "recipes" / f"{one}.yaml" for one in defaults if isinstance(one, str) and one != "_self_"]
    return "\n".join(
        text_of(file) if file.parent == ROOT / "recipes" and file != path else file.read_text() for file in files
    )


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_what_comes_from_the_hub_is_pinned_to_a_commit_or_says_that_it_is_not(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe([f"recipe={path.stem}"])
    assert recipe.name == path.stem
    named = [(source.path, source.revision) for _, _, source in sources.named_sources(recipe.data)]
    named.append((recipe.model.path, recipe.model.revision))
    for where, revision in named:
        if not where or sources.is_local(where):
            continue
        if revision is None:
            assert re.search(rf"path: {where}\b.*\n\s*revision: null # not pinned", text_of(path)), where
        else:
            assert len(revision) == 40, where
            assert set(revision) <= PIN, where


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_needs(path):
    assert re.search(rf"instructrl [a-z-]+ recipe={path.stem}\b", header(path)) or path.stem == "tiny"
    assert re.search(r"\b[CG]PU\b", header(path))
    if path.stem in HUB:
        for word in ("ESTIMATES, not measured", "memory", "time", "disk", "Licences: "):
            assert word in header(path), word
    assert "llama" not in path.stem or "GATED" in header(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_recipe_plans_without_a_network(path, instructrl, monkeypatch):
    def refuse(*_):
        raise AssertionError("a plan must not look at the network")

    if path.stem == "real-cpu" and not REAL.is_dir():
        pytest.skip("../shared/data is not there")
    monkeypatch.setenv("INSTRUCTRL_DATA", str(REAL))
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    planned = instructrl("plan", f"recipe={path.stem}")
    assert planned.code == 0, planned.err
    assert "eval" in planned.out


@pytest.mark.parametrize("name", HUB)
def test_the_papers_value_stands_beside_every_key_that_is_not_the_papers(name):
    """On the same line. What is not set has its default, which is the paper's or says that it is our choice."""
    path = ROOT / "recipes" / f"{name}.yaml"
    default = {section: Recipe.model_fields[section].default.model_dump() for section in SECTIONS}
    lines, values = path.read_text().splitlines(), yaml.safe_load(path.read_text())
    section, unexplained = "", []
    for line in lines:
        if re.match(r"\w+:", line):
            section = line.split(":")[0]
        key = re.match(r"  (\w+): \S", line)
        if not key or section not in SECTIONS:
            continue
        ours, papers = values[section][key[1]], default[section][key[1]]
        if isinstance(ours, str) and not isinstance(papers, str):
            ours = float(ours)  # YAML's own numbers have a dot: 1e-4 is one to OmegaConf only
        if ours != papers and "# paper: " not in line:
            unexplained.append(line)
    assert not unexplained


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", toy_hub.CONFIGS)
def test_a_models_size_is_as_its_file_says(name):
    said = re.search(r"([\d,]+) parameters", header(ROOT / "conf" / "model" / f"{name}.yaml"))[1]
    assert parameters(toy_hub.meta_model(name)) == int(said.replace(",", ""))


def weights_in_ppo_ptx(name):
    """GB of all that does not depend on tokens, as docs/recipes.md adds it up."""
    from peft import LoraConfig, get_peft_model

    recipe, model = load_recipe([f"recipe={name}"]), toy_hub.meta_model(HUB[name])
    policy = parameters(model)
    scalar = policy if model.config.tie_word_embeddings else policy - model.get_output_embeddings().weight.numel()
    average = 4 if recipe.ppo_ptx.ema_decay else 0
    if recipe.model.lora:
        lora = recipe.model.lora
        adapted = get_peft_model(model, LoraConfig(r=lora.r, target_modules="all-linear"))
        adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        return (2 * policy + adapter * (2 * 16 + 2 * 4 + average + 4)) / 1e9
    return (policy * (16 + 4 + average + 4 + 2) + scalar * (16 + 4)) / 1e9


@pytest.mark.parametrize("name", HUB)
def test_the_memory_of_weights_is_as_the_header_and_the_docs_say(name):
    expected = weights_in_ppo_ptx(name)
    said = re.search(r"(\d+) GB of weights, gradients and moments", header(ROOT / "recipes" / f"{name}.yaml"))[1]
    assert int(said) == pytest.approx(expected, abs=0.6)
    row = re.search(rf"^\| `{name}` \|.*\| (\d+\.\d) GB \|", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE)
    assert float(row[1]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("name", HUB)
def test_the_memory_that_the_header_says_is_the_estimates(name):
    """On a GPU of the kind that it names."""
    recipe = load_recipe([f"recipe={name}"])
    found = estimate(recipe, shape(recipe), GPUS["h200" if name == "gpt2-xl" else "h100"])
    said = re.search(r"memory +(\d+) GB", header(ROOT / "recipes" / f"{name}.yaml"))[1]
    assert int(said) == pytest.approx(found.peak.total / 1e9, abs=0.6)
    assert found.fits


# ---- runs


SMALL = {
    "data": {"max_prompt_tokens": 120, "max_response_tokens": 60, "valid_share": 0.2, "valid_ranking_share": 0.2}
    | {"judge_ranking_share": 0.3},
    "sft": {"epochs": 1, "batch_size": 8},
    "ppo_init": {"epochs": 1, "batch_size": 8, "ptx_max_length": 32},
    "reward_model": {"batch_size": 8},
    "ppo": {"total_episodes": 16, "batch_size": 8, "response_length": 6},
    "ppo_ptx": {"total_episodes": 16, "batch_size": 8, "response_length": 6, "ptx_ratio": 1, "ptx_max_length": 32},
    "eval": {"num_prompts": 6, "response_length": 6, "bootstrap_samples": 20},
    "runtime": {"device": "cpu", "jobs": 1, "threads": 1, "micro_batch_size": 4},
}
"""The sizes that a toy run needs; everything else stays the recipe's."""


def toy(name, folder):
    """The recipe at toy size, with what it names on the Hub in the folder."""
    values = load_recipe([f"recipe={name}"]).model_dump()
    for section, changes in SMALL.items():
        values[section] |= changes
    toy_hub.write_model(HUB[name], folder / "model")
    values["model"] |= {"path": str(folder / "model"), "revision": None}
    for kind in sources.KINDS:
        for source in values["data"][kind]:
            source["path"] = str(toy_hub.write_data(source["path"], folder))
    return Recipe.model_validate(values)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "llama-8b-lora" else pytest.mark.slow) for name in HUB],
)
def test_it_runs_to_the_end_at_toy_size(name, tmp_path):
    """Every stage, on a random model of the recipe's architecture and on files with the columns of its data sets."""
    recipe = toy(name, tmp_path)
    assert recipe.runtime.bf16
    sources.check(recipe)
    made, metrics = {}, {}
    for one in ordered(stages(recipe), ["eval"]):
        module = importlib.import_module(f"instructrl.stages.{one.module or one.name}")
        if hasattr(module, "check"):
            module.check(recipe)
        folder = made[one.name] = tmp_path / one.name
        folder.mkdir()
        metrics[one.name] = module.run(one.name, recipe, {need: made[need] for need in one.needs}, folder)
    json.dumps(metrics, allow_nan=False)
    assert metrics["data"]["dropped"] <= 30  # empty paragraphs
    assert metrics["sft"]["dropped"] == {}
    assert metrics["reward_model"]["rankings"] > 10
    assert metrics["ppo"]["iterations"] == metrics["ppo_ptx"]["iterations"] == 2
    assert metrics["ppo"]["optimizer_steps"] == 2 * recipe.ppo.num_ppo_epochs * recipe.ppo.num_mini_batches
    assert "PPO-ptx" in (tmp_path / "eval" / "report.md").read_text()


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


@pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data is not there")
def test_real_cpu_reads_its_files(tmp_path, monkeypatch):
    monkeypatch.setenv("INSTRUCTRL_DATA", str(REAL))
    recipe = load_recipe(["recipe=real-cpu"])
    sources.check(recipe)
    metrics = stage.run("data", recipe, {}, tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    for reading in card["sources"].values():
        assert reading["kept"] > 20
        assert reading["read"] == reading["kept"] + sum(reading["dropped"].values())
    read = sum(card["sources"][f"data.demonstrations[{n}]"]["kept"] for n in range(2))
    assert 0.95 * read <= metrics["demonstrations_train"] + metrics["demonstrations_valid"] <= read
    sizes = {len(row["responses"]) for row in read_table(tmp_path / "rankings.train.parquet")}
    assert {2, 4, 9} <= sizes
    assert metrics["prompts_eval"] >= 150


ABLATIONS = sorted((ROOT / "recipes" / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_an_ablation_is_tiny_with_the_sweep_that_its_header_and_the_docs_tell(path):
    command = re.search(r"instructrl (\S+) -m (.*?) --jobs 2", header(path))
    assert command
    assert f"$ {command[0]}" in (ROOT / "docs" / "ablations.md").read_text()
    target, arguments = command[1].replace("-", "_"), command[2].split()
    assert arguments[0] == f"recipe=ablations/{path.stem}"
    planned = make_jobs(None if target == "run_all" else target, arguments, [], multirun=True)
    assert len(planned) == math.prod(argument.count(",") + 1 for argument in arguments)
    assert {job.composition.recipe.seed for job in planned} >= {0, 1}
    tiny, mine = load_recipe(["recipe=tiny"]), load_recipe(arguments[:1])
    assert mine.name == path.stem
    for section in ("model", "data", "pretrain", "sft", "label", "reward_model"):
        assert getattr(mine, section) == getattr(tiny, section)  # so that what tiny made is used
