"""InstructGPT for real: SFT, a reward model from K-way rankings, PPO and PPO-ptx, and what alignment bought and cost."""

__version__ = "0.1.0"
