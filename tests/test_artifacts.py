"""Artifacts: what makes two keys one artifact, what counts as complete, and who may write."""

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BASE, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from instructrl.artifacts import Artifact, Store, write_atomically
from instructrl.config import Recipe
from instructrl.errors import UserError
from instructrl.key import Hashes, canonical, digest, file_sha256, fingerprint, local_contents, stage_key
from instructrl.pipeline import stages
from instructrl.printout import recipe_as_yaml
from instructrl.recipe import load_recipe

KEY = {"stage": "sft", "config": {"seed": 0}}


def publish(store: Store, key: dict = KEY, text: str = "weights", **files: str) -> Artifact:
    partial = store.partial("sft", key)
    (partial / "model").mkdir(parents=True)
    (partial / "model" / "weights").write_text(text)
    for name, content in files.items():
        (partial / name.replace("_", ".")).write_text(content)
    return store.publish("sft", key, {"data": "d"}, {"seconds": 1.5}, {"loss": 2.0})


def keys(recipe: Recipe, hashes: Hashes | None = None) -> dict[str, dict[str, Any]]:
    contents = local_contents(recipe, ("data", "model", "eval"), hashes or Hashes(), lambda _: "")
    made: dict[str, dict[str, Any]] = {}
    for stage in stages(recipe).values():
        made[stage.name] = stage_key(stage, recipe, made, contents)
    return made


def fingerprints(recipe: Recipe) -> dict[str, str]:
    return {name: fingerprint(key) for name, key in keys(recipe).items()}


# Keys

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 9),
        "sft": st.fixed_dictionaries(
            {},
            optional={
                "learning_rate": st.floats(1e-7, 1, allow_subnormal=False),
                "epochs": st.integers(1, 9),
                "trainer": st.dictionaries(st.sampled_from("abc"), st.integers() | st.booleans() | st.text("xyz")),
            },
        ),
        "ppo": st.fixed_dictionaries({}, optional={"kl_coef": st.floats(0, 1), "whiten_rewards": st.booleans()}),
        "data": st.fixed_dictionaries({"world": st.fixed_dictionaries({}, optional={"people": st.integers(2, 60)})}),
    },
)


def shuffled(value: Any, draw: Any) -> Any:
    """The same mapping with its keys in another order."""
    if not isinstance(value, dict):
        return value
    return {name: shuffled(value[name], draw) for name in draw(st.permutations(list(value)))}


@settings(max_examples=60, deadline=None)
@given(values=SETTINGS, data=st.data())
def test_key_depends_on_neither_order_nor_defaults_written_out(values: dict, data: st.DataObject) -> None:
    values = yaml.safe_load(BASE) | values
    recipe = Recipe.model_validate(values)
    assert fingerprints(Recipe.model_validate(shuffled(values, data.draw))) == fingerprints(recipe)
    whole = recipe.model_dump(mode="json")
    assert fingerprints(Recipe.model_validate(shuffled(whole, data.draw))) == fingerprints(recipe)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=SETTINGS)
def test_key_is_the_same_through_files(here: Path, values: dict) -> None:
    values = yaml.safe_load(BASE) | values
    (here / "few.yaml").write_text(f"# a comment\n{yaml.safe_dump(values, default_flow_style=True)}")
    few = load_recipe(["recipe=few.yaml"])
    (here / "whole.yaml").write_text(recipe_as_yaml(few))
    assert fingerprints(few) == fingerprints(load_recipe(["recipe=whole.yaml"]))
    assert fingerprints(few) == fingerprints(Recipe.model_validate(values))


@settings(max_examples=60, deadline=None)
@given(rate=st.floats(1e-7, 1, allow_subnormal=False))
def test_a_change_reaches_exactly_what_lies_below_it(rate: float) -> None:
    before = Recipe.model_validate(yaml.safe_load(BASE))
    after = before.model_copy(update={"ppo": before.ppo.model_copy(update={"learning_rate": rate})})
    old, new = fingerprints(before), fingerprints(after)
    changed = {name for name in old if old[name] != new[name]}
    assert changed == (set() if rate == before.ppo.learning_rate else {"ppo", "eval"})


def test_canonical_json() -> None:
    assert canonical({"b": [1, None], "a": "\u00e9"}) == '{"a":"\\u00e9","b":[1,null]}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical(float("nan"))


def test_runtime_and_name_are_in_no_key(here: Path) -> None:
    plain = load_recipe(["recipe=base.yaml"])
    other = load_recipe(
        ["recipe=base.yaml", "name=x", "runtime.jobs=9", "runtime.micro_batch_size=3", "runtime.output_dir=/x"]
    )
    assert fingerprints(plain) == fingerprints(other)


def test_trl_is_in_the_keys_of_stages_that_use_it(here: Path) -> None:
    made = keys(load_recipe(["recipe=base.yaml"]))
    assert {name for name, key in made.items() if "packages" in key} == {"sft", "reward_model"}
    assert "trl" in keys(load_recipe(["recipe=base.yaml", "ppo.init=ppo_init"]))["ppo_init"]["packages"]


FILES = ["recipe=base.yaml", "data.world=null", "eval.judge=reward_model", "model.path=gpt2"]


def test_local_files_are_in_the_key_by_content(here: Path) -> None:
    def recipe(demonstrations: str) -> Recipe:
        return load_recipe(
            [
                *FILES,
                f"data.demonstrations=[{{path: {demonstrations}}}]",
                "data.text=[{path: text}]",
                "eval.labels=null",
            ]
        )

    (here / "a.jsonl").write_text("{}\n")
    (here / "text").mkdir()
    (here / "text" / "1.txt").write_text("one")
    first = fingerprints(recipe("a.jsonl"))
    (here / "moved").mkdir()
    (here / "a.jsonl").rename(here / "moved" / "b.jsonl")
    assert fingerprints(recipe("moved/b.jsonl")) == first
    (here / "text" / "1.txt").write_text("two")
    assert fingerprints(recipe("moved/b.jsonl"))["data"] != first["data"]
    (here / "text" / "1.txt").write_text("one")
    os.utime(here / "text" / "1.txt", (0, 0))  # a time is no content
    assert fingerprints(recipe("moved/b.jsonl")) == first
    (here / "moved" / "b.jsonl").write_text("{} \n")
    changed = fingerprints(recipe("moved/b.jsonl"))
    assert changed["data"] != first["data"]
    assert changed["sft"] != first["sft"]


def test_local_model_is_in_the_key_by_content(here: Path) -> None:
    def recipe(folder: str) -> Recipe:
        return load_recipe(
            [
                "recipe=base.yaml",
                "data.world=null",
                "eval.judge=reward_model",
                f"model.path={folder}",
                "data.text=[{path: t.txt}]",
            ]
        )

    (here / "t.txt").write_text("text")
    for folder in ("m", "n"):
        (here / folder).mkdir()
        (here / folder / "config.json").write_text("{}")
        (here / folder / "model.safetensors").write_text("weights")
    (here / "n" / "README.md").write_text("words")
    first = fingerprints(recipe("m"))
    assert fingerprints(recipe("./n")) == first
    (here / "n" / "model.safetensors").write_text("WEIGHTS")
    changed = fingerprints(recipe("n"))
    assert not set(first.values()) & set(changed.values())  # data too: it counts in the model's tokens


def test_labels_are_in_the_key_of_eval_by_content(here: Path) -> None:
    (here / "l.csv").write_text("a")
    (here / "t.txt").write_text("text")
    arguments = [*FILES, "data.text=[{path: t.txt}]", "eval.judge=labels", "eval.labels.path=l.csv"]
    first = fingerprints(load_recipe(arguments))
    (here / "l.csv").write_text("b")
    changed = fingerprints(load_recipe(arguments))
    assert {name for name in first if first[name] != changed[name]} == {"eval"}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("folder", "model.path: the folder folder has no config.json, so it holds no model."),
        ("./none", "model.path: there is no folder ./none."),
        ("a/b/c", "model.path: there is no folder a/b/c."),
        ("base.yaml", "model.path: base.yaml is a file; name the folder that holds config.json and the weights."),
    ],
)
def test_a_model_that_is_not_there(here: Path, path: str, message: str) -> None:
    (here / "folder").mkdir()
    recipe = load_recipe(["recipe=base.yaml", f"model.path={path}"])
    with pytest.raises(UserError) as caught:
        keys(recipe)
    assert str(caught.value) == message


def test_hashes_are_remembered_for_large_settled_files_only(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructrl.key.WORTH_REMEMBERING", 3)
    small, large, fresh = here / "small", here / "large", here / "fresh"
    for path in (small, large, fresh):
        path.write_text("xx" if path == small else "xxxx")
    for path in (small, large):
        os.utime(path, (1, 1))
    hashes = Hashes(here / "hashes.json")
    expected = {path: hashes.of(path) for path in (small, large, fresh)}
    hashes.save()
    assert list(json.loads((here / "hashes.json").read_text())) == [str(large)]
    monkeypatch.setattr("instructrl.key.file_sha256", lambda _: "hashed again")
    again = Hashes(here / "hashes.json")
    assert again.of(large) == expected[large]
    assert again.of(small) == again.of(fresh) == "hashed again"
    large.write_text("yyyy")
    assert again.of(large) == "hashed again"


# The store


def test_publication_is_complete_and_keeps_its_origin(here: Path) -> None:
    store = Store(here / "artifacts")
    assert store.find("sft", KEY) is None
    made = publish(store, order_json="{}", stage_log="text")
    found = store.find("sft", KEY)
    assert found == made
    assert found is not None
    assert found.path == here / "artifacts" / "sft" / fingerprint(KEY)
    weights = found.path / "model" / "weights"
    expected = {"size": 7, "sha256": file_sha256(weights), "mtime_ns": weights.stat().st_mtime_ns}
    assert found.outputs["model/weights"] == expected
    assert (found.inputs, found.made, found.metrics) == ({"data": "d"}, {"seconds": 1.5}, {"loss": 2.0})
    manifest = json.loads((found.path / "manifest.json").read_text())
    assert manifest.pop("sha256") == digest(manifest)
    assert not store.partial("sft", KEY).exists()


def test_digest_is_of_what_others_read(here: Path) -> None:
    digests = [
        publish(Store(here / str(number)), text=text, stage_log=log).digest
        for number, (text, log) in enumerate([("w", "1 s"), ("w", "2 s"), ("x", "1 s")])
    ]
    assert digests[0] == digests[1] != digests[2]


def test_publishing_again_replaces(here: Path) -> None:
    store = Store(here / "artifacts")
    first = publish(store)
    second = publish(store, text="other weights")
    found = store.find("sft", KEY)
    assert found is not None
    assert found.digest == second.digest != first.digest
    assert sorted(path.name for path in (here / "artifacts" / "sft").iterdir()) == [fingerprint(KEY)]


def test_a_folder_without_manifest_is_no_artifact(here: Path) -> None:
    store = Store(here / "artifacts")
    path = publish(store).path
    (path / "manifest.json").rename(path / "manifest.json.1.tmp")
    assert store.find("sft", KEY) is None


def flip(path: Path, position: int = 0) -> None:
    """One bit of one byte, and the time of change, as any program's write leaves it."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("deleted", "model/weights is gone"),
        ("truncated", "model/weights was changed"),
        ("flipped", "model/weights was changed"),
    ],
)
def test_an_artifact_that_lost_a_file_is_made_again_and_kept_aside(here: Path, lost: str, said: str) -> None:
    store = Store(here / "artifacts")
    weights = publish(store).path / "model" / "weights"
    if lost == "deleted":
        weights.unlink()
    elif lost == "truncated":
        weights.write_text("wei")
    else:
        flip(weights)
    assert store.look("sft", KEY) == (None, said)
    assert publish(store).made["mended"] == said
    assert store.look("sft", KEY)[1] == ""
    damaged = store.path("sft", KEY).with_suffix(".damaged")
    assert (damaged / "model" / "weights").exists() == (lost != "deleted")


def test_only_contents_count(here: Path) -> None:
    store = Store(here / "artifacts")
    path = publish(store, stage_log="text").path
    (path / "model" / "weights").touch()
    (path / "stage.log").write_text("changed")
    assert store.find("sft", KEY) is not None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"sha256": 1}'])
def test_damaged_manifest(here: Path, text: str) -> None:
    store = Store(here / "artifacts")
    path = publish(store).path
    (path / "manifest.json").write_text(text)
    assert store.look("sft", KEY) == (None, "its manifest.json was changed, or written by another version")


def test_every_bit_of_a_manifest_counts(here: Path) -> None:
    store = Store(here / "artifacts")
    manifest = publish(store).path / "manifest.json"
    good = manifest.read_bytes()
    for position in range(len(good)):
        flip(manifest, position)
        found, said = store.look("sft", KEY)
        whole = found is not None and json.loads(manifest.read_bytes()) == json.loads(good)  # white space
        assert whole or said == "its manifest.json was changed, or written by another version", position
        manifest.write_bytes(good)


def test_full_key_is_compared_on_a_hit(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(here / "artifacts")
    publish(store)
    monkeypatch.setattr("instructrl.artifacts.fingerprint", lambda _: fingerprint(KEY))  # a collision
    with pytest.raises(UserError, match="made from another recipe with the same fingerprint"):
        store.find("sft", KEY | {"version": 2})


def test_pointers(here: Path) -> None:
    store = Store(here / "artifacts")
    assert store.latest("mine") == {}
    store.remember("mine", {"sft": KEY})
    store.remember("mine", {"data": {"a": 1}})
    assert store.latest("mine") == {"sft": KEY, "data": {"a": 1}}
    store.remember("../../up", {"sft": KEY})
    assert store.latest("../../up") == {"sft": KEY}
    assert {path.parent for path in here.rglob("*up.json")} == {here / "artifacts" / "recipes"}


def test_only_one_holds_the_lock(here: Path) -> None:
    store = Store(here / "artifacts")
    order: list[str] = []

    def second() -> None:
        with store.lock("sft", KEY, waiting=lambda: order.append("waits")) as descriptor:
            assert descriptor is not None
            order.append("second")

    with store.lock("sft", KEY, waiting=lambda: order.append("never")) as descriptor:
        assert descriptor is not None
        thread = threading.Thread(target=second, daemon=True)
        thread.start()
        until(lambda: order)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["waits", "first", "second"]


def test_waiting_for_the_lock_can_be_stopped(here: Path) -> None:
    store = Store(here / "artifacts")
    with (
        store.lock("sft", KEY, waiting=lambda: None),
        store.lock("sft", KEY, waiting=lambda: None, stop=lambda: True) as descriptor,
    ):
        assert descriptor is None


def test_atomic_write_leaves_no_trace(here: Path) -> None:
    write_atomically(here / "x", "1")
    write_atomically(here / "x", "2")
    assert (here / "x").read_text() == "2"
    assert sorted(path.name for path in here.iterdir()) == ["base.yaml", "x"]
