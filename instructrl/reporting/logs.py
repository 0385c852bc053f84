"""What the trainers logged, as curves."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

Point = tuple[float, float]


@dataclass(frozen=True)
class Quantity:
    """One thing that a curve shows."""

    name: str  # of the chart's file
    title: str
    unit: str
    keys: tuple[str, ...]  # in the log, the first that is there


PPO = (
    Quantity("reward", "Reward", "before the KL penalty", ("objective/scores",)),
    Quantity("kl", "KL from the start", "nats a response", ("objective/kl",)),
    Quantity("length", "Length", "tokens a response", ("completions/mean_length",)),
    Quantity("entropy", "Entropy", "nats a response", ("objective/entropy",)),
    Quantity("eos", "EOS rate", "% of responses", ("val/num_eos_tokens",)),
    Quantity("ptx_loss", "Pretraining loss", "nats", ("loss/ptx",)),
    Quantity("grad_norm", "Policy's gradient norm", "before clipping", ("grad_norm",)),
    Quantity("ptx_grad_ratio", "Pretraining over PPO gradient", "ratio of norms", ("ptx/grad_ratio",)),
    Quantity("critic_grad_norm", "Critic's gradient norm", "before clipping", ("critic/grad_norm",)),
    Quantity("clip_fraction", "Clipped", "share of the tokens", ("policy/clipfrac_avg",)),
    Quantity("explained_variance", "Explained variance", "of the critic's returns", ("val/explained_var",)),
    Quantity("kl_coef", "KL coefficient", "beta", ("objective/kl_coef",)),
)
"""Of `ppo` and `ppo_ptx`, over episodes."""

SUPERVISED = (
    Quantity("loss", "Loss", "training loss", ("loss",)),
    Quantity("accuracy", "Accuracy", "share, in training", ("accuracy", "mean_token_accuracy")),
    Quantity("grad_norm", "Gradient norm", "before clipping", ("grad_norm",)),
)
"""Of the stages before PPO, over optimizer steps."""


def lines(path: Path | None) -> list[dict]:
    """The objects of a `log.jsonl`; [] without one. Half a line, which a kill leaves, is left out."""
    if path is None:
        return []
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def curve(logged: list[dict], quantity: Quantity, batch_size: int | None = None) -> list[Point]:
    """(place, value) of each line that has the quantity; a value that is no number is left out.

    The place is the episode where the log has it, else the optimizer step. EOS tokens become per cent of `batch_size`.
    """
    key = next((key for key in quantity.keys if any(key in line for line in logged)), None)
    scale = 100 / batch_size if quantity.name == "eos" and batch_size else 1.0
    points = []
    for line in logged:
        value, place = line.get(key), line.get("episode", line.get("step"))
        if is_number(value) and is_number(place):
            points.append((float(place), value * scale))
    return points


def is_number(value: object) -> TypeGuard[float]:
    """Whether it can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
