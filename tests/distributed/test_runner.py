"""Distributed tests cannot hang: a rank that raises ends the others at once, and so does the time limit."""

import time

import pytest
import torch.distributed as dist

from tests.helpers.distributed_runner import run_distributed


def one_raises_while_the_other_waits(rank):
    if rank == 1:
        raise RuntimeError("this is rank 1's own message")
    dist.barrier()


def all_wait_forever(rank):
    time.sleep(1000)


def sum_of_ranks(rank, start):
    import torch

    total = torch.tensor(start + rank)
    dist.all_reduce(total)
    return int(total)


def test_results_come_back_in_rank_order():
    assert run_distributed(sum_of_ranks, 3, 10) == [33, 33, 33]


def test_a_rank_that_raises_takes_the_others_down():
    begun = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 of 2 failed(.|\n)*this is rank 1's own message"):
        run_distributed(one_raises_while_the_other_waits, 2, timeout=100)
    assert time.monotonic() - begun < 60, "start-up included; the time limit is 100 s"


def test_the_time_limit_ends_all():
    with pytest.raises(AssertionError, match=r"ranks \[0, 1\] did not finish within 1 s"):
        run_distributed(all_wait_forever, 2, timeout=1)
