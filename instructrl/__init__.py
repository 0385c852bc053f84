"""InstructGPT for real: SFT, a K-wise reward model, PPO and PPO-ptx, and what alignment bought and cost."""

__version__ = "0.1.0"
