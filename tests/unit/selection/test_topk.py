"""Exact top-k within samples and across simulated ranks, against sorting and `torch.topk`."""

import math
import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.topk import (
    SCORE_DIGITS,
    Traffic,
    count_selected,
    distributed_topk,
    kth_smallest,
    run_rounds,
    score_of_key,
    segment_topk,
    simulate_topk,
    sortable_keys,
    split_token_id,
    sum_over,
    token_id,
)
from tests.helpers.strategies import DENORMAL, RHOS, scores

INF, NAN = math.inf, math.nan
PLAIN_BYTES = 8 * (2049 + 2049 + 1025)
TIE_BYTES = 8 * 3 * (2049 + 1025)


def fp32(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)


def reference(values: torch.Tensor, ids: torch.Tensor, k: int) -> set[int]:
    """Ids of the k highest, ties to the lower id, by numpy."""
    order = np.lexsort((ids.numpy(), -values.double().numpy()))
    return set(ids.numpy()[order[:k]].tolist())


class TestCount:
    @pytest.mark.parametrize(
        ("rho", "num", "expected"),
        [(0.1, 30, 3), (0.07, 100, 7), (0.6, 5, 3), (0.6, 6, 4), (0.6, 0, 0), (1, 7, 7), ("1e-9", 1, 1)],
    )
    def test_examples(self, rho, num, expected):
        assert count_selected(rho, num) == expected
        assert count_selected(rho, torch.tensor(num)).item() == expected

    @settings(deadline=None)
    @given(st.integers(1, 10**9), st.lists(st.integers(0, 10**12), min_size=1))
    @example(10**9 - 1, [10**12, 10**12 - 1])
    def test_tensor_and_int_are_the_exact_ceiling(self, billionths, nums):
        rho = Decimal(billionths).scaleb(-9)
        expected = [math.ceil(Fraction(billionths, 10**9) * num) for num in nums]
        assert [count_selected(rho, num) for num in nums] == expected
        found = count_selected(rho, torch.tensor(nums))
        assert found.dtype == torch.int64
        assert found.tolist() == expected

    @given(st.integers(1, 10**6))
    def test_floats_mean_the_decimal_that_was_written(self, millionths):
        rho = millionths / 10**6
        assert count_selected(rho, 10**6) == count_selected(str(rho), 10**6) == millionths

    def test_shape_is_kept(self):
        assert count_selected(0.5, torch.tensor([[1, 2], [3, 4]])).tolist() == [[1, 1], [2, 2]]

    @pytest.mark.parametrize("rho", [0, -0.1, 1.0000001, 2, INF, NAN, "nan"])
    def test_outside_is_refused(self, rho):
        with pytest.raises(ValueError, match=r"rho=.* is outside \(0, 1\]"):
            count_selected(rho, 10)

    @pytest.mark.parametrize("rho", [1 / 3, "0.1234567891", Decimal("1e-10"), "0.6" + "0" * 40 + "1"])
    def test_too_many_decimals_are_refused(self, rho):
        with pytest.raises(ValueError, match=r"rho=.* has more than 9 decimals: round it"):
            count_selected(rho, 10)

    def test_words_are_refused(self):
        with pytest.raises(ValueError, match="rho='most' is not a number"):
            count_selected("most", 10)

    def test_trailing_zeros_do_not_count(self):
        assert count_selected("0.60000000000000", 10) == 6


class TestKeys:
    @settings(deadline=None)
    @given(st.lists(scores, min_size=1, max_size=30))
    def test_order_range_and_inverse(self, values):
        keys = sortable_keys(fp32(values)).tolist()
        for a, key_a in zip(values, keys, strict=True):
            assert 0 <= key_a < 2**32
            assert score_of_key(key_a) == a
            for b, key_b in zip(values, keys, strict=True):
                assert (a < b) == (key_a < key_b)
                assert (a == b) == (key_a == key_b)

    def test_special_values_in_order(self):
        values = [
            -INF,
            -3.4e38,
            -1.0,
            -2 * DENORMAL,
            -DENORMAL,
            0.0,
            DENORMAL,
            2 * DENORMAL,
            1.0,
            3.4e38,
            INF,
        ]
        keys = sortable_keys(fp32(values)).tolist()
        assert keys == sorted(set(keys))
        assert len(keys) == len(values)
        assert sortable_keys(fp32([-0.0])).item() == sortable_keys(fp32([0.0])).item()

    def test_denormals_survive_a_machine_that_flushes_them(self):
        if not torch.set_flush_denormal(True):
            pytest.skip("this CPU cannot flush denormals")
        try:
            bits = torch.tensor([0, 1, 2], dtype=torch.int32)
            assert sortable_keys(bits.view(torch.float32)).diff().tolist() == [1, 1]
        finally:
            torch.set_flush_denormal(False)

    def test_strided_input(self):
        values = fp32([1.0, 2.0, 3.0, 4.0])
        assert torch.equal(sortable_keys(values[::2]), sortable_keys(values[::2].clone()))

    def test_other_types_are_our_mistake(self):
        with pytest.raises(AssertionError):
            sortable_keys(torch.zeros(1, dtype=torch.float64))


class TestIds:
    @given(st.integers(0, 2**39 - 1), st.integers(0, 2**24 - 1))
    def test_round_trip(self, sample, position):
        token = token_id(torch.tensor([sample]), torch.tensor([position])).item()
        assert token >= 0
        assert split_token_id(token) == (sample, position)

    def test_order_is_sample_then_position(self):
        ids = token_id(torch.tensor([1, 1, 2, 3]), torch.tensor([5, 2**24 - 1, 0, 0]))
        assert (ids.diff() > 0).all()

    @pytest.mark.parametrize("position", [2**24, -1])
    def test_positions_that_do_not_fit(self, position):
        with pytest.raises(AssertionError, match="position"):
            token_id(torch.tensor([1]), torch.tensor([position]))


class TestSegments:
    @settings(deadline=None)
    @given(st.data())
    def test_equals_sorting_each_segment(self, data):
        num_segments = data.draw(st.integers(1, 5))
        tokens = data.draw(st.lists(st.tuples(scores, st.booleans(), st.integers(0, num_segments - 1)), max_size=40))
        k = data.draw(st.lists(st.integers(0, 12), min_size=num_segments, max_size=num_segments))
        values = [value if candidate else NAN for value, candidate, _ in tokens]
        segment = [s if candidate else -1 for _, candidate, s in tokens]
        expected = set()
        for s in range(num_segments):
            inside = [i for i, (_, candidate, owner) in enumerate(tokens) if candidate and owner == s]
            expected |= set(sorted(inside, key=lambda i: (-values[i], i))[: k[s]])
        candidates = torch.tensor([candidate for _, candidate, _ in tokens], dtype=torch.bool)
        mask = segment_topk(
            fp32(values), candidates, torch.tensor(segment, dtype=torch.int64), num_segments, torch.tensor(k)
        )
        assert mask.dtype == torch.bool
        assert set(mask.nonzero().flatten().tolist()) == expected

    def test_equals_torch_topk(self):
        generator = torch.Generator().manual_seed(1)
        values = torch.rand(500, generator=generator)
        segment = torch.randint(0, 3, (500,), generator=generator)
        k = torch.tensor([7, 0, 100])
        mask = segment_topk(values, torch.ones(500, dtype=torch.bool), segment, 3, k)
        for s in range(3):
            inside = (segment == s).nonzero().flatten()
            expected = inside[values[inside].topk(int(k[s])).indices]
            assert set((mask & (segment == s)).nonzero().flatten().tolist()) == set(expected.tolist())

    def test_no_segments(self):
        none = torch.zeros(3, dtype=torch.bool)
        empty = torch.zeros(0, dtype=torch.int64)
        assert not segment_topk(fp32([1, 2, 3]), none, torch.full((3,), -1), 0, empty).any()


def shards_of(values: torch.Tensor, ids: torch.Tensor, owner: list[int], num_ranks: int):
    owner_of = torch.tensor(owner, dtype=torch.int64)
    return [(values[owner_of == rank], ids[owner_of == rank]) for rank in range(num_ranks)]


def selected_ids(shards, results) -> list[int]:
    return [i for (_, ids), result in zip(shards, results, strict=True) for i in ids[result.mask].tolist()]


@st.composite
def sharded_scores(draw):
    """Scores with distinct ids on 2 to 64 ranks; owners are skewed: some ranks have most, many none."""
    num_ranks = draw(st.integers(2, 64))
    values = draw(st.lists(scores, max_size=80))
    shuffle = random.Random(draw(st.integers(0, 2**32)))
    spacing = draw(st.sampled_from([1, 2**24 + 1, 2**56 - 1]))  # ids that differ in the lowest, middle, highest bits
    ids = [spacing * number for number in shuffle.sample(range(128), len(values))]
    skew = draw(st.sampled_from([1, 4, 50]))
    owner = [int(num_ranks * shuffle.random() ** skew) for _ in values]
    return shards_of(fp32(values), torch.tensor(ids, dtype=torch.int64), owner, num_ranks)


class TestAcrossRanks:
    @settings(deadline=None, max_examples=200)
    @given(sharded_scores(), st.integers(0, 90))
    def test_k_highest_of_all_ranks(self, shards, k):
        values, ids = torch.cat([s[0] for s in shards]), torch.cat([s[1] for s in shards])
        results = simulate_topk(shards, k=k)
        found = selected_ids(shards, results)
        assert len(found) == len(set(found)) == min(k, len(values))
        assert set(found) == reference(values, ids, k)
        best = values.topk(min(k, len(values))).values
        for result in results:
            assert (result.num_candidates, result.num_selected) == (len(values), len(best))
            assert result.threshold == best.min() if len(best) else math.isnan(result.threshold)

    @settings(deadline=None, max_examples=60)
    @given(sharded_scores(), st.sampled_from(RHOS))
    def test_share_of_all_ranks(self, shards, rho):
        values, ids = torch.cat([s[0] for s in shards]), torch.cat([s[1] for s in shards])
        found = selected_ids(shards, simulate_topk(shards, rho=rho))
        assert set(found) == reference(values, ids, count_selected(rho, len(values)))

    @settings(deadline=None, max_examples=30)
    @given(st.lists(scores, min_size=1, max_size=40), st.integers(0, 2**32))
    def test_the_layout_does_not_matter(self, values, seed):
        shuffle = random.Random(seed)
        ids = torch.tensor(shuffle.sample(range(1000), len(values)))
        found = []
        for num_ranks in (1, 2, 7, 64):
            owner = [shuffle.randrange(num_ranks) for _ in values]
            order = torch.tensor(shuffle.sample(range(len(values)), len(values)))
            shards = shards_of(fp32(values)[order], ids[order], owner, num_ranks)
            found.append(set(selected_ids(shards, simulate_topk(shards, rho=0.3))))
        assert found == [found[0]] * 4

    @pytest.mark.parametrize("k", [0, 1, 49_999, 50_000, 100_000])
    def test_equals_torch_topk_on_many_tokens(self, k):
        values = torch.randn(100_000, generator=torch.Generator().manual_seed(2))
        shards = list(zip(values.split(1667), torch.arange(100_000).split(1667), strict=True))
        results = simulate_topk(shards, k=k)
        chosen = values[torch.cat([result.mask for result in results])]
        assert torch.equal(chosen.sort().values, values.topk(k).values.flip(0))

    def test_one_process_alone_needs_no_group(self):
        result = distributed_topk(fp32([0.5, 2.0, 2.0, -1.0]), torch.tensor([3, 9, 8, 1]), None, k=1)
        assert result.mask.tolist() == [False, False, True, False]
        assert result.threshold == 2.0

    @pytest.mark.parametrize("num_ranks", [1, 5])
    def test_no_tokens_anywhere(self, num_ranks):
        empty = (torch.zeros(0), torch.zeros(0, dtype=torch.int64))
        for result in simulate_topk([empty] * num_ranks, rho=0.6):
            assert result.mask.shape == (0,)
            assert (result.num_candidates, result.num_selected) == (0, 0)
            assert math.isnan(result.threshold)

    @pytest.mark.parametrize(
        ("num_kinds", "k", "rounds", "num_bytes"),
        [
            (10**9, 600, 3, PLAIN_BYTES),
            (1, 1000, 3, PLAIN_BYTES),  # all tie, all are taken
            (2, 500, 3, PLAIN_BYTES),  # ties end exactly at k
            (2, 499, 9, PLAIN_BYTES + TIE_BYTES),
            (1, 1, 9, PLAIN_BYTES + TIE_BYTES),
            (1, 0, 3, PLAIN_BYTES),
        ],
    )
    def test_traffic_does_not_depend_on_tokens_or_ranks(self, num_kinds, k, rounds, num_bytes):
        for repeats in (1, 20):
            values = (torch.arange(1000) % num_kinds).float().repeat(repeats)
            ids = torch.arange(len(values))
            for num_ranks in (1, 3, 100):
                traffic = Traffic()
                shards = list(zip(values.tensor_split(num_ranks), ids.tensor_split(num_ranks), strict=True))
                simulate_topk(shards, k=k * repeats, traffic=traffic)
                assert (traffic.collectives, traffic.num_bytes) == (rounds, num_bytes)

    @pytest.mark.parametrize("bad_rank", [0, 1, 2])
    def test_nan_names_the_first_token_of_any_rank(self, bad_rank):
        values = [fp32([1.0, 2.0]), fp32([3.0, 4.0]), torch.zeros(0)]
        ids = [
            token_id(torch.tensor([9, 9]), torch.tensor([0, 1])),
            token_id(torch.tensor([4, 8]), torch.tensor([7, 3])),
        ]
        ids.append(torch.zeros(0, dtype=torch.int64))
        values[bad_rank] = torch.cat([values[bad_rank], fp32([NAN, NAN])])
        ids[bad_rank] = torch.cat([ids[bad_rank], token_id(torch.tensor([7, 6]), torch.tensor([1, 2]))])
        with pytest.raises(ValueError, match=r"sample 6 \(row number in the input\), position 2, is NaN"):
            simulate_topk(list(zip(values, ids, strict=True)), rho=0.5)

    def test_nan_of_either_sign_is_refused(self):
        negative = torch.tensor([-1, 0x7FC00000], dtype=torch.int32).view(torch.float32)
        for value in negative:
            with pytest.raises(ValueError, match="sample 0 .* position 5"):
                distributed_topk(value.reshape(1), torch.tensor([5]), None, k=1)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, "k=None and rho=None: give one of them"),
            ({"k": 1, "rho": 0.5}, "k=1 and rho=0.5: give one of them"),
            ({"k": -1}, "k=-1 is negative"),
            ({"rho": 0.0}, "rho=0.0 is outside"),
        ],
    )
    def test_what_cannot_be_is_refused_before_any_collective(self, arguments, message):
        traffic = Traffic()
        with pytest.raises(ValueError, match=message):
            distributed_topk(torch.zeros(1), torch.zeros(1, dtype=torch.int64), None, traffic=traffic, **arguments)
        assert traffic == Traffic()

    def test_the_same_token_twice_is_our_mistake(self):
        with pytest.raises(AssertionError, match=r"token \(0, 7\) is there 2 times"):
            simulate_topk([(torch.zeros(2), torch.tensor([7, 8])), (torch.zeros(1), torch.tensor([7]))], k=1)


class TestRounds:
    @settings(deadline=None, max_examples=60)
    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50), st.data())
    def test_kth_smallest(self, keys, data):
        k = data.draw(st.integers(1, len(keys)))
        excluded = data.draw(st.integers(0, 3))
        rounds = kth_smallest(torch.tensor(keys + [-1] * excluded), lambda total: total.clamp(max=k), SCORE_DIGITS)
        (found,) = run_rounds([rounds], sum_over(None))
        expected = sorted(keys)[k - 1]
        assert (found.key, found.num_wanted) == (expected, k)
        assert found.num_equal == keys.count(expected)
        assert found.num_wanted_equal == k - sum(key < expected for key in keys)
        assert (found.num_candidates, found.num_excluded) == (len(keys), excluded)

    def test_every_rank_gets_the_sum(self):
        def rank(number: int) -> Iterator:
            first = yield torch.tensor([number, 1])
            second = yield first * number
            return second.tolist()

        traffic = Traffic()
        results = run_rounds([rank(n) for n in (1, 2, 3)], sum_over(None), traffic)
        assert results == [[36, 18]] * 3
        assert (traffic.collectives, traffic.num_bytes) == (2, 32)

    def test_a_rank_that_leaves_a_collective_is_noticed(self):
        def rank(num_rounds: int) -> Iterator:
            for _ in range(num_rounds):
                yield torch.zeros(1)

        with pytest.raises(AssertionError, match="1 of 2 ranks left a collective"):
            run_rounds([rank(2), rank(3)], sum_over(None))
