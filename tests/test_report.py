"""The report's text: numbers as people read them, verdicts that follow the intervals, and samples that stay samples."""

import re

import pytest

from instructrl.stages import claims, report
from instructrl.stages.winrate import Interval

HOSTILE = (
    "| a | b |\n```\n# Title\n<script>alert(1)</script> [x](javascript:y) ![i](http://e) `code` \x1b[31m \u202e*bold*"
)


@pytest.mark.parametrize(
    ("interval", "border", "above", "verdict"),
    [
        ((0.6, 0.55, 0.65), 0.5, True, claims.HOLDS),
        ((0.6, 0.49, 0.7), 0.5, True, claims.UNDECIDED),
        ((0.4, 0.35, 0.45), 0.5, True, claims.FAILS),
        ((0.4, 0.35, 0.45), 0.5, False, claims.HOLDS),
        ((0.6, 0.55, 0.65), 0.5, False, claims.FAILS),
        ((0.5, 0.5, 0.5), 0.5, True, claims.UNDECIDED),
    ],
)
def test_verdicts(interval, border, above, verdict):
    assert claims.claim("x", Interval(*interval), border, above)["verdict"] == verdict


def test_reward_model_claims():
    low, high = Interval(0.65, 0.62, 0.68), Interval(0.75, 0.7, 0.8)
    assert [c["verdict"] for c in claims.reward_model(low, low, high)] == [claims.HOLDS, claims.HOLDS]
    assert [c["verdict"] for c in claims.reward_model(high, high, low)] == [claims.HOLDS, claims.FAILS]
    assert [c["verdict"] for c in claims.reward_model(low, None, None)] == [claims.HOLDS]


def test_the_verdicts_in_a_sentence():
    holds, fails = {"verdict": claims.HOLDS}, {"verdict": claims.UNDECIDED}
    assert report.verdicts([holds, holds]) == "All 2 of the paper's claims that were checked hold."
    assert report.verdicts([holds, fails]).startswith("1 of 2 claims do not hold or are undecided")
    assert "Too few" in report.verdicts([])


def gap(low, high):
    return Interval((low + high) / 2, low, high)


def test_the_tax_claim_needs_a_loss_and_a_gain_on_the_same_task():
    flat, loss, gain = gap(-0.1, 0.1), gap(-0.3, -0.1), gap(0.05, 0.2)
    both = claims.tax("tax", [("sums", flat, flat, gain), ("facts", flat, loss, gain)])
    assert both["verdict"] == claims.HOLDS
    assert "most clearly on facts" in both["claim"]
    assert "against SFT" in both["claim"]
    assert both["number"] == list(gain)
    apart = claims.tax("tax", [("sums", gap(0.1, 0.2), gap(0.1, 0.2), gain), ("facts", loss, loss, gap(-0.2, -0.1))])
    assert apart["verdict"] == claims.FAILS
    assert claims.tax("tax", [("sums", flat, flat, flat)])["verdict"] == claims.UNDECIDED


def test_numbers_as_people_read_them():
    assert report.shares([0.6, 0.555, 1.0]) == ".600 [.555, 1.000]"
    assert report.shares(None) == "-"
    assert report.signed([-0.0214, -0.04, 0.0021]) == "-.021 [-.040, +.002]"
    assert report.signed([10.5, -1.0, 20.25]) == "+10.500 [-1.000, +20.250]"


def test_cells_show_text_as_it_is():
    assert report.cell("GPT < GPT (prompted)") == "GPT < GPT (prompted)"
    shown = report.cell(HOSTILE)
    assert "\n" not in shown
    assert not re.search(r"<\w", shown)
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    for mark in "|`*[]#!":
        assert not re.search(rf"(?<!\\)\{mark}", shown.replace("!\\[", "")), mark
    assert len(re.split(r"(?<!\\)\|", report.grid(["a", "b"], [[HOSTILE, "x"]]).splitlines()[2])) == 4


def test_samples_cannot_leave_their_block():
    """Whatever a model writes, the only lines outside of code blocks are ours."""
    given = {"GPT": HOSTILE, "SFT (beats SFT)": "`````\nout\n~~~\n", "PPO": "x" * 2_000, "PPO-ptx": ""}
    text = "\n\n".join(report.sample_section([{"prompt": HOSTILE, "category": "<b>|`", "answers": given}]))
    outside, fence = [], None
    for line in text.splitlines():
        marker = re.match(r" {0,3}(`{3,})", line)
        if fence is None and marker:
            fence = marker[1]
        elif fence and marker and len(marker[1]) >= len(fence) and line.strip() == marker[1]:
            fence = None
        elif fence is None:
            outside.append(line)
    assert fence is None
    assert [line for line in outside if line.strip()] == [
        "## Side by side",
        "The first held-out prompts of each kind, as sampled; nothing is picked.",
        "### 1. &lt;b>\\|\\`",
    ]
    assert "\\u001b[31m" in text
    assert "... (2000 characters)" in text
    assert "\x1b" not in text
