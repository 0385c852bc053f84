"""Work in forked processes: the same results in the same order, from other processes."""

import os

import pytest
import torch

from instructrl.stages.parallel import forked

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_results_are_in_order_and_closures_need_no_pickling():
    weights = torch.arange(4.0)

    def work(item: int) -> tuple[int, float]:
        return os.getpid(), (weights * item).sum().item()

    found = forked(work, {3: "", 1: "", 2: ""}, 2, CPU)
    assert [value for _, value in found] == [18.0, 6.0, 12.0]
    assert os.getpid() not in {process for process, _ in found}


@pytest.mark.parametrize(("items", "processes", "threads"), [([1], 2, 1), ([1, 2], 1, 1), ([1, 2], 2, 2)])
def test_it_stays_here_where_forking_would_not_help(items, processes, threads):
    torch.set_num_threads(threads)
    assert forked(lambda _: os.getpid(), items, processes, CPU) == [os.getpid()] * len(items)


def test_what_fails_there_is_raised_here():
    def work(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        forked(work, [1, 0], 2, CPU)
    assert forked(lambda item: item, [1, 2], 2, CPU) == [1, 2]
