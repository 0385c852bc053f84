"""How the processes of a training share its batches: every optimizer step has the rows that it has on one process."""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import Trainer

from instructrl.trainers.sampler import LengthBuckets

Row = dict[str, Any]


class Shares(Sampler[list[int]]):
    """One process's micro-batches: a batch sampler.

    An optimizer step's rows are dealt out so that each of its micro-batches, on whichever process, has about as many
    tokens: all wait for the slowest. So they may differ in rows, and there is one on every process even where an
    epoch's last step has fewer rows than processes. It then reads one that is another's, and must not count: -1 - row.

    Args:
        sampler: the order of all rows, with their lengths and the batch size over all processes.
        processes: among how many.
        process: which one this is.
        micro_batches: of each process, an optimizer step.
    """

    def __init__(self, sampler: LengthBuckets, processes: int, process: int, micro_batches: int) -> None:
        self.sampler = sampler  # whose epoch the data loader sets
        self.processes, self.process, self.micro_batches = processes, process, micro_batches

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer where it skips what was trained on before."""
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.sampler), self.sampler.batch_size)
        return full * self.micro_batches + self.needed(rest)

    def needed(self, rows: int) -> int:
        """Micro-batches of each process for a step of so many rows."""
        return math.ceil(rows * self.micro_batches / self.sampler.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order, lengths, size = list(self.sampler), self.sampler.lengths, self.sampler.batch_size
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            dealt = deal(rows, [lengths[row] for row in rows], self.processes * self.needed(len(rows)))
            for own in dealt[self.process :: self.processes]:
                yield own or [-1 - rows[0]]


def deal(rows: Sequence[int], lengths: Sequence[int], parts: int) -> list[list[int]]:
    """The rows in so many parts of about equal length: the longest first, each to the part that is shortest so far."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    heap = [(0, part) for part in range(parts)]
    for length, row in sorted(zip(lengths, rows, strict=True), key=lambda pair: -pair[0]):
        total, part = heapq.heappop(heap)
        dealt[part].append(row)
        heapq.heappush(heap, (total + length, part))
    return dealt


class Counted(Dataset[Row]):
    """Rows by number; by a number below 0, that of `Shares`, one that does not count."""

    def __init__(self, rows: Sequence[Row], uncounted: Callable[[Row], Row]) -> None:
        self.rows, self.uncounted = rows, uncounted

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        return self.rows[number] if number >= 0 else self.uncounted(self.rows[-1 - number])


def train_dataloader(trainer: Trainer, sampler: LengthBuckets, uncounted: Callable[[Row], Row]) -> DataLoader:
    """A process's part of the trainer's rows.

    (Accelerate would deal out whole micro-batches in their order, and repeat rows until all have as many.)

    Args:
        uncounted: a row -> one like it that adds nothing to loss and gradient.
    """
    args = trainer.args
    rows = trainer._remove_unused_columns(trainer.train_dataset, description="training")
    loader = DataLoader(
        Counted(rows, uncounted),
        batch_sampler=Shares(sampler, args.world_size, args.process_index, args.gradient_accumulation_steps),
        collate_fn=trainer.data_collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
    )
    return prepare_data_loader(loader, args.device, num_processes=1, process_index=0, put_on_device=True)


def batch_size(trainer: Trainer) -> int:
    """Rows an optimizer step, over all processes."""
    args = trainer.args
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size
