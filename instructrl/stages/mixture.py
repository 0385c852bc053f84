"""How many rows of each source a mix takes."""

from collections.abc import Sequence
from fractions import Fraction


def quotas(counts: Sequence[int], weights: Sequence[float]) -> list[int]:
    """The rows of each source in the largest mix that honours the weights without repeating a row.

    The source that is scarcest for its weight gives all its rows, each other one in proportion, rounded down.

    Args:
        counts: [sources] rows that each source has.
        weights: [sources] above 0, on any scale.

    Example:
        >>> quotas([1000, 1000, 50], [2, 1, 1])
        [100, 50, 50]
    """
    if len(counts) != len(weights):
        raise ValueError(f"{len(counts)} sources, but {len(weights)} weights")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights must be above 0: {list(weights)}")
    # As written in the recipe: 0.1 is one tenth, not the nearest binary fraction, which would round a row away.
    exact = [Fraction(str(weight)) for weight in weights]
    scale = min((Fraction(count) / weight for count, weight in zip(counts, exact, strict=True)), default=Fraction(0))
    return [int(scale * weight) for weight in exact]
