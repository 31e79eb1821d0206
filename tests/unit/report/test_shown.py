"""Which samples are shown, and that what is held of the others does not grow with their number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.report.figures import SAMPLE
from megatron_sstoken.report.record_files import find_records
from megatron_sstoken.report.shown import Choice, load, numbers, window_of
from tests.helpers.token_records import Token, write_file


def figures(samples, **values):
    found = np.zeros(len(samples), dtype=SAMPLE)
    found["sample"], found["num_response"] = samples, 10
    for name, column in values.items():
        found[name] = column
    return found


def chosen(offers, number, seed=0):
    choice = Choice(number, seed)
    for offer in offers:
        choice.offer(offer, watched=False)
    return choice


@settings(max_examples=25)
@given(
    keys=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")]), min_size=1, max_size=60),
    parts=st.integers(1, 7),
)
def test_what_stands_out_is_shown_however_the_records_are_cut(keys, parts):
    every = figures(np.arange(len(keys)), dropped_share=keys, drift=np.nan, top_score=np.nan)
    together, apart = (chosen(offers, 8).shown() for offers in ([every], np.array_split(every, parts)))
    assert together.tobytes() == apart.tobytes()
    assert len(together) == min(8, len(keys)) and len(set(together["sample"])) == len(together)
    best = sorted((-key, sample) for sample, key in enumerate(keys) if key == key)[: min(2, len(together))]
    assert {sample for _, sample in best} <= set(together["sample"].tolist())


def test_each_way_to_stand_out_has_its_part_and_the_rest_is_drawn():
    count = 1000
    every = figures(
        np.arange(count),
        dropped_share=np.arange(count) == 1,
        drift=np.where(np.arange(count) == 2, 5.0, np.nan),
        top_score=np.where(np.arange(count) == 3, 0.9, np.nan),
    )
    shown = chosen([every], 20).shown()["sample"].tolist()
    assert {1, 2, 3} <= set(shown) and len(shown) == 20
    other = chosen([every], 20, seed=1).shown()["sample"].tolist()
    assert other != shown and chosen([every], 20).shown()["sample"].tolist() == shown


def test_watched_samples_come_first_with_their_last_figures():
    choice = chosen([figures(np.arange(50), dropped_share=np.arange(50))], 10)
    for step in (0, 10):
        choice.offer(figures([48, 4], dropped_share=step), watched=True)
    shown = choice.shown()
    assert shown["sample"].tolist()[:2] == [4, 48] and shown["dropped_share"].tolist()[:2] == [10, 10]
    assert len(set(shown["sample"].tolist())) == len(shown) == 10


def test_memory_is_bounded_by_what_is_shown():
    choice = Choice(7, 0)
    for first in range(0, 100_000, 10_000):
        some = figures(np.arange(first, first + 10_000), dropped_share=np.linspace(0, 1, 10_000))
        choice.offer(some, watched=False)
        choice.offer(some, watched=True)
        held = [choice._watched, choice._drawn.figures, *(best.figures for best in choice._best.values())]
        assert all(len(one) <= 7 and one.base is None for one in held)  # no view, which would hold all


@given(length=st.integers(1, 50), first=st.integers(0, 49), longest=st.integers(4, 60))
def test_a_window_has_the_first_response_token_and_as_much_as_may_be(length, first, longest):
    one = figures([0], num_tokens=length, first_response=min(first, length - 1))[0]
    start, stop = window_of(one, longest)
    assert 0 <= start <= one["first_response"] < stop <= length
    assert stop - start == min(length, longest)


def test_shown_samples_are_read_at_their_steps_and_cut(tmp_path):
    long, short = [Token(token=place, role=int(place > 50)) for place in range(100)], [Token(role=0), Token(loss=3.0)]
    for step in (10, 20, 30):
        write_file(tmp_path / "watched" / f"step_{step:07d}.parquet", [(1, long), (2, short)])
        write_file(tmp_path / "records" / f"step_{step:07d}.parquet", [(1, short), (step, short), (99, short)])
    write_file(tmp_path / "watched" / "step_0000025.parquet", [(7, short)])  # by a start of the run that watched others
    files = find_records(tmp_path / "watched", watched=True) + find_records(tmp_path / "records")
    files.sort(key=lambda file: (file.step, not file.watched))
    shown = figures([1, 2, 20, 7], num_tokens=[100, 2, 2, 2], first_response=[51, 1, 1, 1], step=[30, 30, 20, 25])
    loaded = load(files, shown, 16, [10, 30])
    assert {sample: list(steps) for sample, steps in loaded.items()} == {
        1: [10, 20, 30],
        2: [10, 30],
        20: [20],
        7: [25],
    }
    assert loaded[1][10]["token"].tolist() == list(range(47, 63))
    assert loaded[20][20]["loss"].tolist() == pytest.approx([np.nan, 3.0], nan_ok=True)


def test_numbers_are_short():
    values = np.array([1.23456, 12345.6, 0.00001, -0.25, np.nan, np.inf])
    assert numbers(values) == [1.235, 12350.0, 0.0, -0.25, None, None]
