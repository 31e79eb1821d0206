"""Differences are measured in the noise of transformers' own fp32, and what is not a number differs."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.conversion.logits import Comparison, Difference

DOUBLE = torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NOISE = 1e-6 * torch.randn(64, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SINGLE = (DOUBLE + NOISE).float()


def with_error(error):
    return Difference.of("layer 0", (DOUBLE + error).float(), SINGLE, DOUBLE)


@given(st.floats(0.1, 20))
def test_the_ratio_is_that_of_the_errors(times):
    found = with_error(times * NOISE.flip(0))
    assert found.ratio == pytest.approx(times, rel=0.1)
    assert found.exceeds(4) is (found.ratio > 4)
    assert found.scale == pytest.approx(float(DOUBLE.square().mean().sqrt()))


def test_a_single_wrong_number_is_too_much():
    error = torch.zeros_like(NOISE)
    error[40, 3] = 10 * float(NOISE.abs().max())
    found = with_error(error)
    assert found.ratio < 4 and found.exceeds(4), "the mean hides it, the largest does not"


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_a_number_differs(wrong):
    error = torch.zeros_like(NOISE)
    error[1, 1] = wrong
    assert with_error(error).exceeds(1e30)


def test_where_fp32_is_exact_half_a_digit_is_allowed():
    exact = torch.tensor([[1.0, -2.0, 4.0]])
    assert not Difference.of("the embedding", exact, exact, exact.double()).exceeds(4)
    assert not Difference.of("the embedding", exact * (1 + 2**-23), exact, exact.double()).exceeds(4)
    assert Difference.of("the embedding", exact * (1 + 2**-20), exact, exact.double()).exceeds(4)


def test_the_first_difference_is_named_in_the_order_of_computation():
    right, wrong = with_error(NOISE), with_error(100 * NOISE)
    comparison = Comparison("random text", 64, [right, wrong, wrong], divergence=1e-9, agreement=63)
    assert comparison.first_difference(4) == "layer 0" and comparison.first_difference(200) is None
    assert "the first to differ: layer 0" in comparison.describe(
        4
    ) and "same first choice at 63" in comparison.describe(4)
    assert "the first to differ" not in comparison.describe(200)
    assert len(comparison.table().splitlines()) == 4
