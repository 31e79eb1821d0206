"""Rows hold every sample once, never too much, and are packed tightly and alike everywhere."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sstoken.data.batches import PackOrder, SampleFilter
from megatron_sstoken.data.packing import WINDOW, first_fit_decreasing, next_fit, one_per_pack

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def slow_first_fit(order, lengths, capacity):
    """The definition, with lists: longest first, each into the first row with room."""
    rows = []
    for sample in sorted(order.tolist(), key=lambda s: -lengths[s]):
        for row in rows:
            if sum(lengths[member] for member in row) + lengths[sample] <= capacity:
                row.append(sample)
                break
        else:
            rows.append([sample])
    return rows


@given(LENGTHS, st.integers(0, 5))
def test_first_fit_decreasing_is_its_definition(lengths, seed):
    lengths = np.array(lengths)
    order = np.random.default_rng(seed).permutation(len(lengths))
    rows = first_fit_decreasing(order, lengths, CAPACITY, None)
    assert [row.tolist() for row in rows] == slow_first_fit(order, lengths, CAPACITY)


@given(LENGTHS)
def test_next_fit_keeps_the_order_and_opens_a_row_only_when_it_must(lengths):
    lengths = np.array(lengths)
    order = np.arange(len(lengths))
    rows = next_fit(order, lengths, CAPACITY)
    assert np.concatenate(rows).tolist() == order.tolist()
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        assert lengths[row].sum() <= CAPACITY
        assert following is None or lengths[row].sum() + lengths[following[0]] > CAPACITY


def test_a_sample_that_fills_a_row_exactly_is_alone_in_it():
    lengths = np.array([CAPACITY, 1, CAPACITY])
    for rows in (
        next_fit(np.arange(3), lengths, CAPACITY),
        first_fit_decreasing(np.arange(3), lengths, CAPACITY, None),
    ):
        assert sorted(row.tolist() for row in rows) == [[0], [1], [2]]
    assert [row.tolist() for row in one_per_pack(np.array([2, 0]))] == [[2], [0]]


def selection_of(lengths):
    lengths = np.array(lengths, dtype=np.int32)
    return SampleFilter(np.arange(len(lengths)), lengths, 0, 0, 0)


@given(LENGTHS, st.integers(0, 3), st.data())
def test_packed_order_is_a_function_of_seed_and_row_number(lengths, seed, data):
    def order():
        return PackOrder(selection_of(lengths), seed=seed, shuffle=True, packing="first_fit", capacity=CAPACITY)

    whole = order()
    ends = [whole.num_packs(epoch) for epoch in range(4)]
    rows = [whole.pack(number).tolist() for number in range(ends[3])]
    for first, last in zip(ends, ends[1:], strict=False):
        assert sorted(sum(rows[first:last], [])) == list(range(len(lengths))), "every sample once an epoch"
    start = data.draw(st.integers(0, ends[3] - 1))
    resumed = order()
    assert [resumed.pack(number).tolist() for number in range(start, ends[3])] == rows[start:]
    assert resumed.num_samples_before(start) == sum(map(len, rows[:start]))
    assert resumed.pack(0).tolist() == rows[0], "going back works too"


def test_windows_are_packed_tightly_and_shuffled():
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 200, 2 * WINDOW + 100)
    order = generator.permutation(len(lengths))
    rows = first_fit_decreasing(order, lengths, 512, np.random.default_rng(1))
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    filled = np.array([lengths[row].sum() for row in rows])
    assert filled.max() <= 512 and filled.mean() > 0.97 * 512
    longest = np.array([lengths[row].max() for row in rows])
    assert abs(np.corrcoef(np.arange(len(rows)), longest)[0, 1]) < 0.3, "long samples are not all in front"
