"""Our PPO beside TRL 1.12's on the same tokens: where they agree, and what each difference is and how large.

`make parity` prints the table. Everything is float32, so "agree" means within rounding: TOLERANCE.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("trl.experimental.ppo", reason="this trl has no PPOTrainer: see make parity", exc_type=ImportError)

import tiny_models as tiny
import twins
from rich.console import Console
from rich.table import Table
from torch import nn
from twins import CORRECTIONS, EPISODES, EXPERIENCE, WEIGHTS, Twins

from instructrl.stages import trl_ppo
from instructrl.trainers import losses

TOLERANCE = 1e-5
"""Absolute, of numbers from 0.01 to 20. The learning rates are 1e-3 and 2e-3, which is what Adam's first step moves a
weight by, so weights agree to a hundredth of a step."""
LOGGED = (
    "loss",
    "loss/policy_avg",
    "loss/value_avg",
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "objective/non_score_reward",
    "objective/rlhf_reward",
    "policy/approxkl_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
    "val/ratio",
    "val/num_eos_tokens",
    "completions/mean_length",
    "episode",
    "lr",
)
ALL = (*EXPERIENCE, *LOGGED, *WEIGHTS)
SHAPES = [(1, 1), (4, 1), (1, 3), (4, 3)]  # minibatches, epochs


class Report:
    """The table: for each quantity the case in which the two trainers differ most."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[float, float, float, str]] = {}

    def add(self, quantity: str, ours: float, trls: float, difference: float, verdict: str = "agree") -> None:
        if quantity not in self.rows or self.rows[quantity][2] < difference:
            self.rows[quantity] = (ours, trls, difference, verdict)

    def show(self, console: Console) -> None:
        table = Table(title="Our PPO and TRL 1.12's on the same weights, prompts and tokens")
        for column in ("quantity", "ours", "TRL", "largest difference", "verdict"):
            table.add_column(column, justify="left" if column in ("quantity", "verdict") else "right", overflow="fold")
        for quantity, (ours, trls, difference, verdict) in self.rows.items():
            table.add_row(quantity, f"{ours:.6g}", f"{trls:.6g}", f"{difference:.1e}", verdict)
        console.print(table)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest) -> Iterator[Report]:
    found = Report()
    yield found
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        found.show(Console(width=150))


def agree(report: Report, pair: Twins, quantities=ALL) -> None:
    for quantity in quantities:
        found = pair.difference(quantity)
        report.add(quantity, *found)
        assert found[2] < TOLERANCE, quantity


# ---- where they agree ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("minibatches", "epochs"), SHAPES)
def test_responses_that_never_end(report, tmp_path, architecture, minibatches, epochs):
    """There is no token after EOS, so TRL's reward is where ours is."""
    others = [name for name in CORRECTIONS if name != "score after EOS"]
    shape = {"num_mini_batches": minibatches, "num_ppo_epochs": epochs}
    pair = Twins(tmp_path, architecture, ending=False, corrections=others, **shape)
    assert not pair.episodes.ended.any()
    assert pair.optimizer_steps == minibatches * epochs
    agree(report, pair)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("minibatches", "epochs"), SHAPES)
def test_responses_that_end(report, tmp_path, architecture, minibatches, epochs):
    """With TRL's line about the token after EOS corrected, all is the same."""
    shape = {"num_mini_batches": minibatches, "num_ppo_epochs": epochs}
    pair = Twins(tmp_path, architecture, **shape)
    assert EPISODES // 4 <= int(pair.episodes.ended.sum()) < EPISODES
    agree(report, pair)
    moved = pair.moved()
    assert min(moved) > 50 * TOLERANCE  # there was something to agree about


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_whitened_rewards(report, tmp_path, architecture):
    pair = Twins(tmp_path, architecture, whiten_rewards=True)
    agree(report, pair)


def test_the_papers_settings(report, tmp_path):
    """Temperature and discount 1, beta 0.02, and no clipping."""
    paper = {"temperature": 1.0, "gamma": 1.0, "lam": 0.95, "kl_coef": 0.02, "max_grad_norm": 1e9}
    agree(report, Twins(tmp_path, "gpt2", **paper))


# ---- where they differ -----------------------------------------------------------------------------------------------


def uncorrected(tmp_path, name: str, **options) -> Twins:
    """TRL with every correction but this one."""
    return Twins(tmp_path, "gpt2", corrections=[other for other in CORRECTIONS if other != name], **options)


def test_the_score_sits_after_eos(report, tmp_path):
    pair = uncorrected(tmp_path, "score after EOS")
    agree(report, pair, ("log-probs", "reference log-probs", "values", "scores", "objective/rlhf_reward"))
    for quantity in ("rewards", "advantages", "loss/value_avg", *WEIGHTS):
        found = pair.difference(quantity)
        verdict = "TRL rewards the token after EOS, and the critic learns a value there; that line corrected: agree"
        report.add(f"{quantity} (as TRL has it)", *found, verdict)
        assert found[2] > 100 * TOLERANCE
    # Only responses that ended are concerned, and TRL's reward on EOS itself is the KL penalty alone.
    ended = pair.episodes.ended
    ours, trls = pair.ours.tensors["rewards"], pair.trls.tensors["rewards"]
    last = pair.mask.sum(1) - 1
    short = ended & (last + 1 < pair.mask.shape[1])
    assert twins.largest(ours[~short], trls[~short]) < TOLERANCE
    moved = trls[short].gather(1, last[short, None] + 1)[:, 0]
    assert twins.largest(moved, pair.ours.tensors["scores"][short]) < TOLERANCE
    # With the score there and an episode one token longer, our GAE gives TRL's advantages.
    longer = pair.mask.clone()
    longer[short, last[short] + 1] = True
    values = pair.trls.tensors["values"]
    advantages, _ = losses.gae(trls * longer, values, longer, pair.section.gamma, pair.section.lam)
    whitened = losses.masked_whiten(advantages, pair.mask)
    assert twins.largest(whitened[pair.mask], pair.trls.tensors["advantages"][pair.mask]) < TOLERANCE


def test_the_variance_is_a_samples(report, tmp_path):
    pair = uncorrected(tmp_path, "sample variance")
    tokens = int(pair.mask.sum())
    ours, trls = (side.tensors["advantages"][pair.mask].std().item() for side in (pair.ours, pair.trls))
    verdict = f"TRL divides by N - 1, we by N = {tokens} tokens; undone: agree"
    report.add("advantages' standard deviation", ours, trls, pair.difference("advantages")[2], verdict)
    assert trls / ours == pytest.approx(((tokens - 1) / tokens) ** 0.5, abs=1e-6)


def test_statistics_count_padding(report, tmp_path):
    pair = uncorrected(tmp_path, "statistics of padding", num_ppo_epochs=3)
    share = pair.mask.float().mean().item()
    for quantity, empty in (("policy/approxkl_avg", 0.0), ("val/ratio", 1.0)):
        ours, trls, difference = pair.difference(quantity)
        verdict = f"TRL averages over padding, too: {1 - share:.0%} of the slots; logged as trl/{quantity}"
        report.add(f"{quantity} (as TRL logs it)", ours, trls, difference, verdict)
        assert trls == pytest.approx(share * ours + (1 - share) * empty, abs=1e-6)


def test_the_score_is_logged_after_the_penalty(report, tmp_path):
    pair = Twins(tmp_path, "gpt2")
    trls = pair.trls.tensors["scores"].mean().item()
    ours = pair.ours.log["objective/scores"]
    unended = 1 - pair.episodes.ended.float().mean().item()
    verdict = f"TRL's has the penalty of 1.5 in it, for {unended:.0%} without EOS; the stage takes it out"
    report.add("objective/scores (as TRL logs it)", ours, trls, abs(ours - trls), verdict)
    assert ours - trls == pytest.approx(1.5 * unended, abs=TOLERANCE)


def test_padding_can_be_sampled(report, tmp_path):
    """TRL without the stage's mask: the padding token takes probability, in sampling and in every log-probability."""
    unmasked = (trl_ppo, "without_padding", lambda *_: nullcontext())
    pair = Twins(tmp_path, "gpt2", patches=[unmasked])
    found = pair.difference("log-probs")
    verdict = "TRL may sample padding, which it then takes for the response's end; the stage masks it"
    report.add("log-probs without the stage's mask", *found, verdict)
    assert (pair.trls.tensors["log-probs"] - pair.ours.tensors["log-probs"])[pair.mask].max() < TOLERANCE
    assert found[2] > 0.01


def test_gradients_are_not_clipped(report, tmp_path):
    unclipped = (trl_ppo, "clip_grad_norm_", lambda *_: None)
    pair = Twins(tmp_path, "gpt2", patches=[unclipped], max_grad_norm=1e-5)
    for quantity in WEIGHTS:
        found = pair.difference(quantity)
        verdict = "TRL never reads max_grad_norm (here 1e-5); the stage clips in the optimizer"
        report.add(f"{quantity} without the stage's clipping", *found, verdict)
        assert found[2] > 50 * TOLERANCE
    agree(report, Twins(tmp_path, "gpt2", max_grad_norm=1e-5), WEIGHTS)


def test_the_optimizer_is_another(report, tmp_path):
    """TRL's own: one learning rate, beta2 0.999, epsilon 1e-8. (Its schedule falls to 0 in the end.)"""

    def own(section, policy: nn.Module, critic: nn.Module) -> torch.optim.AdamW:
        return torch.optim.AdamW([*policy.parameters(), *critic.parameters()], lr=section.learning_rate)

    pair = Twins(tmp_path, "gpt2", patches=[(trl_ppo, "make_optimizer", own)])
    for quantity in WEIGHTS:
        found = pair.difference(quantity)
        verdict = "TRL has one learning rate, unclipped, with AdamW's defaults; the stage passes it our optimizer"
        report.add(f"{quantity} with TRL's optimizer", *found, verdict)
        assert found[2] > 50 * TOLERANCE


def test_accumulation_swallows_minibatches(report, tmp_path):
    """4 minibatches of 4 episodes in micro-batches of 8, 2 epochs: 8 steps, TRL makes half as many, and of others."""
    shape = {"num_mini_batches": 4, "num_ppo_epochs": 2}
    halves = (trl_ppo, "micro_batches", lambda *_: (8, 2))
    pair = Twins(tmp_path, "gpt2", patches=[halves], **shape)
    expected = 4 * 2
    verdict = "TRL counts micro-batches in place of minibatches; the stage refuses the combination"
    report.add("optimizer steps under accumulation", expected, pair.optimizer_steps, 4, verdict)
    assert pair.optimizer_steps == expected // 2
    assert Twins(tmp_path, "gpt2", **shape).optimizer_steps == expected


def test_the_loss_depends_on_the_micro_batches(report, tmp_path):
    """One minibatch in four micro-batches: ours is still a mean over the minibatch's tokens. Both make one step, TRL
    because the stage keeps accelerate from stepping at every micro-batch of a pass's last batch."""
    whole = Twins(tmp_path, "gpt2", vf_coef=0.1)
    cut = Twins(tmp_path, "gpt2", vf_coef=0.1, max_tokens=4 * (16 + 8))
    ours, trls = (
        twins.largest(side(cut).tensors["critic weights"], side(whole).tensors["critic weights"])
        for side in (lambda pair: pair.ours, lambda pair: pair.trls)
    )
    verdict = "TRL's loss is a mean over means, so it depends on how a minibatch is cut; ours does not"
    report.add("critic weights, one forward pass or four", ours, trls, abs(trls - ours), verdict)
    assert cut.optimizer_steps == 1
    assert ours < TOLERANCE
    assert trls > TOLERANCE
