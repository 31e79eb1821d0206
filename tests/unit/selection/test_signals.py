"""REL, its normalisation and the score, against definitions in float64 and numbers worked out by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.selection.signals import (
    TokenSignals,
    combine,
    concatenate_signals,
    normalize_per_sample,
    retrospective_excess_loss,
)
from tests.helpers import brute_force
from tests.helpers.strategies import micro_batches

NAN = math.nan


def normalized(rel: list[float], rel_floor: float = 1e-3) -> list[float]:
    """One sample, all of it response."""
    count = len(rel)
    response, segment = torch.ones(count, dtype=torch.bool), torch.zeros(count, dtype=torch.int64)
    return normalize_per_sample(torch.tensor(rel), response, segment, 1, rel_floor).tolist()


def rel_norm_of(signals: TokenSignals, rel_floor: float) -> torch.Tensor:
    rel = retrospective_excess_loss(signals["loss"], signals["history_loss"])
    return normalize_per_sample(rel, signals.response, signals.segment, signals.num_segments, rel_floor)


def test_rel_is_large_where_the_model_became_better():
    rel = retrospective_excess_loss(loss=torch.tensor([1.0, 3.0]), history_loss=torch.tensor([2.5, 2.0]))
    assert rel.tolist() == [1.5, -1.0]


def test_example_by_hand():
    # context, then rel 1, −1, 0 and one more sample of rel 4, 2; the last token is padding
    rel = torch.tensor([NAN, 1.0, -1.0, 0.0, 4.0, 2.0, 99.0])
    segment = torch.tensor([0, 0, 0, 0, 1, 1, -1])
    response = torch.tensor([False, True, True, True, True, True, False])
    found = normalize_per_sample(rel, response, segment, 2, 1e-3)
    torch.testing.assert_close(found, torch.tensor([NAN, 1.0, 0.0, 0.5, 1.0, 0.0, NAN]), equal_nan=True)
    attention = torch.tensor([0.9, 0.5, 0.25, 0.0, 0.0, 1.0, 0.0])
    score = combine(found, attention, 0.75)
    torch.testing.assert_close(score[1:-1], torch.tensor([0.875, 0.0625, 0.375, 0.75, 0.25]))


@settings(deadline=None)
@given(micro_batches(), st.sampled_from([0.0, 1e-3, 0.5]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_scores_equal_the_definitions_and_nothing_undefined_leaks(tokens, rel_floor, gamma):
    expected_norm = brute_force.rel_norms(tokens, rel_floor)
    expected_score = brute_force.scores(tokens, gamma, rel_floor)
    results = []
    for garbage in (NAN, math.inf, -1e30):
        signals = brute_force.signals_of(tokens, garbage)
        rel_norm = rel_norm_of(signals, rel_floor)
        assert rel_norm.dtype == torch.float32
        assert rel_norm[~signals.response].isnan().all()
        score = combine(rel_norm, signals["attention"], gamma)
        assert brute_force.by_key(tokens, rel_norm) == pytest.approx(expected_norm, abs=2e-6)
        assert brute_force.by_key(tokens, score) == pytest.approx(expected_score, abs=2e-6)
        results.append(score[signals.response])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    ("spread", "floor", "expected"),
    [
        (0.4990234375, 0.5, [0.0, 0.0]),
        (0.5, 0.5, [0.0, 1.0]),  # only what is below the floor is flat
        (1e-6, 0.0, [0.0, 1e-6 / (1e-6 + 1e-8)]),  # 0 reproduces the official code
        (0.0, 0.0, [0.0, 0.0]),
    ],
)
def test_rel_floor(spread, floor, expected):
    assert normalized([0.0, spread], floor) == pytest.approx(expected, rel=1e-6)


def test_a_single_response_token_is_0():
    assert normalized([7.5], 0.0) == [0.0]


@pytest.mark.parametrize("floor", [0.0, 1e-3, 10.0])
def test_nan_stays_where_it_is_and_the_floor_does_not_hide_it(floor):
    found = normalized([0.0, NAN, 2.0, 1.0], floor)
    assert math.isnan(found[1])
    assert [found[0], found[2], found[3]] == ([0.0] * 3 if floor == 10 else [0.0, 1.0, 0.5])
    assert all(math.isnan(value) for value in normalized([NAN, NAN], floor))


@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_an_infinite_rel_does_not_pass_as_a_number(bad):
    assert any(math.isnan(value) for value in normalized([0.0, bad, 1.0]))


def test_samples_do_not_touch_each_other():
    rel, segment = torch.tensor([0.0, 1.0, 100.0, 300.0]), torch.tensor([0, 0, 1, 1])
    found = normalize_per_sample(rel, torch.ones(4, dtype=torch.bool), segment, 2, 1e-3)
    assert found.tolist() == [0.0, 1.0, 0.0, 1.0]


def test_no_sample_and_no_token():
    nothing = torch.zeros(0, dtype=torch.int64)
    assert normalize_per_sample(nothing.float(), nothing.bool(), nothing, 0, 1e-3).shape == (0,)
    padding = torch.full((3,), -1)
    assert normalize_per_sample(torch.ones(3), torch.zeros(3, dtype=torch.bool), padding, 0, 0).isnan().all()


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_combine_does_not_touch_the_signal_without_weight(bad):
    good, poisoned = torch.tensor([0.25, 0.75]), torch.tensor([bad, bad])
    assert combine(poisoned, good, 0.0).tolist() == [0.25, 0.75]
    assert combine(good, poisoned, 1.0).tolist() == [0.25, 0.75]
    assert not combine(good, poisoned, 0.5).isfinite().any()


@pytest.mark.parametrize("gamma", [-0.1, 1.5, NAN])
def test_combine_refuses_a_weight_outside_0_1(gamma):
    with pytest.raises(ValueError, match=r"gamma=.* outside \[0, 1\]"):
        combine(torch.zeros(1), torch.zeros(1), gamma)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_arithmetic_is_fp32_whatever_comes_in(dtype):
    loss, history = torch.tensor([0.5, 257.0], dtype=dtype), torch.tensor([257.0, 0.5], dtype=dtype)
    rel = retrospective_excess_loss(loss, history)
    assert rel.dtype == torch.float32
    assert rel.tolist() == (history.float() - loss.float()).tolist()
    assert combine(rel.to(dtype), rel.to(dtype), 0.5).dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(st.lists(micro_batches(), min_size=1, max_size=4))
def test_concatenating_keeps_samples_apart(parts):
    signals = [brute_force.signals_of(tokens) for tokens in parts]
    joined = concatenate_signals(signals)
    assert joined.num_segments == sum(part.num_segments for part in signals)
    offset = 0
    for part, segment in zip(signals, joined.segment.split([len(p.segment) for p in signals]), strict=True):
        real = part.segment >= 0
        assert torch.equal(segment[real], part.segment[real] + offset)
        assert (segment[~real] == -1).all()
        offset += part.num_segments
    apart = torch.cat([rel_norm_of(part, 1e-3) for part in signals])
    torch.testing.assert_close(rel_norm_of(joined, 1e-3), apart, rtol=0, atol=0, equal_nan=True)


def test_concatenating_one_is_the_same():
    signals = brute_force.signals_of([brute_force.Token(3, 1, True, 1.0, 2.0, 0.5)])
    joined = concatenate_signals([signals])
    torch.testing.assert_close(dict(joined.values), dict(signals.values), equal_nan=True)
    for name in ("segment", "response", "sample", "position"):
        torch.testing.assert_close(getattr(joined, name), getattr(signals, name), equal_nan=True)
