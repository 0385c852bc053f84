"""The models that an evaluation compares, and what a reader calls them."""

NAMES = {
    "gpt": "GPT",
    "gpt_prompted": "GPT (prompted)",
    "sft": "SFT",
    "ppo": "PPO",
    "ppo_ptx": "PPO-ptx",
}
"""The five models, in the paper's order, and how a reader knows them."""

BASELINE = "sft"
BEST = "best_of_n"

GREEDY = 0.0
"""The temperature that every report shows beside the recipe's."""
