"""Recipes: what is composed from files and overrides, and the sentence for every mistake in them."""

import math
import os
import sys
from pathlib import Path

import pytest
import yaml
from conftest import BASE

from instructrl import points, recipe, recipe_files
from instructrl.config import Recipe, World
from instructrl.errors import UserError
from instructrl.keys import every_key, exists, suggestion
from instructrl.launch import command
from instructrl.pipeline import stages
from instructrl.points import combinations, compose_points
from instructrl.printout import recipe_as_yaml
from instructrl.recipe import Draft, compose_recipe, draft, load_recipe
from instructrl.recipe_files import recipe_names


@pytest.fixture
def shelf(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of shipped recipes and groups: recipe `base`, groups `model=small` and `model=large`."""
    shelf = here / "shelf"
    for path, text in {
        "recipes/base.yaml": f"defaults:\n  - model: small\n  - _self_\n{BASE.replace('model: {path: null}', '')}",
        "conf/model/small.yaml": "path: null\ntemplate: 'small {prompt}'\n",
        "conf/model/large.yaml": "path: null\ntemplate: 'large {prompt}'\n",
        "conf/runtime/laptop.yaml": "threads: 1\n",
    }.items():
        (shelf / path).parent.mkdir(parents=True, exist_ok=True)
        (shelf / path).write_text(text)
    for module in (recipe, recipe_files):
        monkeypatch.setattr(module, "shipped", lambda folder: shelf / folder)
    return shelf


def problem(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(list(arguments))
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_shipped_default_recipe_is_tiny() -> None:
    assert "tiny" in recipe_names()
    assert load_recipe([]).name == "tiny"


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_compose(name: str) -> None:
    assert load_recipe([f"recipe={name}"]).name == name.rpartition("/")[2]


@pytest.mark.parametrize("name", sorted(path.stem for path in recipe_files.shipped("conf").glob("runtime/*.yaml")))
def test_shipped_runtimes_compose(name: str) -> None:
    chosen = load_recipe([f"runtime={name}"])
    assert chosen.runtime != load_recipe([]).runtime
    assert chosen.sft == load_recipe([]).sft


@pytest.mark.parametrize(
    ("machine", "starts"),
    [
        ("laptop", "python -m instructrl.torchrun --nproc-per-node=2 --standalone --local-addr=127.0.0.1 -m"),
        ("one-gpu", "python -m instructrl.worker"),
        ("eight-gpus", "python -m instructrl.torchrun --nproc-per-node=8 --standalone"),
        ("two-nodes", "mpirun -np 2 -npernode 1 python -m instructrl.torchrun --nproc-per-node=8 --nnodes=2"),
    ],
)
def test_each_machine_starts_its_processes(monkeypatch: pytest.MonkeyPatch, machine: str, starts: str) -> None:
    monkeypatch.setattr(sys, "executable", "python")
    chosen = load_recipe([f"runtime={machine}"])
    words = command(stages(chosen)["sft"], chosen, Path("artifacts/sft/0123.partial"))
    assert " ".join(words).startswith(starts)
    assert command(stages(chosen)["data"], chosen, Path("x")) == ["python", "-m", "instructrl.worker", "x"]


def test_overrides(here: Path) -> None:
    recipe = load_recipe(["recipe=base.yaml", "sft.learning_rate=3e-5", "sft.trainer.max_grad_norm=2", "name=mine"])
    assert recipe.sft.learning_rate == 3e-5
    assert recipe.sft.trainer == {"max_grad_norm": 2}
    assert recipe.name == "mine"
    assert recipe.data.world == World()
    own = [
        "recipe=base.yaml",
        "data.world=null",
        "data.demonstrations=[{path: a.jsonl, columns: {prompt: instruction}}]",
        "data.text=[{path: ../t.txt.gz}]",
        "eval.judge=reward_model",
    ]
    recipe = load_recipe(own)
    assert recipe.data.world is None
    assert recipe.data.demonstrations[0].path == "a.jsonl"
    assert recipe.data.demonstrations[0].columns == {"prompt": "instruction"}
    assert load_recipe([*own, "data.demonstrations.0.path=b.jsonl"]).data.demonstrations[0].path == "b.jsonl"
    labels = load_recipe([*own, "eval.judge=labels", "eval.labels.path=l.csv"]).eval.labels
    assert labels is not None
    assert labels.path == "l.csv"


def test_world_keys_of_a_recipe_without_world(here: Path) -> None:
    (here / "plain.yaml").write_text("seed: 1\n")
    recipe = load_recipe(["recipe=plain.yaml", "data.world.people=10", "model.path=null", "eval.judge=gold"])
    assert recipe.data.world == World(people=10)


def test_a_file_extends_shipped_recipes_and_groups(shelf: Path, here: Path) -> None:
    (here / "my recipes").mkdir()
    (here / "my recipes" / "mine.yaml").write_text(
        "defaults:\n  - base\n  - override model: large\n  - _self_\nseed: 7\n"
    )
    path = "recipe=my recipes/mine.yaml"
    recipe = load_recipe([path])
    assert (recipe.name, recipe.seed, recipe.model.template) == ("mine", 7, "large {prompt}")
    assert load_recipe([path, "model=small"]).model.template == "small {prompt}"
    assert load_recipe(["recipe=base", "model=large"]).model.template == "large {prompt}"
    assert load_recipe(["recipe=base", "runtime=laptop"]).runtime.threads == 1  # a group no defaults list names


def test_relative_paths_are_looked_for_here_then_beside_the_recipe(here: Path) -> None:
    folder = here / "elsewhere"
    (folder / "model").mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "model: {path: model}\ndata: {demonstrations: [{path: a.jsonl}, {path: b.jsonl}, {path: c.jsonl}], "
        "text: [{path: a.jsonl}]}\n"
    )
    for path in (folder / "a.jsonl", folder / "b.jsonl", here / "b.jsonl"):
        path.touch()
    recipe = load_recipe(["recipe=elsewhere/mine.yaml"])
    assert [source.path for source in recipe.data.demonstrations] == [str(folder / "a.jsonl"), "b.jsonl", "c.jsonl"]
    assert recipe.model.path == str(folder / "model")
    given = load_recipe(["recipe=elsewhere/mine.yaml", "data.demonstrations=[{path: a.jsonl}]", "model.path=~/m"])
    assert given.data.demonstrations[0].path == "a.jsonl"  # typed here, so meant here
    assert given.model.path == os.path.expanduser("~/m")  # noqa: PTH111 - what a shell does with it


def test_printed_recipe_is_the_same_recipe(here: Path) -> None:
    recipe = load_recipe(["recipe=base.yaml", "sft.learning_rate=3e-5", "sft.trainer={max_grad_norm: 2, a: [1, x]}"])
    (here / "again.yaml").write_text(recipe_as_yaml(recipe))
    assert load_recipe(["recipe=again.yaml"]) == recipe


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sft.learning_rat=3e-5", "There is no key 'sft.learning_rat'. Did you mean sft.learning_rate?"),
        (
            "learning_rate=3e-5",
            "There is no key 'learning_rate'. Did you mean pretrain.learning_rate or sft.learning_rate or "
            "reward_model.learning_rate or ...?",
        ),
        ("stf.epochs=2", "There is no key 'stf.epochs'. Did you mean sft.epochs?"),
        ("ppo.kl=2", "There is no key 'ppo.kl'. Did you mean ppo.kl_coef or ppo.kl_estimator or ppo.kl_target or ...?"),
        ("sft._target_=os.system", "There is no key 'sft._target_'. sft has learning_rate, "),
        ("reward-model.epochs=1", "There is no key 'reward-model.epochs'. Did you mean reward_model.epochs?"),
        ("hydra.run.dir=x", "There is no key 'hydra.run.dir'."),
        ("recipe=bas", "There is no recipe 'bas'. There is no file"),
        ("recipe=tinyy", "There is no recipe 'tinyy'. Did you mean tiny? Shipped: "),
        ("recipe=tiny recipe=tiny", "recipe= is given 2 times: tiny, tiny."),
        ("model.dtype=fp8", "model.dtype='fp8': input should be 'float32' or 'bfloat16'."),
        ("sft.learning_rate=nan", "sft.learning_rate=nan: must be a finite number."),
        ("sft.trainer.x=inf", "sft.trainer.x=inf: must be a finite number."),
        ("sft=3", "sft=3: sft is a section; it has learning_rate, "),
        ("eval=foo", "eval='foo': eval is a section; it has judge, "),
        ("sft.learning_rate=1e-5,3e-5", "a comma makes a sweep; add --multirun, or quote the value."),
        ("+sft.epochs=2", "+sft.epochs=2: every key already has a value; write sft.epochs=..."),
        ("~sft.epochs", "~sft.epochs: every key already has a value; write sft.epochs=..."),
        ("sft.epochs", "'sft.epochs': an override is written key=value."),
        ("tiny", "'tiny': an override is written key=value; a recipe is chosen with recipe=tiny."),
        ("seed={x", "seed={x: the value cannot be read; put it in quotes: \"seed='{x'\"."),
        ("model.template={x", "model.template must contain {prompt} exactly once, or be chat."),
        ("model.template=x", "model.template must contain {prompt} exactly once, or be chat."),
        ("ppo.batch_size=10", "ppo: batch_size=10 is not a multiple of num_mini_batches=8."),
        ("name=${foo}", "name: Interpolation key 'foo' not found."),
        ("seed=???", "seed"),
        ("data.demonstrations=[{pth: a}]", "There is no key 'data.demonstrations.0.pth'. Did you mean "),
        ("data.demonstrations=[{pth: a}]", "data.demonstrations[0].path is missing."),
        ("data.world.people=1", "data.world.people=1: input should be greater than or equal to 2."),
    ],
)
def test_mistakes_on_the_command_line(here: Path, arguments: str, message: str) -> None:
    first = [] if arguments.startswith("recipe=") else ["recipe=base.yaml"]
    words = [arguments] if "[" in arguments else arguments.split()
    if message.startswith("There is no recipe 'bas'"):
        (here / "bas.yaml").write_text(BASE)
        message = "There is no recipe 'bas'. There is a file bas.yaml: recipe=bas.yaml."
    assert message in problem(*first, *words)


def test_all_mistakes_at_once(here: Path) -> None:
    (here / "bad.yaml").write_text("sft:\n  epochs: many\n  lr: 1\n")
    told = problem("recipe=bad.yaml", "sft.learning_rate=fast", "sft.batch=0", "seed=-1", "=3").splitlines()
    assert len(told) == 6
    assert "bad.yaml:2: sft.epochs='many'" in "".join(told)
    assert "bad.yaml:3: there is no key 'sft.lr'" in "".join(told)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0\nsft:\n  learning_rat: 1\n", "my.yaml:3: there is no key 'sft.learning_rat'. Did you mean sft.learn"),
        ("seed: 0\n\nsft: {epochs: x}\n", "my.yaml:3: sft.epochs='x': input should be a valid number"),
        ("seed: 0\nsft: {epochs: 1, epochs: 2}\n", "my.yaml:2: sft.epochs is set twice, first on line 2."),
        ("seed: 0\nsft: 3\n", "my.yaml:2: sft=3: sft is a section"),
        ("ppo:\n  batch_size: 10\n", "my.yaml:2: ppo: batch_size=10 is not a multiple of num_mini_batches=8."),
        ("seed: 0\neval:\n  judge: gold\n", "my.yaml:3: eval.judge=gold needs data.world"),
        ("data:\n  text:\n    - path: a\n    - name: b\n", "my.yaml:4: data.text[1].path is missing."),
        (
            "seed: 0\n\tsft: 1\n",
            "my.yaml:2: this is not valid YAML: a line begins with a tab; YAML indents with spaces.",
        ),
        ("seed: [0\nsft: 1\n", "my.yaml:2: this is not valid YAML: "),
        ("seed: *x\n", "my.yaml:1: this is not valid YAML: found undefined alias"),
        ("seed: !!python/object:os.system x\n", "my.yaml:1: this is not valid YAML: "),
        ("seed: \x00\n", "my.yaml:1: this is not valid YAML: special characters are not allowed."),
        ("", "my.yaml is empty: it needs at least one key, such as 'seed: 0'."),
        ("# nothing\n", "my.yaml is empty: it needs at least one key, such as 'seed: 0'."),
        ("- a\n- b\n", "my.yaml:1: a recipe is 'key: value' lines, this is a list."),
        ("hello\n", "my.yaml:1: a recipe is 'key: value' lines, this is text."),
        ("defaults: [my, _self_]\nseed: 1\n", "my.yaml:1: my.yaml extends itself"),
        ("defaults:\n  - other\n", "my.yaml:2: there is no recipe 'other' to extend. There is base."),
        ("defaults:\n  - bas\n", "my.yaml:2: there is no recipe 'bas' to extend. Did you mean base? There is base."),
        (
            "defaults:\n  - model: smal\n",
            "my.yaml:2: there is no option 'smal' for model. Did you mean small? There is",
        ),
        ("defaults: base\n", "my.yaml:1: defaults must be a list"),
        ("defaults:\n  - [base]\n", "my.yaml:2: an entry of defaults is a name or 'group: option'."),
        ("seed: ${x.y}\n", "my.yaml:1: seed: Interpolation key 'x.y' not found."),
        ("seed: 1\nname: ${seed\n", "my.yaml"),
        ("seed: 1\nname: ???\n", "my.yaml:2: name: "),
        ("seed: 1\nsft:\n  trainer: {x: .nan}\n", "my.yaml:3: sft.trainer.x=nan: must be a finite number."),
        ("hydra: {x: 1}\n", "my.yaml:1: there is no key 'hydra'."),
        ("a: &a {b: *a}\n", "my.yaml"),
        ("1: 2\n", "my.yaml:1: there is no key '1'."),
        ("? [a, b]\n: 1\n", "my.yaml"),
    ],
)
def test_mistakes_in_a_file(shelf: Path, here: Path, text: str, message: str) -> None:
    (here / "my.yaml").write_text(text)
    told = problem("recipe=my.yaml")
    assert message in told
    assert "Traceback" not in told


def test_mistakes_in_files_that_a_recipe_is_built_on(shelf: Path, here: Path) -> None:
    (here / "base.yaml").unlink()
    (here / "my.yaml").write_text("defaults: [base, _self_]\nseed: 1\n")
    (shelf / "conf/model/small.yaml").write_text("path: null\n\ntemplat: x\n")
    assert problem("recipe=my.yaml") == (
        "shelf/conf/model/small.yaml:3: there is no key 'model.templat'. Did you mean model.template?"
    )
    (shelf / "recipes/base.yaml").write_text("seed: [\n")
    assert "shelf/recipes/base.yaml:2: this is not valid YAML" in problem("recipe=my.yaml")
    assert "There is no option 'x' for model." in problem("recipe=base", "model=x").replace("there", "There")


def test_two_recipes_that_extend_each_other(here: Path) -> None:
    (here / "a.yaml").write_text("defaults: [b, _self_]\n")
    (here / "b.yaml").write_text("defaults: [a, _self_]\n")
    assert "a.yaml extends itself through b.yaml." in problem("recipe=a.yaml")


def test_a_recipe_with_the_name_of_the_shipped_one_it_extends(shelf: Path, here: Path) -> None:
    (here / "base.yaml").write_text("defaults: [base, _self_]\nseed: 1\n")
    assert "base.yaml:1: base.yaml extends itself: it hides a shipped recipe 'base'" in problem("recipe=base.yaml")


def test_files_that_cannot_be_a_recipe(here: Path) -> None:
    assert problem("recipe=quite-another.yaml") == "There is no file quite-another.yaml."
    assert problem("recipe=bse.yaml") == "There is no file bse.yaml. Did you mean base.yaml?"
    assert problem(f"recipe={here}") == f"recipe={here} is a folder; name a .yaml file in it."
    (here / "x.yml").write_text(BASE)
    assert problem("recipe=x.yml") == "recipe=x.yml: the name of a recipe file ends in .yaml."
    (here / "latin.yaml").write_bytes("name: caf\xe9\n".encode("latin-1"))
    assert problem("recipe=latin.yaml") == "latin.yaml is not UTF-8 text."


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(here: Path) -> None:
    (here / "base.yaml").chmod(0)
    assert problem("recipe=base.yaml") == "base.yaml cannot be read: permission denied."


def test_where_a_value_was_set(here: Path) -> None:
    (here / "my.yaml").write_text("model:\n  path: null\ndata: {world: {}}\neval:\n  judge: gold\n")
    composition = compose_recipe(["recipe=my.yaml", "model.path=x"])
    assert composition.where(("eval", "judge")) == "my.yaml:5: "
    assert composition.where(("model", "path")) == ""  # set on the command line
    assert composition.where(("sft", "epochs")) == ""  # a default


def test_sweep() -> None:
    def spelt(*arguments: str) -> list[list[str]]:
        return [[choice.argument for choice in point] for point in combinations([*arguments])]

    assert spelt("recipe=tiny", "ppo.kl_coef=0.01,0.02", "seed=range(0,2)") == [
        ["recipe=tiny", f"ppo.kl_coef={kl_coef}", f"seed={seed}"] for kl_coef in ("0.01", "0.02") for seed in (0, 1)
    ]
    assert spelt("recipe=a,b") == [["recipe=a"], ["recipe=b"]]
    assert spelt("data.demonstrations=[{path: a},{path: b}]") == [["data.demonstrations=[{path: a},{path: b}]"]]


@pytest.mark.parametrize(
    ("arguments", "by_hydra"),  # how many recipes Hydra composes, the one that is copied from among them
    [
        (["seed=1,2,3"], 1),
        (["seed=1,2", "ppo.kl_coef=0.1,2e-2", "sft.epochs=3"], 1),
        (["seed=shuffle(range(1,9))", "ppo.kl_coef=range(0.1,0.5,0.1)"], 1),
        (["model.template='a {prompt}','b \\'{prompt}\\''"], 1),
        (["ppo.whiten_rewards=true,false"], 1),
        (["recipe=base.yaml,other.yaml", "seed=1,2"], 2),
        (["recipe=base.yaml,other.yaml"], 2),
        (["recipe=refers.yaml", "seed=1,2"], 2),  # sft.batch_size: ${seed}
        (["seed=1,2", "sft.epochs=${seed}"], 2),
        (["data.world={people: 7},{people: 9}"], 3),  # a section
        (["eval.prompted_templates=[],['{prompt} A']"], 3),  # a list
        (["seed=1,2", "seed=3"], 2),  # the last one counts
        (["data.world={people: 9}", "data.world.people=5,6"], 2),
        (["model=tiny,base"], 2),  # a config group
    ],
)
def test_points_of_a_sweep_are_as_hydra_composes_them(
    here: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], by_hydra: int
) -> None:
    (here / "other.yaml").write_text(f"{BASE}sft: {{epochs: 3}}\n")
    (here / "refers.yaml").write_text(f"{BASE}sft: {{batch_size: '${{seed}}'}}\n")
    for name in ("tiny", "base"):
        (here / "model").mkdir(exist_ok=True)
        (here / "model" / f"{name}.yaml").write_text(f"path: null\ntemplate: '{name} {{prompt}}'\n")
    composed: list[list[str]] = []

    def counted(arguments: list[str]) -> Draft:
        composed.append(arguments)
        return draft(arguments)

    monkeypatch.setattr(recipe, "draft", counted)
    monkeypatch.setattr(points, "draft", counted)
    arguments = arguments if arguments[0].startswith("recipe=") else ["recipe=base.yaml", *arguments]
    found = list(compose_points(arguments))
    assert len(composed) == by_hydra
    for spelt, composition in found:
        by_itself = compose_recipe(spelt)
        assert composition.recipe == by_itself.recipe
        assert composition.given == by_itself.given
        for location in (("seed",), ("sft", "epochs"), ("model", "template"), ("eval", "judge")):
            assert composition.where(location) == by_itself.where(location)
    assert len({str(composition.recipe) for _, composition in found}) == (1 if "seed=3" in arguments else len(found))


def test_a_wrong_value_of_a_sweep_is_named(here: Path) -> None:
    for wrong, said in (("x", "seed='x': input should be a valid integer"), ("nan", "seed=nan: must be a finite")):
        with pytest.raises(UserError, match=said):
            list(compose_points(["recipe=base.yaml", f"seed=1,{wrong},2"]))


def test_every_key_exists_and_is_its_own_suggestion() -> None:
    keys = every_key()
    assert {"seed", "data.world.people", "eval.labels.path", "runtime.threads"} <= set(keys)
    for key in keys:
        assert exists(key)
        assert suggestion(key) == f" Did you mean {key}?"
        assert not exists(f"{key}x")


def test_numbers_are_read_as_numbers(here: Path) -> None:
    (here / "n.yaml").write_text(f"{BASE}sft: {{learning_rate: 3e-5, epochs: 2}}\n")
    sft = load_recipe(["recipe=n.yaml"]).sft
    assert math.isclose(sft.learning_rate, 3e-5)
    assert isinstance(sft.epochs, float)


def test_schema_needs_no_file(here: Path) -> None:
    assert Recipe.model_validate(yaml.safe_load(BASE)) == load_recipe(["recipe=base.yaml", "name=unnamed"])


def test_a_part_of_ppo_ptx_leaves_gamma_at_the_papers(here: Path) -> None:
    assert load_recipe(["recipe=base.yaml"]).ppo_ptx.ptx_coef == 27.8
    assert load_recipe(["recipe=base.yaml", "ppo_ptx.kl_coef=0.1"]).ppo_ptx.ptx_coef == 27.8
    assert load_recipe(["recipe=base.yaml", "ppo.kl_coef=0.1"]).ppo.ptx_coef == 0
