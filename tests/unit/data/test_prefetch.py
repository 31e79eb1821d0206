"""Batches that are made ahead are the loader's."""

import threading

import pytest
import torch

from megatron_sstoken.data.prefetch import Prefetcher
from tests.helpers.token_batches import TURNS, make_batch


class Loader:
    """Three global batches; notes in which thread they are made."""

    num_batches = 3

    def __init__(self):
        self.made: list[tuple[int, threading.Thread]] = []

    def load(self, number):
        self.made.append((number, threading.current_thread()))
        if number == 2:
            raise OSError("the disk is gone")
        return [make_batch(TURNS, 8, seed=number)]

    def num_samples_before(self, number):
        return 10 * number


def test_each_batch_is_made_once_before_it_is_asked_for():
    loader = Loader()
    prefetcher = Prefetcher(loader)
    first = prefetcher.take(0)
    prefetcher.settle()
    assert [number for number, _ in loader.made] == [0, 1]
    assert torch.equal(first.micro_batches[0].tokens, make_batch(TURNS, 8, seed=0).tokens)
    assert prefetcher.take(1).num_samples_before == 10
    with pytest.raises(OSError, match="the disk is gone"):
        prefetcher.take(2)
    prefetcher.close()
    assert [number for number, _ in loader.made] == [0, 1, 2]
    assert threading.current_thread() not in {thread for _, thread in loader.made}


def test_a_caller_that_jumps_gets_what_it_asks_for():
    loader = Loader()
    prefetcher = Prefetcher(loader)
    assert prefetcher.take(1).num_samples_before == 10
    assert prefetcher.take(0).num_samples_before == 0
    prefetcher.close()
