"""Otsu's share against a brute-force search in exact fractions."""

import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.adaptive import NUM_BINS, choose_rho, otsu_rho, rho_rounds, score_range
from megatron_sstoken.selection.topk import Traffic, count_selected, run_rounds, sum_over, token_id

LEAST = Decimal("0.000001")


def number_above(bins: list[int]) -> int:
    """How many lie above the cut of largest w0·w1·(m0 − m1)², the lowest such; without a cut all of them."""
    best, answer = Fraction(0), len(bins)
    for cut in range(1, max(bins, default=0) + 1):
        low, high = [b for b in bins if b < cut], [b for b in bins if b >= cut]
        if low and high:
            distance = Fraction(sum(low), len(low)) - Fraction(sum(high), len(high))
            if len(low) * len(high) * distance**2 > best:
                best, answer = len(low) * len(high) * distance**2, len(high)
    return answer


def counts_of(bins: list[int]) -> list[int]:
    return torch.bincount(torch.tensor(bins, dtype=torch.int64), minlength=NUM_BINS).tolist()


@settings(deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_the_best_cut_exactly(bins):
    rho = otsu_rho(counts_of(bins), LEAST, 1)
    above = number_above(bins)
    assert count_selected(rho, len(bins)) == above
    assert rho <= Fraction(above, len(bins)) < rho + LEAST


@pytest.mark.parametrize("num_high", [1, 333, 500, 999])
def test_two_clear_groups(num_high):
    generator = torch.Generator().manual_seed(0)
    low = 0.2 + 0.02 * torch.rand(1000 - num_high, generator=generator)
    scores = torch.cat([low, 0.8 + 0.02 * torch.rand(num_high, generator=generator)])
    rho = choose_rho(scores, torch.arange(1000), LEAST, 1, None)
    assert rho == Decimal(num_high) / 1000


def test_a_tie_takes_the_larger_share():
    # 0, 1, 2: cutting off the lowest and cutting off the highest are equally good
    assert otsu_rho(counts_of([0, 1, 2]), LEAST, 1) == Decimal("0.666666")


@pytest.mark.parametrize("values", [[], [0.5], [0.25, 0.25, 0.25]])
def test_without_a_cut_the_largest(values):
    rho = choose_rho(torch.tensor(values), torch.arange(len(values)), "0.2", "0.7", None)
    assert rho == Decimal("0.7")


@pytest.mark.parametrize(
    ("low", "high", "expected"), [("0.4", "0.9", "0.4"), ("0.1", "0.2", "0.2"), ("0.1", "0.9", "0.25")]
)
def test_bounds(low, high, expected):
    scores = torch.tensor([0.1, 0.1, 0.1, 0.9])
    assert choose_rho(scores, torch.arange(4), low, high, None) == Decimal(expected)


def test_what_lies_outside_counts_as_0_or_1():
    ids = torch.arange(4)
    outside = choose_rho(torch.tensor([-5.0, float("-inf"), 2.0, 0.3]), ids, LEAST, 1, None)
    assert outside == choose_rho(torch.tensor([0.0, 0.0, 1.0, 0.3]), ids, LEAST, 1, None) == Decimal("0.25")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 1, width=32), max_size=60), st.integers(2, 64), st.randoms())
def test_the_layout_does_not_matter(values, num_ranks, random):
    alone = choose_rho(torch.tensor(values, dtype=torch.float32), torch.arange(len(values)), "0.1", "0.9", None)
    shards = [[] for _ in range(num_ranks)]
    for number in random.sample(range(len(values)), len(values)):
        shards[random.randrange(num_ranks)].append(number)
    ranks = [
        rho_rounds(
            torch.tensor([values[n] for n in shard], dtype=torch.float32),
            torch.tensor(shard, dtype=torch.int64),
            Decimal("0.1"),
            Decimal("0.9"),
        )
        for shard in shards
    ]
    traffic = Traffic()
    assert run_rounds(ranks, sum_over(None), traffic) == [alone] * num_ranks
    assert (traffic.collectives, traffic.num_bytes) == (1, 8 * 1025)


bounds_free = st.one_of(
    st.sampled_from([math.inf, -math.inf, 0.0, -3.0, 5.0, 5.0000005]),
    st.floats(-1e4, 1e4, width=32),
    st.floats(width=32),
)


@settings(deadline=None, max_examples=100)
@given(
    st.lists(bounds_free.filter(lambda value: not math.isnan(value)), min_size=1, max_size=40),
    st.integers(1, 5),
    st.randoms(),
)
def test_scores_of_any_size(values, num_ranks, random):
    """The histogram reaches from the lowest to the highest finite score, by exact fractions and on every layout."""
    finite = [Fraction(value) for value in values if math.isfinite(value)]
    low, high = min(finite, default=Fraction(0)), max(finite, default=Fraction(0))

    def bin_of(value: float) -> int:
        if high == low:
            return 0
        if math.isinf(value):
            return NUM_BINS - 1 if value > 0 else 0
        return min(int((Fraction(value) - low) / (high - low) * NUM_BINS), NUM_BINS - 1)

    bins = [bin_of(value) for value in values]
    exact = number_above(bins)
    scores, ids = torch.tensor(values, dtype=torch.float32), torch.arange(len(values))
    alone = choose_rho(scores, ids, LEAST, 1, None, bounded=False)
    shares = [[number for number in range(len(values)) if random.randrange(num_ranks) == 0]]
    shares += [[number for number in range(len(values)) if number not in shares[0]]]
    reach = torch.stack([score_range(scores[share]) for share in shares]).amax(0)
    ranks = [rho_rounds(scores[share], ids[share], LEAST, Decimal(1), reach) for share in shares]
    assert run_rounds(ranks, sum_over(None)) == [alone] * 2
    borders = [(Fraction(value) - low) / (high - low) * NUM_BINS for value in finite] if high > low else []
    if not any(0 < abs(border - round(border)) < Fraction(1, 10**6) for border in borders):  # float64 rounds there
        assert count_selected(alone, len(values)) == exact


def test_infinite_scores_alone_have_no_cut():
    infinite = torch.tensor([math.inf, -math.inf, 3.0])
    assert choose_rho(infinite, torch.arange(3), "0.1", "0.9", None, bounded=False) == Decimal("0.9")
    nothing = torch.empty(0)
    assert choose_rho(nothing, nothing.long(), "0.1", "0.9", None, bounded=False) == Decimal("0.9")


def test_the_scale_of_scores_does_not_matter():
    generator = torch.Generator().manual_seed(2)
    scores = torch.rand(1000, generator=generator) ** 3
    ids = torch.arange(1000)
    wanted = choose_rho((scores - scores.min()) / (scores.max() - scores.min()), ids, LEAST, 1, None)
    traffic = Traffic()
    found = choose_rho(-7.0 + 4.0 * scores, ids, LEAST, 1, None, traffic, bounded=False)
    assert abs(found - wanted) <= Decimal("0.005")
    assert (traffic.collectives, traffic.num_bytes) == (2, 16 + 8 * 1025)


def test_nan_names_the_token():
    ids = token_id(torch.tensor([3, 3, 5]), torch.tensor([1, 2, 9]))
    with pytest.raises(ValueError, match="sample 3 .* position 2, is NaN"):
        choose_rho(torch.tensor([0.5, float("nan"), float("nan")]), ids, "0.1", "0.9", None)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        ("0", "0.5", "rho=0 is outside"),
        ("0.5", "1.5", "rho=1.5 is outside"),
        ("0.6", "0.5", "rho_min=0.6 is above rho_max=0.5"),
    ],
)
def test_bounds_that_cannot_be(low, high, message):
    with pytest.raises(ValueError, match=message):
        choose_rho(torch.zeros(1), torch.zeros(1, dtype=torch.int64), low, high, None)
