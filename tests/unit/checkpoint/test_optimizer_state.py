"""A range of a flattened tensor is a few boxes of it, in the order of its elements."""

import math
from itertools import combinations

import pytest
import torch

from megatron_sstoken.checkpoint.optimizer_state import boxes


@pytest.mark.parametrize("shape", [(7,), (4, 3), (1, 5), (5, 1), (3, 2, 4), (2, 1, 3, 2)], ids=str)
def test_the_boxes_of_a_range_are_its_elements_in_their_order(shape):
    numel = math.prod(shape)
    numbers = torch.arange(numel).view(shape)
    for start, stop in combinations(range(numel + 1), 2):
        found = boxes(shape, start, stop)
        assert len(found) <= 2 * len(shape) - 1
        elements = [
            numbers[tuple(slice(begin, begin + length) for begin, length in zip(offset, size, strict=True))].flatten()
            for offset, size in found
        ]
        assert all(len(one) for one in elements)
        assert torch.cat(elements).tolist() == list(range(start, stop)), (start, stop)


def test_an_empty_range_has_none():
    assert boxes((4, 3), 5, 5) == boxes((4, 3), 6, 6) == boxes((3,), 2, 2) == []
