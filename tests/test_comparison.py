"""Two runs side by side: what differs, what came out, and intervals of differences."""

import math
from pathlib import Path

import pytest
from conftest import Instructrl
from fakes import evaluation
from test_reporting import Page, figures

from instructrl.reporting import comparison, runs

OTHER = ["recipe=base.yaml", "ppo.kl_coef=0.1"]


@pytest.fixture
def two(here: Path) -> Path:
    """The current directory, with two evaluations in it."""
    evaluation.make(["recipe=base.yaml"], evaluation.MORE)
    evaluation.make(OTHER)
    return here


def test_compare(two: Path, instructrl: Instructrl) -> None:
    output = instructrl("compare", "base.yaml", "base.yaml ppo.kl_coef=0.1")
    assert output.code == 0, output.err
    lines = [line.split() for line in output.out.splitlines()]
    assert ["ppo.kl_coef", "0.02", "0.1"] in lines
    assert [line for line in lines if line and line[0].startswith("ppo")] == [["ppo.kl_coef", "0.02", "0.1"]]
    won = [".640", "[.620,", ".660]", ".640", "[.620,", ".660]", "+.000", "[-.028,", "+.028]"]
    assert ["win", "rate", "against", "SFT", "PPO", *won] in lines
    path = Path(output.out.splitlines()[-1].removeprefix("The comparison: "))
    page = Page(path)
    assert "ppo.kl_coef=0.1" in page.text
    assert figures(page) >= {"two_runs", "ppo_reward", "ppo_ptx_ptx_loss"}


def test_two_runs_of_one_recipe_are_called_by_what_differs(two: Path) -> None:
    one, other = runs.of_recipe(["recipe=base.yaml"]), runs.of_recipe(OTHER)
    assert comparison.names(one, other) == ("ppo.kl_coef=0.02", "ppo.kl_coef=0.1")
    assert comparison.names(one, one) == (one.title, one.title)
    assert comparison.tables(one, one)[0].notes == ["The recipes are the same, but for `runtime`."]
    found = runs.find(other.evaluation.fingerprint[:8]), runs.find(str(one.evaluation.folder))
    assert comparison.differences(*found) == [["ppo.kl_coef", "0.1", "0.02"]]


def test_files_differ_by_their_content(here: Path) -> None:
    found: list[list[str]] = []
    before = {"data": {"path": "sha256:" + "a" * 64, "limit": None}, "list": [1, 2], "gone": True}
    after = {"data": {"path": "sha256:" + "b" * 64, "limit": 5}, "list": [1, 3], "new": {"x": 1}}
    comparison.walk(before, after, "", found)
    assert found == [
        ["data.path", "content aaaaaaaa", "content bbbbbbbb"],
        ["data.limit", "null", "5"],
        ["list[1]", "2", "3"],
        ["gone", "true", "(not read)"],
        ["new", "(not read)", "{'x': 1}"],
    ]


def test_the_interval_of_a_difference() -> None:
    """With intervals that are symmetric it is the normal theory's: half widths add as squares."""
    mean, low, high = comparison.difference((0.5, 0.47, 0.53), (0.6, 0.56, 0.64))
    assert mean == pytest.approx(0.1)
    assert (mean - low, high - mean) == (pytest.approx(0.05), pytest.approx(0.05))
    mean, low, high = comparison.difference((0.9, 0.7, 0.95), (0.5, 0.4, 0.8))  # by hand, from the paper's eq. 4
    assert mean == pytest.approx(-0.4)
    assert low == pytest.approx(-0.4 - math.sqrt(0.1**2 + 0.05**2))
    assert high == pytest.approx(-0.4 + math.sqrt(0.3**2 + 0.2**2))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["tiny"], 2, "compare takes two runs; you named 1: tiny."),
        (["tiny", "tiny", "real-cpu"], 2, "compare takes two runs; you named 3"),
        (
            ["base.yaml", "base.yaml seed=7"],
            1,
            "eval is not made for base (never ran). Make it with: instructrl eval recipe",
        ),
        (["base.yaml", "base.yaml sed=7"], 2, "There is no key 'sed'"),
        (["base.yaml", "artifacts/ppo/{ppo}"], 2, "artifacts/ppo/{ppo} is an artifact of ppo; name one of eval"),
    ],
)
def test_runs_that_cannot_be_compared(
    here: Path, instructrl: Instructrl, words: list[str], code: int, said: str
) -> None:
    evaluation.make(["recipe=base.yaml"])
    ppo = runs.of_recipe(["recipe=base.yaml"]).parts["ppo"].fingerprint
    output = instructrl("compare", *(word.format(ppo=ppo) for word in words))
    assert output.code == code
    assert said.format(ppo=ppo) in output.err
    assert "Traceback" not in output.err
