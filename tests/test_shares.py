"""How processes share a batch: all of its rows, each once, whatever their number, and about as many tokens each."""

import random

import pytest

from instructrl.trainers.sampler import LengthBuckets
from instructrl.trainers.shares import Counted, Shares, deal


def steps(order, processes, micro_batches):
    """What each optimizer step reads: of each process its micro-batches."""
    sampler = LengthBuckets(*order)
    shares = [list(Shares(sampler, processes, process, micro_batches)) for process in range(processes)]
    assert {len(batches) for batches in shares} == {len(Shares(sampler, processes, 0, micro_batches))}
    return [
        [batches[start : start + micro_batches] for batches in shares]
        for start in range(0, len(shares[0]), micro_batches)
    ]


@pytest.mark.parametrize(("processes", "micro_batches"), [(2, 1), (2, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("rows", [24, 25, 36, 47])
def test_every_step_has_the_rows_it_has_on_one_process(processes, micro_batches, rows):
    dice = random.Random(rows)
    order = ([dice.randint(1, 90) for _ in range(rows)], 12, 5)
    alone = list(LengthBuckets(*order))
    for number, shares in enumerate(steps(order, processes, micro_batches)):
        read = [row for share in shares for batch in share for row in batch]
        counted = sorted(row for row in read if row >= 0)
        assert counted == sorted(alone[number * 12 : (number + 1) * 12])
        assert all(batch for share in shares for batch in share)  # each process computes as often
        assert {-1 - row for row in read if row < 0} <= set(counted)


def test_the_order_of_an_epoch_is_its_own_and_can_be_skipped_to():
    sampler = LengthBuckets(list(range(40)), 8, 0)
    shares = Shares(sampler, 2, 1, 2)
    first = list(shares)
    shares.set_epoch(1)
    assert list(shares) != first
    shares.set_epoch(0)
    assert list(shares) == first


def test_rankings_are_dealt_out_by_tokens_not_by_rows():
    """K from 4 to 9, as in the paper: with as many rankings each, one process would read up to twice as much."""
    dice = random.Random(0)
    tokens = [dice.randint(4, 9) * dice.randint(50, 100) for _ in range(64)]
    rows = list(range(64))
    dealt = deal(rows, tokens, 8)
    assert sorted(row for part in dealt for row in part) == rows
    of_parts = [sum(tokens[row] for row in part) for part in dealt]
    assert max(of_parts) < 1.03 * min(of_parts)
    by_rows = [sum(tokens[row] for row in rows[part::8]) for part in range(8)]
    assert max(by_rows) > 1.1 * min(by_rows)
    assert deal([0, 1, 2, 3], [9, 3, 3, 3], 2) == [[0], [1, 2, 3]]


def test_a_row_that_does_not_count_is_read_through():
    rows = Counted([{"n": 0}, {"n": 1}], lambda row: row | {"counts": False})
    assert (rows[1], rows[-2]) == ({"n": 1}, {"n": 1, "counts": False})
    assert len(rows) == 2
