"""The trainers, usable without the command line: `from instructrl.trainers import PPOConfig, PPOTrainer`.

Nothing is imported before it is asked for: torch and transformers take seconds.
"""

import importlib
from typing import Any

EXPORTS = {
    "BestOfN": "selection",
    "Completion": "rollout",
    "KWiseRewardTrainer": "ranking",
    "MuonAdamW": "muon",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "RankingCollator": "ranking",
    "best_of_n": "selection",
    "generate": "rollout",
    "kl_bound": "selection",
    "kwise_loss": "losses",
}


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(EXPORTS)
