"""The figure of a sweep: its numbers by hand, what stands on which axis, and that the command makes it."""

import json
from pathlib import Path

import pytest
from conftest import Instructrl

from instructrl.stages import overlay

PNG = b"\x89PNG\r\n\x1a\n"


def test_mean_and_interval_over_seeds() -> None:
    found = overlay.place(0.1, [(1.0, 0, 9), (2.0, 0, 9), (6.0, 0, 9)])
    assert found.mean == 3
    half = 4.303 * 7**0.5 / 3**0.5  # t of 2 degrees of freedom; the variance is (4 + 1 + 9) / 2
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))
    assert found.seeds == (1, 2, 6)


def test_two_seeds_have_a_range_and_one_its_own_interval() -> None:
    assert overlay.place(1, [(4.0, 0, 9), (2.0, 0, 9)]) == overlay.Place(1, 3, 2, 4, (4, 2))
    assert overlay.place(1, [(4.0, 3.5, 4.75)]) == overlay.Place(1, 4, 3.5, 4.75, (4,))


def test_quantiles_are_those_of_students_t() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert pytest.approx([stats.t.ppf(0.975, n) for n in range(1, 31)], abs=6e-4) == overlay.STUDENT


def test_what_stands_on_which_axis() -> None:
    values = [{"ppo.init": "sft", "ppo.lam": lam, "ppo.kl_coef": kl, "seed": 1} for lam in (0.9, 1) for kl in (1, 2, 3)]
    assert overlay.axes_of([{"values": one} for one in values]) == ("ppo.kl_coef", ["ppo.init", "ppo.lam"])
    assert overlay.axes_of([{"values": {"ppo.init": "sft", "seed": 1}}]) == ("ppo.init", [])
    assert overlay.axes_of([{"values": {"seed": 1}}]) == ("model", [])


def test_positions_on_the_x_axis() -> None:
    assert overlay.positions([1, 2, 5]) == {1: 1, 2: 2, 5: 5}
    assert overlay.positions([0, 0.01, 1]) == {0: -4, 0.01: -2, 1: 0}  # zero a step before the first
    assert overlay.positions(["sft", "ppo_init", "sft"]) == {"sft": 0, "ppo_init": 1}


def test_lines_of_two_keys_and_two_seeds() -> None:
    points, given = [], []
    for kl in (0.3, 0.1):
        for lam in (1, 0.9):
            for seed in (0, 1):
                points.append({"values": {"kl": kl, "ppo.lam": lam, "seed": seed}})
                given.append((100 * kl + lam + seed, 0.0, 0.0))
    one, other = overlay.lines(points, {"ppo": given}, "kl", ["ppo.lam"], overlay.MODELS)
    assert (one.name, other.name) == ("PPO, lam=1", "PPO, lam=0.9")
    assert [(place.x, place.seeds) for place in one.places] == [(0.1, (11, 12)), (0.3, (31, 32))]
    assert [place.mean for place in other.places] == pytest.approx([11.4, 31.4])


def eval_artifact(folder: Path, seed: int, kl: float) -> str:
    """What eval leaves of its models, PPO's depending on kl and everything on the seed."""
    folder.mkdir()
    models = {}
    for number, name in enumerate(("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx")):
        value = number / 10 + seed / 100 + (kl if name == "ppo" else 0)
        models[name] = {key: [value, value - 0.1, value + 0.1] for key in overlay.PANELS}
    models["sft"]["kl"] = None
    (folder / "metrics.json").write_text(json.dumps({"models": models}))
    return str(folder)


def test_figure_of_evaluations(tmp_path: Path) -> None:
    points = [
        {"values": {"ppo.kl_coef": kl, "seed": seed}, "folder": eval_artifact(tmp_path / f"{seed}-{kl}", seed, kl)}
        for seed in (0, 1, 2)
        for kl in (0, 0.1, 1)
    ]
    order = {"points": points, "target": "eval", "name": "mine", "folder": str(tmp_path / "out")}
    overlay.run(order)
    said = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert said["x"] == "ppo.kl_coef"
    assert list(said["panels"]) == [title for title, _ in overlay.PANELS.values()]
    rates = said["panels"]["win rate vs SFT"]
    assert list(rates) == ["SFT", "PPO", "PPO-ptx"]
    assert [place["mean"] for place in rates["PPO"]] == pytest.approx([0.31, 0.41, 1.31])
    assert [place["mean"] for place in rates["SFT"]] == pytest.approx([0.21] * 3)
    first = (tmp_path / "out" / "sweep.png").read_bytes()
    assert first.startswith(PNG)
    drawn = (tmp_path / "out" / "sweep.svg").read_text()
    assert "<svg" in drawn
    overlay.run(order)
    assert (tmp_path / "out" / "sweep.png").read_bytes() == first
    assert (tmp_path / "out" / "sweep.svg").read_text() == drawn


def test_a_sweep_ends_in_a_figure(here: Path, instructrl: Instructrl, fakes: None) -> None:
    (here / "script.json").write_text(json.dumps({"ppo": {"metric": "ppo.kl_coef"}}))
    done = instructrl("ppo", "recipe=base.yaml", "ppo.kl_coef=0.1,0.2", "seed=0,1,2", "--multirun")
    assert done.code == 0, done.err
    [figure] = here.glob("artifacts/sweeps/base-*/sweep.png")
    assert f"The figure: {figure.relative_to(here)}" in done.out
    said = json.loads(figure.with_suffix(".json").read_text())
    assert [place["seeds"] for place in said["panels"]["metric"]["ppo"]] == [[0.1] * 3, [0.2] * 3]
    assert figure.read_bytes().startswith(PNG)
