"""The zigzag split: every token on one rank, in the order of megatron and Transformer Engine, equal causal work."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.context_parallel import zigzag_index


def test_two_ranks_by_hand():
    assert zigzag_index([8, 4], 2).tolist() == [[0, 1, 6, 7, 8, 11], [2, 3, 4, 5, 9, 10]]


@given(st.integers(1, 4), st.lists(st.integers(1, 5), min_size=1, max_size=6))
def test_a_permutation_with_equal_causal_work(num_ranks, chunks):
    lengths = [2 * num_ranks * size for size in chunks]
    index = zigzag_index(lengths, num_ranks)
    assert index.shape == (num_ranks, sum(lengths) // num_ranks)
    assert index.flatten().sort().values.tolist() == list(range(sum(lengths)))
    starts = torch.repeat_interleave(torch.tensor([0, *lengths[:-1]]).cumsum(0), torch.tensor(lengths))
    work = (index - starts[index] + 1).sum(dim=1)  # keys that each rank's queries see
    assert len(set(work.tolist())) == 1


def test_lengths_must_divide():
    with pytest.raises(AssertionError):
        zigzag_index([6], 2)
