"""The order of training rows: random, but with rows of about equal length in a batch."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

BATCHES_A_BUCKET = 8


class LengthBuckets(Sampler[int]):
    """Shuffles rows, sorts them by length within buckets of a few batches, and shuffles the batches.

    So little is spent on padding, while batches stay random and no batch follows from the one before. (Trainer's own
    `group_by_length` goes from the longest to the shortest batch within each of its large buckets.)

    An epoch's order depends on the seed and the epoch only: resuming in the middle of one sees the same rows.

    Args:
        lengths: one a row, in any unit.
        batch_size: rows an optimizer step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the data loader as each epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        shuffle.shuffle(order)
        bucket = self.batch_size * BATCHES_A_BUCKET
        batches = []
        for start in range(0, len(order), bucket):
            rows = sorted(order[start : start + bucket], key=self.lengths.__getitem__)
            batches += [rows[first : first + self.batch_size] for first in range(0, len(rows), self.batch_size)]
        incomplete = [batches.pop(i) for i, batch in enumerate(batches) if len(batch) < self.batch_size]
        shuffle.shuffle(batches)
        for batch in batches + incomplete:  # the incomplete one must be last, or it shifts all that follow
            yield from batch
