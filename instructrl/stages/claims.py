"""The paper's claims, checked on one run: each with its number, its interval and a verdict.

A claim holds if its whole 95 % interval is on the claimed side, does not hold if the whole interval is on the other,
and is undecided if the interval contains the border. Nothing is corrected for the number of claims,
nor, where a claim is about some task, for the number of tasks.
"""

from collections.abc import Sequence

from instructrl.stages.winrate import Interval

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"


def claim(text: str, number: Interval, border: float, above: bool = True) -> dict:
    """`text` claims that `number` is above (or below) `border`."""
    low, high = (number.low - border, number.high - border) if above else (border - number.high, border - number.low)
    verdict = HOLDS if low > 0 else FAILS if high < 0 else UNDECIDED
    return {"claim": text, "number": list(number), "border": border, "verdict": verdict}


def order(win_rates: dict[str, Interval], prompted_over_gpt: Interval | None) -> list[dict]:
    """GPT < GPT (prompted) < SFT < PPO, and SFT < PPO-ptx (paper, Fig. 1 and 3). Win rates are against SFT."""
    checked = []
    if prompted_over_gpt:
        text = "GPT < GPT (prompted): difference of their win rates against SFT"
        checked.append(claim(text, prompted_over_gpt, 0.0))
    if "gpt_prompted" in win_rates:
        below = win_rates["gpt_prompted"]
        checked.append(claim("GPT (prompted) < SFT: win rate of GPT (prompted) against SFT", below, 0.5, above=False))
    for name, title in (("ppo", "PPO"), ("ppo_ptx", "PPO-ptx")):
        if name in win_rates:
            checked.append(claim(f"SFT < {title}: win rate of {title} against SFT", win_rates[name], 0.5))
    return checked


def reward_model(accuracy: Interval, same_accuracy: Interval | None, agreement: Interval | None) -> list[dict]:
    """Held-out accuracy above .6, and below the labelers' own agreement (paper, 3.4 and 4.1: 72.4 and 72.6 %).

    `same_accuracy`: on the rankings on which the agreement was measured.
    """
    checked = [claim("The reward model's accuracy on held-out rankings is above .6", accuracy, 0.6)]
    if same_accuracy and agreement:
        text = f"The reward model's accuracy is below the labelers' agreement ({agreement})"
        apart = agreement.low - same_accuracy.high, same_accuracy.low - agreement.high
        verdict = HOLDS if apart[0] > 0 else FAILS if apart[1] > 0 else UNDECIDED
        border = round(agreement.mean, 3)
        checked.append({"claim": text, "number": list(same_accuracy), "border": border, "verdict": verdict})
    return checked


def tax(what: str, changes: Sequence[tuple[str, Interval, Interval, Interval]]) -> dict:
    """On some task PPO is worse than SFT or than GPT, and PPO-ptx better than PPO (paper, 4.2 and Fig. 28).

    Args:
        what: the claim, in words, before the name of the task that shows it most clearly.
        changes: for each task its name, PPO - GPT, PPO - SFT, PPO-ptx - PPO, all so that more is better.
    """

    def clear(gap: tuple[str, Interval, Interval, Interval]) -> float:
        _, from_gpt, from_sft, back = gap
        return min(max(-from_gpt.high, -from_sft.high), back.low)

    name, from_gpt, from_sft, back = best = max(changes, key=clear)
    if clear(best) > 0:
        verdict = HOLDS
    elif any(min(max(-gpt.low, -sft.low), back.high) > 0 for _, gpt, sft, back in changes):
        verdict = UNDECIDED
    else:
        verdict = FAILS
    since, loss = ("SFT", from_sft) if -from_sft.high > -from_gpt.high else ("GPT", from_gpt)
    text = f"{what}; most clearly on {name}: PPO {loss.mean:+.3f} [{loss.low:+.3f}, {loss.high:+.3f}] against {since}, "
    return {"claim": text + "PPO-ptx against PPO", "number": list(back), "border": 0.0, "verdict": verdict}
