"""One thing has one fingerprint, and two things have two: over generated recipes, however they are written down.

What a stage's result depends on is said here a second time and plainly, in `DEPENDS`: the keys by which a change of the
recipe must reach it. `make test` generates a hundred recipes, `make test-slow` two thousand.
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import instructrl.key
from instructrl.config import Recipe
from instructrl.key import Hashes, fingerprint, local_contents, stage_key
from instructrl.keys import bare, every_key, kind_of
from instructrl.pipeline import stages
from instructrl.recipe import load_recipe

MINE = {
    "model": {"path": None},
    "data": {
        "demonstrations": [{"path": "d.jsonl"}],
        "rankings": [{"path": "ranked"}],
        "prompts": [{"path": "p.jsonl.gz"}],
        "text": [{"path": "t.txt"}],
        "evaluation_sets": [{"path": "exam.jsonl"}],
        "pii_filter": False,
    },
}
"""A recipe on files of one's own, with every stage but `label`."""

DEPENDS = {
    "data": ({"data", "seed"}, set()),
    "pretrain": ({"model", "pretrain", "seed"}, {"data"}),
    "sft": ({"model", "sft", "seed"}, {"data", "pretrain"}),
    "reward_model": ({"reward_model", "seed"}, {"data", "sft"}),
    "judge": ({"reward_model", "seed"}, {"data", "sft"}),
    "ppo_init": ({"model", "ppo_init", "seed"}, {"data", "pretrain"}),
    "ppo": ({"ppo", "seed"}, {"data", "ppo_init", "reward_model"}),
    "ppo_ptx": ({"ppo_ptx", "seed"}, {"data", "ppo_init", "reward_model"}),
    "eval": ({"model", "eval", "seed"}, {"data", "pretrain", "sft", "reward_model", "judge", "ppo", "ppo_ptx"}),
}
"""Stage -> (the sections it reads, the stages it loads)."""

SHAPE = {"model.path", "data.world", "eval.judge", "ppo.init", "ppo_ptx.init"} | set(every_key()) & {
    f"data.{kind}" for kind in MINE["data"] if kind != "pii_filter"
}
"""Keys that change which stages there are, or that name files; they have tests of their own."""


@pytest.fixture
def files(here: Path) -> Path:
    """The files of MINE in the current directory."""
    (here / "d.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    (here / "ranked" / "more").mkdir(parents=True)
    (here / "ranked" / "1.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (here / "ranked" / "more" / "2.jsonl").write_text('{"prompt": "d", "chosen": "e", "rejected": "f"}\n')
    (here / "p.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n', mtime=0))
    (here / "t.txt").write_text("Some text.\n\nMore text.\n")
    (here / "exam.jsonl").write_text('{"question": "who?"}\n')
    return here


def fingerprints(recipe: Recipe) -> dict[str, str]:
    contents = local_contents(recipe, ("data", "model", "eval"), Hashes(), lambda _: "")
    made: dict[str, dict[str, Any]] = {}
    for stage in stages(recipe).values():
        made[stage.name] = stage_key(stage, recipe, made, contents)
    return {name: fingerprint(key) for name, key in made.items()}


def reached(changed: set[str]) -> set[str]:
    """The stages that a change of these keys must run again."""
    sections = {key.partition(".")[0] for key in changed}
    hit: set[str] = set()
    for stage, (reads, needs) in DEPENDS.items():  # upstream first
        if reads & sections or needs & hit:
            hit.add(stage)
    return hit


# ---- recipes


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys into the sections of MINE."""
    recipe = json.loads(json.dumps(MINE))
    for key, value in values.items():
        *parents, last = key.split(".")
        section = recipe
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return recipe


def default(key: str) -> Any:
    value: Any = Recipe.model_validate(MINE).model_dump(mode="json")
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def candidates(key: str) -> list[Any]:
    """Values that the key may have, other than its default, found by asking the schema."""
    kind, now = bare(kind_of(key.split("."))), default(key)
    options = [o for part in (kind, *get_args(kind)) for o in get_args(part) if isinstance(o, str | int)]
    wished = [*options, True, False, 0, 1, 2, 3, 64, 0.1, 0.5, 1.5, 7e-5, 1e-6, "x", "{prompt} ->", ["x"], None]
    if isinstance(now, int | float) and not isinstance(now, bool):
        wished = [now * 2, now + 1, now / 2, *wished]
    if get_origin(kind) is dict:
        wished = [{"weight_decay": 0.1}, {"x": 0.1}]
    found: list[Any] = []
    for value in wished:
        if value == now and type(value) is type(now):
            continue
        try:
            recipe = Recipe.model_validate(nested({key: value}))
        except ValidationError:
            continue
        if recipe not in [Recipe.model_validate(nested({key: other})) for other in found]:
            found.append(value)
        if len(found) == 3:
            break
    return [v for v in found if Recipe.model_validate(nested({key: v})) != Recipe.model_validate(MINE)]


KEYS = {key: values for key in every_key() if key not in SHAPE and (values := candidates(key))}


@st.composite
def settings_of_recipes(draw: st.DrawFn, least: int = 0) -> dict[str, Any]:
    """Some keys with values that are valid together."""
    names = draw(st.lists(st.sampled_from(sorted(KEYS)), min_size=least, max_size=8, unique=True))
    values = {name: draw(st.sampled_from(KEYS[name])) for name in names}
    while True:
        try:
            Recipe.model_validate(nested(values))
        except ValidationError:
            values.pop(next(reversed(values)))
        else:
            return values


def test_nearly_every_key_is_generated() -> None:
    sections = {key.partition(".")[0] for key in KEYS}
    assert sections >= {
        "model",
        "data",
        "pretrain",
        "sft",
        "reward_model",
        "ppo_init",
        "ppo",
        "ppo_ptx",
        "eval",
        "runtime",
    }
    assert len(KEYS) > 0.8 * len(set(every_key()) - SHAPE)


# ---- two things


def differences(one: Recipe, other: Recipe) -> set[str]:
    """The keys in which two recipes differ."""
    return set(different(one.model_dump(mode="json"), other.model_dump(mode="json"), ""))


def different(one: Any, other: Any, path: str) -> list[str]:
    if one == other:
        return []
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [key for name in one for key in different(one[name], other[name], f"{path}.{name}")]
    return [path.removeprefix(".")]


def check_two(one: dict[str, Any], other: dict[str, Any], seen: dict[tuple[str, str], str]) -> None:
    """The stages whose fingerprints differ are those that the difference reaches."""
    recipes = [Recipe.model_validate(nested(values)) for values in (one, other)]
    if stages(recipes[0]).keys() != stages(recipes[1]).keys():
        return
    first, second = (fingerprints(recipe) for recipe in recipes)
    assert {name for name in first if first[name] != second[name]} == reached(differences(*recipes))
    for recipe, found in zip(recipes, (first, second), strict=True):  # over all recipes of the test
        for name, print_ in found.items():
            matter = {key for key in every_key() if name in reached({key})}
            said = json.dumps({key: str(pick(recipe, key)) for key in sorted(matter)})
            assert seen.setdefault((name, print_), said) == said


def pick(recipe: Recipe, key: str) -> Any:
    value: Any = recipe
    for part in key.split("."):
        value = getattr(value, part, None)
    return value


def run_two(count: int) -> None:
    seen: dict[tuple[str, str], str] = {}

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(one=settings_of_recipes(), other=settings_of_recipes(), same=st.booleans())
    @example(one={}, other={}, same=False)
    def check(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
        if same:  # one key apart
            other = one | dict(list(other.items())[:1])
        try:
            Recipe.model_validate(nested(other))
        except ValidationError:
            return
        check_two(one, other, seen)

    check()


def test_different_recipes_have_different_fingerprints(files: Path) -> None:
    run_two(60)


@pytest.mark.slow
def test_two_thousand_recipes_without_a_collision(files: Path) -> None:
    run_two(1000)  # pairs


@pytest.mark.parametrize("key", sorted(KEYS))
def test_each_key_reaches_what_reads_it(files: Path, key: str) -> None:
    """One key changed alone: a stage that the key does not reach is not run again, one that it reaches is."""
    before = Recipe.model_validate(MINE)
    old = fingerprints(before)
    found = {json.dumps(old, sort_keys=True)}
    for value in KEYS[key]:
        after = Recipe.model_validate(nested({key: value}))
        if stages(after).keys() != stages(before).keys():
            continue
        new = fingerprints(after)
        assert {name for name in old if old[name] != new[name]} == reached(differences(before, after))
        found.add(json.dumps(new, sort_keys=True))
    assert len(found) == (1 if not reached({key}) else 1 + len(KEYS[key]))


def test_a_key_that_came_later_leaves_older_artifacts_good(files: Path) -> None:
    """At the value that computes what was computed without it, it is not in the key."""
    recipe = Recipe.model_validate(MINE)
    for value, there in ((0, False), (3, True)):
        ppo = recipe.ppo.model_copy(update={"snapshots": value})
        changed = recipe.model_copy(update={"ppo": ppo})
        key = stage_key(stages(changed)["ppo"], changed, {name: {} for name in stages(changed)}, {})
        assert ("snapshots" in key["config"]["ppo"]) == there
        assert key["config"]["ppo"].keys() | {"snapshots"} == changed.model_dump()["ppo"].keys()


# ---- one thing


def spelt(value: Any, rng: random.Random) -> str:
    """A scalar as YAML, in one of the ways of writing it."""
    if isinstance(value, bool):
        return rng.choice(["true", "True"] if value else ["false", "False"])
    if value is None:
        return rng.choice(["null", "~"])
    if isinstance(value, float):
        return rng.choice([repr(value), f"{value:.17e}"])
    if isinstance(value, str):
        return rng.choice(
            [json.dumps(value), "'" + value.replace("'", "''") + "'"] if "\n" not in value else [json.dumps(value)]
        )
    return json.dumps(value)


def written(value: Any, rng: random.Random, indent: int = 0) -> str:
    """YAML in block or flow style, keys in any order, with comments."""
    if isinstance(value, dict) and value and (indent == 0 or rng.random() < 0.6):
        names = list(value)
        rng.shuffle(names)
        lines = []
        for name in names:
            inner = value[name]
            if isinstance(inner, dict) and inner:
                text = written(inner, rng, indent + 2)
                lines.append(
                    f"{' ' * indent}{name}:{text}" if text.startswith(" {") else f"{' ' * indent}{name}:\n{text}"
                )
            else:
                flow = spelt(inner, rng) if not isinstance(inner, dict | list) else json.dumps(inner)
                lines.append(f"{' ' * indent}{name}: {flow}{rng.choice(['', '  # why'])}")
        return "\n".join(lines)
    return f" {json.dumps(value)}"


def forms(values: dict[str, Any], rng: random.Random, folder: Path) -> list[list[str]]:
    """The arguments of the same recipe, written down in different ways."""
    whole = nested(values)
    (folder / "plain.yaml").write_text(yaml.safe_dump(whole))
    (folder / "styled.yaml").write_text(f"# a comment\n{written(whole, rng)}\n")
    full = Recipe.model_validate(whole).model_dump(mode="json", exclude={"name"})
    (folder / "full.yaml").write_text(yaml.safe_dump(full, sort_keys=False))
    (folder / "mine.yaml").write_text(yaml.safe_dump(MINE))
    given = [f"{key}={hydra(value)}" for key, value in values.items()]
    rng.shuffle(given)
    included = {name: whole[name] for name in rng.sample(list(whole), len(whole) // 2)}
    rest = {name: section for name, section in whole.items() if name not in included}
    (folder / "part.yaml").write_text(yaml.safe_dump(included))
    (folder / "below.yaml").write_text(yaml.safe_dump({"defaults": ["part", "_self_"]} | rest))
    names = {
        "d.jsonl": "e.jsonl",
        "ranked": "again",
        "p.jsonl.gz": "q.jsonl.gz",
        "t.txt": "u.txt",
        "exam.jsonl": "x.jsonl",
    }
    renamed = json.dumps(whole)
    for name, other in names.items():
        if not (folder / other).exists():
            (folder / other).symlink_to(folder / name)  # a link is another name, too
        renamed = renamed.replace(f'"path": "{name}"', f'"path": "{other}"')
    (folder / "renamed.yaml").write_text(renamed)
    runtime = ["runtime.jobs=2", "runtime.micro_batch_size=3", "name=other", "runtime.output_dir=elsewhere"]
    return [
        ["recipe=plain.yaml"],
        ["recipe=styled.yaml"],
        ["recipe=full.yaml"],
        ["recipe=mine.yaml", *given],
        ["recipe=below.yaml"],
        ["recipe=renamed.yaml"],
        ["recipe=plain.yaml", *(a for a in runtime if a.partition("=")[0] not in values)],
    ]


def hydra(value: Any) -> str:
    """A value in the grammar of Hydra's command line."""
    if isinstance(value, str):
        return "'" + value.replace("'", r"\'") + "'"
    return json.dumps(value).replace('"', "").replace(" ", "")


def run_one(folder: Path, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(values=settings_of_recipes(), seed=st.integers(0, 2**32))
    def check(values: dict[str, Any], seed: int) -> None:
        wanted = fingerprints(Recipe.model_validate(nested(values)))
        for arguments in forms(values, random.Random(seed), folder):
            assert fingerprints(load_recipe(arguments)) == wanted, arguments

    check()


def test_a_recipe_has_one_fingerprint_however_it_is_written(files: Path) -> None:
    run_one(files, 8)


@pytest.mark.slow
def test_two_thousand_spellings_have_one_fingerprint_each(files: Path) -> None:
    run_one(files, 286)  # recipes, each in seven forms


# ---- files and packages


def test_files_count_by_their_content(files: Path) -> None:
    before = fingerprints(Recipe.model_validate(MINE))
    Path("d.jsonl").rename("renamed.jsonl")
    Path("ranked").rename("moved")
    moved = nested(
        {"data.demonstrations": [{"path": "renamed.jsonl"}], "data.rankings": [{"path": str(files / "moved")}]}
    )
    assert fingerprints(Recipe.model_validate(moved)) == before


CHANGES = {
    "a row": ("d.jsonl", b'{"prompt": "a", "response": "B"}\n'),
    "a row of a file deep in a folder": ("ranked/more/2.jsonl", b'{"prompt": "d", "chosen": "e", "rejected": "g"}\n'),
    "a new file in a folder": ("ranked/3.jsonl", b'{"prompt": "d", "chosen": "e", "rejected": "f"}\n'),
    "what is compressed": ("p.jsonl.gz", gzip.compress(b'{"prompt": "b"}\n', mtime=0)),
    "the order of rows": ("t.txt", b"More text.\n\nSome text.\n"),
    "an evaluation set": ("exam.jsonl", b'{"question": "whom?"}\n'),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_file_is_another_thing(files: Path, change: str) -> None:
    before = fingerprints(Recipe.model_validate(MINE))
    name, content = CHANGES[change]
    (files / name).write_bytes(content)
    after = fingerprints(Recipe.model_validate(MINE))
    assert not set(before.values()) & set(after.values())


ROWS = {
    "d.jsonl": lambda text: json.dumps({"prompt": text, "response": "b"}),
    "ranked/more/2.jsonl": lambda text: json.dumps({"prompt": text, "chosen": "e", "rejected": "f"}),
    "t.txt": lambda text: text,
    "exam.jsonl": lambda text: json.dumps({"question": text}),
}


def run_rows(folder: Path, count: int) -> None:
    """Whatever the recipe: a file with another row makes another artifact of every stage, the row again the same."""
    assert all((folder / name).exists() for name in ROWS)

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(values=settings_of_recipes(), name=st.sampled_from(sorted(ROWS)), one=st.text(), other=st.text())
    def check(values: dict[str, Any], name: str, one: str, other: str) -> None:
        recipe = Recipe.model_validate(nested(values))
        found = []
        for text in (one, other, one):
            row = ROWS[name](text).encode("utf-8", "surrogatepass") + b"\n"
            (folder / name).write_bytes(row)
            found.append((row, fingerprints(recipe)))
        (before, old), (after, new), (_, again) = found
        assert again == old
        assert before == after or not set(old.values()) & set(new.values())

    check()


def test_a_changed_row_is_another_thing_in_every_recipe(files: Path) -> None:
    run_rows(files, 40)


@pytest.mark.slow
def test_two_thousand_changed_rows(files: Path) -> None:
    run_rows(files, 2000)


def test_the_same_bytes_under_another_ending_are_another_thing(files: Path) -> None:
    """They are read otherwise."""
    (files / "d.txt").write_bytes((files / "d.jsonl").read_bytes())
    before = fingerprints(Recipe.model_validate(MINE))
    after = fingerprints(Recipe.model_validate(nested({"data.demonstrations": [{"path": "d.txt"}]})))
    assert before["data"] != after["data"]


@pytest.mark.parametrize(
    ("version", "again"), [("1.16.9", set()), ("1.17.0", {"sft", "reward_model", "judge", "ppo_init"})]
)
def test_a_patch_of_trl_changes_nothing_and_a_minor_version_what_trains_with_it(
    files: Path, monkeypatch: pytest.MonkeyPatch, version: str, again: set[str]
) -> None:
    monkeypatch.setattr(instructrl.key, "installed", lambda _: "1.16.0")
    before = fingerprints(Recipe.model_validate(MINE))
    monkeypatch.setattr(instructrl.key, "installed", lambda _: version)
    after = fingerprints(Recipe.model_validate(MINE))
    below = again | ({"ppo", "ppo_ptx", "eval"} if again else set())
    assert {name for name in before if before[name] != after[name]} == below
