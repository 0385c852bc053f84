"""What there is in a store, and what may be deleted: never what a last run refers to, nor what is being made."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Instructrl, until

from instructrl.inventory import amount


def rows(output: str) -> list[list[str]]:
    """The cells of the table: stage, fingerprint, state, recipe, and when and how large in two words each."""
    return [line.split() for line in output.splitlines() if re.match(r" \w+ +[0-9a-f]{12} ", line)]


def states(output: str) -> list[tuple[str, str]]:
    return [(row[0], row[2]) for row in rows(output)]


def there(here: Path) -> list[str]:
    return sorted(f"{path.parent.name}/{path.name}" for path in here.glob("artifacts/*/*") if path.is_dir())


def test_what_there_is(here: Path, instructrl: Instructrl, fakes: None) -> None:
    assert instructrl("runs", "recipe=base.yaml").out == "Nothing has been made yet.\n"
    instructrl("run-all", "recipe=base.yaml")
    listed = instructrl("runs", "recipe=base.yaml").out
    assert states(listed) == [(stage, "done") for stage in ("data", "sft", "ppo", "ppo_ptx", "eval")]
    assert all(row[3] == "base" and re.fullmatch(r"20\d\d-\d\d-\d\d", row[4]) for row in rows(listed))
    found = json.loads(instructrl("runs", "recipe=base.yaml", "--json").out)
    assert listed.splitlines()[-1] == f"5 artifacts, {amount(sum(one['size'] for one in found))}."
    for one in found:
        assert one["size"] == sum(path.stat().st_size for path in Path(one["path"]).rglob("*") if path.is_file())
        assert one["used_by"] == ["base"]
        assert not one["unused"]
    [sft] = here.glob("artifacts/sft/*/out.txt")
    sft.unlink()
    assert ("sft", "damaged") in states(instructrl("runs", "recipe=base.yaml").out)


def test_what_the_last_run_left_behind_is_listed_and_deleted_when_told(
    here: Path, instructrl: Instructrl, fakes: None
) -> None:
    instructrl("run-all", "recipe=base.yaml")
    first = there(here)
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml").out
    instructrl("run-all", "recipe=base.yaml", "sft.epochs=3")
    every = there(here)
    assert states(instructrl("runs", "recipe=base.yaml").out).count(("sft", "unused")) == 1
    listed = instructrl("clean", "recipe=base.yaml")
    assert sorted(row[0] for row in rows(listed.out)) == ["eval", "ppo", "ppo_ptx", "sft"]
    assert listed.out.splitlines()[-1].endswith("Delete them with: instructrl clean recipe=base.yaml --yes")
    assert there(here) == every  # nothing is deleted unasked
    deleted = instructrl("clean", "recipe=base.yaml", "--yes")
    assert re.search(r"^Deleted 4 artifacts, [\d.]+ kB\.$", deleted.out, re.MULTILINE)
    [data] = [name for name in first if name.startswith("data/")]
    assert there(here) == sorted({data} | (set(every) - set(first)))
    assert "Everything is done" in instructrl("run-all", "recipe=base.yaml", "sft.epochs=3").out


def test_what_another_recipe_or_a_point_of_a_sweep_refers_to_is_kept(
    here: Path, instructrl: Instructrl, fakes: None
) -> None:
    instructrl("sft", "recipe=base.yaml", "name=other", "seed=7")
    instructrl("ppo", "recipe=base.yaml", "-m", "ppo.kl_coef=0.1,0.2,0.3")
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml", "--yes").out
    instructrl("sft", "recipe=base.yaml")  # has no ppo, and so says nothing of it
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml", "--yes").out
    instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.2")
    assert states(instructrl("clean", "recipe=base.yaml").out) == [("ppo", "unused")] * 2


def test_what_was_interrupted_is_kept_until_the_recipe_goes_elsewhere(
    here: Path, instructrl: Instructrl, fakes: None
) -> None:
    (here / "script.json").write_text(json.dumps({"sft": {"steps": 5, "end": "kill"}}))
    assert instructrl("run-all", "recipe=base.yaml").code == 1
    assert states(instructrl("runs", "recipe=base.yaml").out) == [("data", "done"), ("sft", "stopped")]
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml", "--yes").out
    assert "resumes from step 4" in instructrl("plan", "recipe=base.yaml").out
    (here / "script.json").unlink()
    instructrl("sft", "recipe=base.yaml", "sft.epochs=3")
    assert states(instructrl("clean", "recipe=base.yaml", "--yes").out) == [("sft", "stopped")]
    assert not list(here.glob("artifacts/sft/*.partial"))
    assert not list(here.glob("artifacts/sft/*.discarded"))


def test_what_is_being_made_and_what_it_is_made_from_is_kept(
    here: Path, instructrl: Instructrl, spawn: Callable, fakes: None
) -> None:
    instructrl("data", "recipe=base.yaml")
    (here / "script.json").write_text(json.dumps({"sft": {"steps": 100, "seconds": 0.05}}))
    running = spawn("sft", "recipe=base.yaml")
    until(lambda: list(here.glob("artifacts/sft/*.partial/checkpoints")))
    for folder in ("runs", "recipes"):  # as if nothing referred to anything
        for path in here.glob(f"artifacts/{folder}/*.json"):
            path.unlink()
    assert states(instructrl("runs", "recipe=base.yaml").out) == [("data", "done"), ("sft", "making")]
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml", "--yes").out
    running.terminate()
    running.wait(20)


def test_nothing_is_deleted_if_what_says_what_is_used_is_damaged(
    here: Path, instructrl: Instructrl, fakes: None
) -> None:
    instructrl("sft", "recipe=base.yaml")
    before = there(here)
    (here / "artifacts" / "runs" / "base.json").write_text('{"sft": ')
    refused = instructrl("clean", "recipe=base.yaml", "--yes")
    assert refused.code == 2
    assert refused.err.startswith("Error: artifacts/runs/base.json is damaged")
    assert there(here) == before
    assert instructrl("sft", "recipe=base.yaml").code == 0  # writes it anew
    assert "nothing to clean" in instructrl("clean", "recipe=base.yaml", "--yes").out


def test_only_what_stages_wrote_is_touched(here: Path, instructrl: Instructrl, fakes: None) -> None:
    instructrl("sft", "recipe=base.yaml")
    mine = here / "artifacts" / "sft" / "my-notes"
    mine.mkdir()
    (here / "elsewhere").mkdir()
    (here / "artifacts" / "sft" / "0123456789ab").symlink_to(here / "elsewhere")
    instructrl("sft", "recipe=base.yaml", "sft.epochs=3")
    assert states(instructrl("clean", "recipe=base.yaml", "--yes").out) == [("sft", "unused")]
    assert mine.is_dir()
    assert (here / "elsewhere").is_dir()


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (31_400_000, "31.4 MB"), (3e11, "300 GB"), (4e12, "4.0 TB")],
)
def test_amount(size: float, text: str) -> None:
    assert amount(size) == text
