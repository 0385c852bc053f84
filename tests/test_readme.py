"""What README tells people to type works, and what it shows has the form of what they get."""

import re
from pathlib import Path

import pytest
from conftest import ROOT, Instructrl

from instructrl.pipeline import NAMES
from instructrl.recipe import recipe_names

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)

RUN_NOTHING = ("plan", "estimate", "config", "show", "runs", "diff", "verify", "logs", "clean")


def commands() -> list[str]:
    """Every line that begins with `$` in a console block, without comments."""
    lines = [line for kind, block in BLOCKS if kind == "console" for line in block.splitlines()]
    return [line.removeprefix("$ ").partition("#")[0].strip() for line in lines if line.startswith("$ ")]


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command.split()[1] for command in commands() if command.startswith("make ")}
    assert {"run", "test"} <= named <= targets | {"test"}


@pytest.fixture
def own_files(here: Path) -> Path:
    """The files that README's own recipe names, and that recipe."""
    recipe = next(block for kind, block in BLOCKS if kind == "yaml" and block.startswith("# mine.yaml"))
    (here / "mine.yaml").write_text(recipe)
    (here / "my-model").mkdir()
    (here / "my-model" / "config.json").write_text('{"model_type": "gpt2"}')
    (here / "demonstrations.jsonl").write_text('{"instruction": "Say hi.", "response": "Hi."}\n')
    (here / "rankings.csv").write_text('prompt,responses,ranks\nSay hi.,"[""Hi."", ""No.""]","[1, 2]"\n')
    (here / "text.txt").write_text("A text.\n\nAnother.\n")
    import gzip

    (here / "rankings.csv.gz").write_bytes(gzip.compress((here / "rankings.csv").read_bytes()))
    return here


@pytest.mark.parametrize("command", [command for command in commands() if command.startswith("instructrl ")])
def test_commands_plan(own_files: Path, instructrl: Instructrl, command: str) -> None:
    name, *arguments = command.split()[1:]
    output = instructrl(
        name, *arguments, *([] if name in ("plan", "config", "show", "runs", "clean") else ["--dry-run"])
    )
    assert output.code == 0, output.err
    assert "run " in output.out


def test_every_command_and_recipe_is_named() -> None:
    for name in ("run-all", *RUN_NOTHING, "report", "compare", *(name.replace("_", "-") for name in NAMES)):
        assert f"`{name}`" in README or f"`instructrl {name}" in README, name
    for name in recipe_names():
        assert f"| `{name}` |" in README


def test_the_table_shown_has_the_five_models() -> None:
    shown = README.partition("<!-- five models -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^ (GPT|GPT \(prompted\)|SFT|PPO|PPO-ptx) +\.\d+ \[", shown, re.MULTILINE)
    assert rows == ["GPT", "GPT (prompted)", "SFT", "PPO", "PPO-ptx"]
