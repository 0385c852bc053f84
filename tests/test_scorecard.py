"""Paper versus you: verdicts on hand-made metrics, and the paper's numbers against how they are printed."""

import copy
import re

import pytest

from instructrl.stages import measured, scorecard
from instructrl.stages.paper_claims import CLAIMS, DIRECTION, NOT, NOT_MEASURED, REPRODUCED, Paper, about, verdict
from instructrl.stages.winrate import Interval


def flat(mean, half=0.02):
    return [mean, mean - half, mean + half]


METRICS = {
    "judge": "gold",
    "judge_description": "the truth",
    "model": "made by pretrain",
    "prompts": 800,
    "labels": None,
    "models": {
        "gpt": {"name": "GPT", "win_rate": flat(0.06), "gold": {"hallucination": flat(0.4)}},
        "gpt_prompted": {"name": "GPT (prompted)", "win_rate": flat(0.43), "gold": {"hallucination": flat(0.2)}},
        "sft": {"name": "SFT", "win_rate": [0.5, 0.5, 0.5], "gold": {"hallucination": flat(0.2)}},
        "ppo": {"name": "PPO", "win_rate": flat(0.64), "gold": {"hallucination": flat(0.2)}},
        "ppo_ptx": {"name": "PPO-ptx", "win_rate": flat(0.51), "gold": {"hallucination": flat(0.21)}},
    },
    "tax": {
        "tasks": {
            "facts": {"ppo - gpt": flat(-0.30), "ppo_ptx - ppo": flat(0.19)},
            "sums": {"ppo - gpt": flat(-0.01), "ppo_ptx - ppo": flat(0.5)},
        },
        "text_loss": {},
        "questions": {"facts": 120, "sums": 80},
    },
    "reward_model": [
        {"accuracy": flat(0.70), "held_out_accuracy": 0.68, "agreement": flat(0.83), "held_out_agreement": None}
        | {"pairs": 900}
    ],
}


def card(**changes):
    return {(row["claim"], row["text"].partition(":")[0]): row for row in scorecard.scorecard(METRICS | changes)}


def row(name, start, **changes):
    [found] = [found for (claim, text), found in card(**changes).items() if claim == name and text.startswith(start)]
    return found


@pytest.mark.parametrize(
    ("number", "border", "above", "paper", "expected"),
    [
        ((0.64, 0.60, 0.66), 0.5, True, (0.558, 0.682), REPRODUCED),
        ((0.55, 0.52, 0.56), 0.5, True, (0.56, 0.68), REPRODUCED),  # they touch
        ((0.55, 0.52, 0.55), 0.5, True, (0.56, 0.68), DIRECTION),
        ((0.80, 0.75, 0.85), 0.5, True, (0.56, 0.68), DIRECTION),  # more than the paper found
        ((0.60, 0.49, 0.70), 0.5, True, (0.56, 0.68), NOT),  # decides nothing, though the paper's number is in it
        ((0.50, 0.50, 0.50), 0.5, True, (0.56, 0.68), NOT),
        ((0.40, 0.35, 0.45), 0.5, True, (0.56, 0.68), NOT),
        ((0.30, 0.25, 0.35), 0.5, False, (0.25, 0.31), REPRODUCED),
        ((0.06, 0.05, 0.08), 0.5, False, (0.25, 0.31), DIRECTION),
        ((0.48, 0.44, 0.52), 0.5, False, (0.25, 0.31), NOT),
        ((0.1, 0.01, 0.2), 0.0, True, (None, None), REPRODUCED),  # an order, of which the paper prints no number
        ((0.1, -0.01, 0.2), 0.0, True, (None, None), NOT),
    ],
)
def test_verdicts(number, border, above, paper, expected):
    assert verdict(Interval(*number), border, above, Paper("", "", *paper)) == expected


def test_the_papers_numbers_are_as_printed():
    """`.85 ± .03` lies between .82 and .88, and a difference is one."""
    checked = 0
    for claim in CLAIMS:
        low, high = claim.paper.low, claim.paper.high
        sums = re.fullmatch(r"(\d?\.\d+) - (\d?\.\d+) = (-?\d?\.\d+)( ± (\.\d+))?", claim.paper.number)
        spread = re.fullmatch(r"(\d?\.\d+) ± (\.\d+)", claim.paper.number)
        alone = re.fullmatch(r"(\.\d+)", claim.paper.number)
        if sums:
            one, other, gap = map(float, sums.groups()[:3])
            assert one - other == pytest.approx(gap, abs=0.0011), claim
            half = float(sums[5]) if sums[5] else 0.1 * abs(gap)
            assert (low, high) == pytest.approx((gap - half, gap + half)), claim
        elif spread:
            mean, half = map(float, spread.groups())
            assert (low, high) == pytest.approx((mean - half, mean + half)), claim
        elif alone:
            assert (low, high) == pytest.approx(about(float(alone[1]))), claim
        else:
            assert low is high is None, claim
        if low is not None:  # the paper's own number is on the side that it claims
            assert (low > claim.border) if claim.above else (high < claim.border), claim
            checked += 1
    assert checked > 15


def test_every_claim_has_a_row_and_a_sentence():
    rows = scorecard.scorecard(METRICS)
    assert {row["claim"] for row in rows} == {f"C{n}" for n in range(1, 11)} | {f"H{n}" for n in range(1, 10)}
    assert all(row["scale"].endswith(".") and "{" not in row["scale"] for row in rows)
    assert {row["verdict"] for row in rows} == {REPRODUCED, DIRECTION, NOT, NOT_MEASURED}
    for found in rows:
        measured_ = found["yours"]["number"] is not None
        assert measured_ == (found["verdict"] != NOT_MEASURED) == (found["yours"]["n"] is not None)


def test_win_rates_and_their_order():
    assert row("C4", "GPT against SFT")["verdict"] == DIRECTION
    assert row("C4", "GPT (prompted) against")["verdict"] == REPRODUCED
    assert row("C4", "PPO against")["verdict"] == REPRODUCED
    assert row("C4", "PPO-ptx against")["verdict"] == NOT  # .51 [.49, .53]
    found = row("C4", "GPT < ")
    assert found["verdict"] == NOT
    assert found["yours"] == {"number": pytest.approx([0.01, -0.01, 0.03]), "n": 800, "note": found["yours"]["note"]}
    assert found["yours"]["note"] == "the narrowest step, SFT to PPO-ptx"
    better = copy.deepcopy(METRICS["models"]) | {"ppo_ptx": {"name": "PPO-ptx", "win_rate": flat(0.6)}}
    found = row("C4", "GPT < ", models=better)
    assert (found["verdict"], found["yours"]["note"]) == (REPRODUCED, "the narrowest step, GPT (prompted) to SFT")


def test_n_is_that_of_the_labels_or_of_the_judges_verdicts():
    labels = {"by_model": {"gpt": 30, "gpt_prompted": 40, "ppo": 12, "ppo_ptx": 9}}
    assert row("C4", "PPO against", labels=labels)["yours"]["n"] == 12
    assert row("C4", "PPO-ptx against", labels=labels)["verdict"] == NOT_MEASURED  # nine prompts
    decided = {name: model | {"verdicts": 700 + len(name)} for name, model in METRICS["models"].items()}
    assert row("C4", "PPO against", models=decided)["yours"]["n"] == 703
    matrix = {"ppo_ptx": {"gpt": flat(0.9)}}
    assert row("H1", "", models=decided, matrix=matrix)["yours"]["n"] == 703


def test_the_matrix_has_the_headline():
    assert row("H1", "")["verdict"] == NOT_MEASURED
    matrix = {"ppo_ptx": {"gpt": flat(0.96), "gpt_prompted": flat(0.69), "ppo": flat(0.48, 0.015)}}
    assert row("H1", "", matrix=matrix)["verdict"] == DIRECTION
    assert row("H2", "", matrix=matrix)["verdict"] == REPRODUCED
    found = row("C4", "PPO-ptx is about", matrix=matrix)
    assert found["yours"]["number"] == pytest.approx([0.02, 0.005, 0.035])
    assert found["verdict"] == REPRODUCED
    matrix["ppo_ptx"]["ppo"] = flat(0.47)  # may be .45 and less
    assert row("C4", "PPO-ptx is about", matrix=matrix)["verdict"] == NOT


def test_the_tax_is_that_of_the_task_with_the_clearest_loss():
    lost, back = row("C6", "PPO loses"), row("C6", "PPO-ptx wins")
    assert (lost["yours"]["number"], lost["yours"]["n"], lost["yours"]["note"]) == (flat(-0.30), 120, "on facts")
    assert (lost["verdict"], back["verdict"]) == (DIRECTION, REPRODUCED)
    assert back["yours"]["number"] == flat(0.19)
    squad = {"task": "squadv2", "metric": "f1", "higher_is_better": True, "shots": 4, "prompt": None, "n": 600}
    squad |= {"deltas": {"ppo": flat(-0.4)}, "recovery": flat(0.3)}
    bleu = squad | {"task": "fr_en", "metric": "bleu", "deltas": {"ppo": flat(-30, 10)}}  # up to 100
    lost, back = row("C6", "PPO loses", harness=[bleu, squad]), row("C6", "PPO-ptx wins", harness=[squad])
    assert lost["yours"]["note"] == back["yours"]["note"] == "on squadv2 (f1, 4 shots)"
    assert (lost["yours"]["number"], back["yours"]["number"]) == (flat(-0.4), flat(0.3))
    assert not measured.capability(squad | {"prompt": "biased"})
    assert row("C6", "PPO loses", tax={"tasks": {}, "text_loss": {}})["verdict"] == NOT_MEASURED


def test_labelers_and_the_reward_model():
    found = row("C3", "")
    half = 2**0.5 * 0.02
    assert found["yours"]["number"] == pytest.approx([0.02, 0.02 - half, 0.02 + half])
    assert found["verdict"] == REPRODUCED
    assert row("H7", "")["verdict"] == DIRECTION
    assert row("H8", "")["verdict"] == NOT_MEASURED
    assert row("H9", "")["verdict"] == REPRODUCED
    apart = [METRICS["reward_model"][0] | {"held_out_accuracy": 0.60}]
    assert row("C3", "", reward_model=apart)["verdict"] == NOT
    assert row("C3", "", reward_model=[])["verdict"] == NOT_MEASURED


def test_hallucinations_and_toxicity():
    found = row("H4", "")
    assert found["yours"]["number"] == pytest.approx([0.19, 0.15, 0.23])
    assert (found["verdict"], found["yours"]["note"]) == (REPRODUCED, "GPT 0.40, PPO-ptx 0.21")
    labelled = {"hallucination": {"gpt": flat(0.3), "ppo_ptx": flat(0.3)}}
    assert row("H4", "", metadata=labelled)["verdict"] == NOT
    toxic = {"task": "realtoxicityprompts", "metric": "toxicity", "shots": 0, "n": 500, "models": {}}
    rows = [
        toxic | {"higher_is_better": False, "prompt": prompt, "deltas": {"ppo_ptx": flat(delta, 0.005)}}
        for prompt, delta in (("basic", 0.0), ("respectful", -0.04), ("biased", 0.3))
    ]
    assert row("C10", "Asked to be respectful", harness=rows)["verdict"] == REPRODUCED
    assert row("C10", "Asked to be biased", harness=rows)["verdict"] == DIRECTION
    assert row("C10", "Asked to be biased")["verdict"] == NOT_MEASURED


def test_a_handful_of_prompts_measures_nothing():
    rows = scorecard.scorecard(METRICS | {"prompts": 9, "reward_model": [], "tax": {"tasks": {}}})
    assert {row["verdict"] for row in rows} == {NOT_MEASURED}


def test_the_section_and_several_runs_side_by_side():
    rows = scorecard.scorecard(METRICS | {"model": "a|b"})
    text = "\n\n".join(scorecard.section({"scorecard": rows}))
    assert scorecard.tally(rows) in text
    assert (
        "| C4 | PPO against SFT: win rate | .62 | Fig. 1, 175B, read off | 0.640 [0.620, 0.660] | 800 | reproduced |"
        in text
    )
    assert "| C6 | PPO loses what GPT knew on a public task: difference (on facts) |" in text
    assert text.count("One run cannot show it") == 1
    assert "C2, C7, C8, C9: One run cannot show it" in text
    assert scorecard.section({}) == []
    table = scorecard.across({"seed 0": rows, "seed 1": scorecard.scorecard(METRICS | {"reward_model": []})})
    [line] = [line for line in table.splitlines() if line.startswith("| H9 |")]
    assert line.endswith("| .724 ± .004 | 0.700 [0.680, 0.720] reproduced | *not measured* |")
    assert len(table.splitlines()) == 2 + len(CLAIMS)


def test_the_model_and_the_judge_are_named():
    changes = {"judge": "reward_model", "model": "gpt2{x}", "judge_description": "a second reward model"}
    assert "here it is gpt2{x}, judged by a second reward model." in row("C4", "PPO against", **changes)["scale"]
