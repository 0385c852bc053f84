"""The coefficient of the KL penalty: fixed, as in the paper, or controlled."""

from dataclasses import dataclass

PROPORTIONAL_ERROR = 0.2  # the most by which an error counts, as a share of the target


@dataclass
class KLController:
    """beta in eq. 2 (section 3.5). With a target it follows Ziegler et al. 2019, arXiv 1909.08593, section 2.2:

        e = clip((KL - target) / target, -0.2, 0.2),   beta <- beta * (1 + e * episodes / horizon)

    Args:
        coef: beta at first.
        target: nats a response; None keeps beta where it is, as the paper does.
        horizon: episodes; with the published 10,000 and 512 episodes an iteration, beta moves by at most 1 % in each.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """`kl`: nats a response, the mean over this iteration's `episodes` (of all processes)."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -PROPORTIONAL_ERROR), PROPORTIONAL_ERROR)
            self.coef *= 1 + error * episodes / self.horizon
