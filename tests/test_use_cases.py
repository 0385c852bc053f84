"""Win rates by use case: against counting by hand."""

import numpy as np
import pytest

from instructrl.stages.use_cases import OTHER, by_use_case, table
from instructrl.stages.winrate import share

PROMPTS = [{"prompt": f"Prompt {n}", "category": "chat" if n % 3 else "sums"} for n in range(36)]
WON = [1.0, 0.5, 0.0, 1.0] * 9


def test_each_use_case_has_its_own_win_rate_and_interval():
    found = by_use_case(PROMPTS, {"sft": [0.5] * 36, "ppo": WON}, samples=200, fewest=10)
    assert list(found) == ["chat", "sums"]  # the larger first
    for case, size in (("chat", 24), ("sums", 12)):
        values = [value for row, value in zip(PROMPTS, WON, strict=True) if row["category"] == case]
        assert found[case] == {"prompts": size, "win_rate": {"ppo": list(share(values, 200))}}
    whole = sum(of["prompts"] * of["win_rate"]["ppo"][0] for of in found.values()) / 36
    assert whole == pytest.approx(np.mean(WON))


def test_few_prompts_have_no_interval_and_their_number():
    prompts = [*PROMPTS[:4], {"prompt": "x", "category": ""}]
    found = by_use_case(prompts, {"ppo": [1.0, 0.0, 1.0, 1.0, 0.5]}, samples=200, fewest=10)
    assert found["chat"] == {"prompts": 2, "win_rate": {"ppo": [0.5]}}
    assert found[OTHER] == {"prompts": 1, "win_rate": {"ppo": [0.5]}}
    made = table(found, {"sft": "SFT", "ppo": "PPO"}, fewest=10)
    assert made["columns"] == ["use case", "prompts", "PPO"]
    assert made["rows"] == [["chat", "2", ".500"], ["sums", "2", "1.000"], [OTHER, "1", ".500"]]
    assert made["notes"][0].endswith("With fewer than 10 prompts there is no interval.")


def test_labels_count_by_prompt():
    labels = {"ppo": {"prompt 1": 1.0, "prompt 2": 0.0, "elsewhere": 1.0}, "gpt": {}}
    found = by_use_case(PROMPTS, labels, samples=200, fewest=2)
    assert found["chat"]["win_rate"] == {"ppo": list(share([1.0, 0.0], 200))}
    assert found["sums"]["win_rate"] == {}
    made = table(found, {"gpt": "GPT", "ppo": "PPO"}, fewest=2)
    assert made["columns"] == ["use case", "prompts", "PPO"]
    assert made["rows"][1] == ["sums", "12", "-"]


def test_prompts_without_use_cases_have_no_table():
    found = by_use_case([row | {"category": ""} for row in PROMPTS], {"ppo": WON}, samples=200, fewest=10)
    assert found == {}
    assert table(found, {"ppo": "PPO"}, fewest=10) is None


def test_of_many_use_cases_the_largest_are_shown():
    prompts = [{"prompt": str(n), "category": f"case {n % 30}"} for n in range(75)]
    found = by_use_case(prompts, {"ppo": [1.0] * 75}, samples=10, fewest=10)
    made = table(found, {"ppo": "PPO"}, fewest=10)
    assert len(found) == 30
    assert len(made["rows"]) == 20
    assert "10 smaller use cases are in metrics.json." in made["notes"][0]
