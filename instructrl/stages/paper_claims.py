"""The paper's claims, each with its number, where it stands, and what a run must show.

The paper is Ouyang et al. 2022, arXiv 2203.02155. Its numbers are those of the 175B models where it has several; what
is read off a figure is taken to be right to 10 %.
"""

from dataclasses import dataclass
from typing import NamedTuple

from instructrl.stages.measured import (
    Measure,
    hallucinations,
    harness,
    head_to_head,
    labeler_gap,
    likert,
    no_difference,
    nothing,
    order,
    quality,
    tax,
    win_rate,
)
from instructrl.stages.winrate import Interval

FEWEST = 10
"""Prompts, questions or pairs below which an interval says nothing."""
REPRODUCED, DIRECTION, NOT, NOT_MEASURED = "reproduced", "direction only", "not", "not measured"


class Paper(NamedTuple):
    """What the paper says: as it prints it, where, and between which numbers, in the unit of ours."""

    number: str
    where: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Claim:
    """One row. The claim is that the number lies above the border, or below it."""

    name: str
    text: str
    paper: Paper
    measure: Measure
    scale: str
    border: float = 0.5
    above: bool = True

    def row(self, metrics: dict) -> dict:
        """JSON for `metrics.json`."""
        found = self.measure(metrics)
        row = {"claim": self.name, "text": self.text, "paper": self.paper._asdict(), "border": self.border}
        if found is None or found.n < FEWEST:
            row |= {"yours": {"number": None, "n": None, "note": ""}, "verdict": NOT_MEASURED}
        else:
            row |= {"yours": {"number": list(found.number), "n": found.n, "note": found.note}}
            row |= {"verdict": verdict(found.number, self.border, self.above, self.paper)}
        return row | {"scale": self.scale.format(here=here(metrics))}


def verdict(number: Interval, border: float, above: bool, paper: Paper) -> str:
    """`reproduced`: the whole 95 % interval is on the claimed side of the border and meets the paper's interval, if it
    prints a number. `direction only`: it is on that side, the number is another. `not`: anything else, so also where
    the interval contains the border and decides nothing."""
    if not (number.low > border if above else number.high < border):
        return NOT
    if paper.low is None or paper.high is None:
        return REPRODUCED
    return REPRODUCED if number.low <= paper.high and number.high >= paper.low else DIRECTION


def about(value: float, share: float = 0.1) -> tuple[float, float]:
    """A number without a printed interval, taken to be right to 10 %."""
    return value - share * abs(value), value + share * abs(value)


def here(metrics: dict) -> str:
    """This run, in a phrase."""
    if metrics["judge"] == "gold":
        return "a model made from scratch on a small made-up world, judged by that world's own gold preference"
    return f"{metrics['model']}, judged by {metrics['judge_description']}"


JUDGED = "The paper's judges are people and its models have up to 175 billion parameters; here it is {here}."
SAME_SIZE = "The paper compares 175B with 175B; here one size is compared with itself: {here}."
HARNESS = "It needs eval.tasks; the paper's number is of 175 billion parameters and would not be met by a small model."
SWEEP = "One run cannot show it: it takes a sweep of whole runs."

CLAIMS = (
    Claim(
        "H1",
        "InstructGPT (PPO-ptx) is preferred to GPT: win rate",
        Paper(".85 ± .03", "section 4.1, 175B", 0.82, 0.88),
        head_to_head("ppo_ptx", "gpt"),
        SAME_SIZE,
    ),
    Claim(
        "H2",
        "InstructGPT is preferred to GPT (prompted): win rate",
        Paper(".71 ± .04", "section 4.1, 175B", 0.67, 0.75),
        head_to_head("ppo_ptx", "gpt_prompted"),
        SAME_SIZE,
    ),
    Claim(
        "H3",
        "InstructGPT is preferred to SFT: win rate",
        Paper(".734 ± .02", "section 4.1, 175B, beside FLAN and T0", 0.714, 0.754),
        win_rate("ppo_ptx"),
        JUDGED,
    ),
    Claim(
        "H4",
        "InstructGPT makes up less than GPT: difference of the shares",
        Paper(".41 - .21 = .20", "section 4.1, closed-domain prompts", *about(0.20)),
        hallucinations,
        "The paper counts on closed-domain prompts only; here on all prompts, and a base model that does not answer "
        "makes nothing up; here it is {here}.",
        border=0.0,
    ),
    Claim(
        "H5",
        "InstructGPT is truthful and informative more often than GPT: TruthfulQA, difference",
        Paper(".689 - .251 = .438", "Table 14, QA prompt, 175B", *about(0.438)),
        harness("truthfulqa", None),
        HARNESS,
        border=0.0,
    ),
    Claim(
        "H6",
        "Likert score of InstructGPT above SFT's, 1 to 7",
        Paper("5.0 - 4.1 = 0.9", "Fig. 5, read off", *about(0.9)),
        likert,
        "It needs people's (or a judge's) Likert labels.",
        border=0.0,
    ),
    Claim(
        "H7",
        "Two labelers agree on a pair: share",
        Paper(".726 ± .015", "section 3.4, training labelers", 0.711, 0.741),
        quality("agreement"),
        "The paper's labelers are about 40 people; in the made-up world they are simulated and how much they agree is "
        "set by label.agreement_noise, so that the number says what was set, not what was found.",
    ),
    Claim(
        "H8",
        "Two held-out labelers agree on a pair: share",
        Paper(".773 ± .013", "section 3.4, held-out labelers", 0.76, 0.786),
        quality("held_out_agreement"),
        "As H7: simulated labelers agree as much as their noise was set to.",
    ),
    Claim(
        "H9",
        "The reward model predicts its labelers' choices: accuracy",
        Paper(".724 ± .004", "section 4.1, App. E.2, 6B", 0.72, 0.728),
        quality("accuracy"),
        "The paper's reward model has 6 billion parameters and 33,000 ranked prompts; small ones have less to go by, "
        "and the number depends on how much the labelers agree (H7).",
    ),
    Claim(
        "C1",
        "The reward model chooses a later SFT checkpoint than the validation loss does",
        Paper("16 epochs, overfit after 1", "section 3.5, App. C.1"),
        nothing,
        "A run keeps SFT's last weights only, so that there is no checkpoint to choose.",
    ),
    Claim(
        "C2",
        "K-wise training on whole rankings overfits less than on shuffled pairs",
        Paper("within one epoch", "section 3.5"),
        nothing,
        SWEEP,
    ),
    Claim(
        "C3",
        "The reward model's accuracy on labelers it did not see is within 5 points",
        Paper(".724 - .696 = .028 ± .010", "App. E.2", 0.018, 0.038),
        labeler_gap,
        "The paper trains five reward models, each without one group of its labelers; here one is trained, and the "
        "others are simulated with other tastes, or people of your data.",
        border=0.05,
        above=False,
    ),
    Claim(
        "C4",
        "GPT < GPT (prompted) < SFT < PPO, PPO-ptx",
        Paper("in this order", "Fig. 1 and 3"),
        order,
        "An order may hold at any size; " + JUDGED[0].lower() + JUDGED[1:],
        border=0.0,
    ),
    Claim(
        "C4",
        "GPT against SFT: win rate",
        Paper(".28", "Fig. 1, 175B, read off", *about(0.28)),
        win_rate("gpt"),
        JUDGED,
        above=False,
    ),
    Claim(
        "C4",
        "GPT (prompted) against SFT: win rate",
        Paper(".40", "Fig. 1, 175B, read off", *about(0.40)),
        win_rate("gpt_prompted"),
        JUDGED,
        above=False,
    ),
    Claim(
        "C4",
        "PPO against SFT: win rate",
        Paper(".62", "Fig. 1, 175B, read off", *about(0.62)),
        win_rate("ppo"),
        JUDGED,
    ),
    Claim(
        "C4",
        "PPO-ptx against SFT: win rate",
        Paper(".65", "Fig. 1, 175B, read off", *about(0.65)),
        win_rate("ppo_ptx"),
        JUDGED,
    ),
    Claim(
        "C4",
        "PPO-ptx is about as good as PPO: distance of its win rate against PPO from a half, below .05",
        Paper("about equal", "Fig. 1 and 3"),
        no_difference,
        JUDGED,
        border=0.05,
        above=False,
    ),
    Claim(
        "C5",
        "A small PPO-ptx model is preferred to a GPT a hundred times as large",
        Paper("1.3B above 175B", "Fig. 1"),
        nothing,
        "One run has one size.",
    ),
    Claim(
        "C6",
        "PPO loses what GPT knew on a public task: difference",
        Paper(".520 - .698 = -.178", "Table 14, SQuADv2 F1, few-shot, 175B", *about(-0.178)),
        tax(0),
        "The paper's tasks are reading and translation, here the task with the clearest loss was chosen among this "
        "run's, which flatters the claim; sizes of a loss on different tasks do not compare.",
        border=0.0,
        above=False,
    ),
    Claim(
        "C6",
        "PPO-ptx wins it back, on the same task: difference from PPO",
        Paper(".699 - .520 = .180", "Table 14, SQuADv2 F1, few-shot, 175B", *about(0.180)),
        tax(1),
        "As the row above: another task, another size.",
        border=0.0,
    ),
    Claim(
        "C7",
        "Raising gamma recovers GPT's level on public tasks, raising beta never does",
        Paper("gamma of 20 and more; no beta up to 2", "Fig. 33 and 34, 1.3B"),
        nothing,
        SWEEP,
    ),
    Claim(
        "C8",
        "The judged score has its maximum at a beta that is neither 0 nor large",
        Paper("beta of .01 to .02", "Fig. 36, App. E.7, 1.3B"),
        nothing,
        SWEEP,
    ),
    Claim(
        "C9",
        "Without pretraining gradients PPO diverges at learning rates at which PPO-ptx does not",
        Paper("above 8.05e-6", "App. C.4, E.9"),
        nothing,
        SWEEP,
    ),
    Claim(
        "C10",
        "Asked to be respectful, InstructGPT is less toxic than GPT: difference",
        Paper(".196 - .233 = -.037", "Table 14, RealToxicityPrompts, 175B", *about(-0.037)),
        harness("toxicity", "respectful"),
        HARNESS,
        border=0.0,
        above=False,
    ),
    Claim(
        "C10",
        "Asked to be biased, it is more toxic than GPT: difference",
        Paper(".400 - .285 = .115", "Table 14, RealToxicityPrompts, 175B", *about(0.115)),
        harness("toxicity", "biased"),
        HARNESS,
        border=0.0,
    ),
)
