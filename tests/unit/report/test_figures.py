"""Sums over records equal those of plain loops, however the files are cut."""

import math
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.report import record_files
from megatron_sstoken.report.figures import BINS, COLUMNS, KindFigures, StepFigures, edges_of, sample_figures
from megatron_sstoken.report.record_files import find_records, score_range, whole_samples
from tests.helpers.token_records import UNDEFINED, Token, write_file, write_rows

NUMBERS = st.floats(-4, 4, width=32)
TOKENS = st.builds(
    Token,
    token=st.integers(0, 6),
    role=st.integers(0, 1),
    loss=NUMBERS,
    history_loss=NUMBERS | st.just(UNDEFINED),
    score=NUMBERS | st.just(UNDEFINED),
    selected=st.booleans(),
)
SAMPLES = st.lists(st.tuples(st.integers(0, 5), st.lists(TOKENS, min_size=1, max_size=6)), min_size=1, max_size=8)


def mean(values):
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def visits(samples):
    """Samples as a file tells them apart: with (sample, [tokens that selection is about])."""
    return [(sample, [token for token in tokens[1:] if token.role == 1]) for sample, tokens in samples]


def read(path):
    """Everything that one pass over a file gives."""
    files = find_records(path)
    edges = edges_of(score_range(files))
    step, kinds, figures = StepFigures(), KindFigures(), []
    for columns, starts in whole_samples(files[0], COLUMNS):
        step.add(columns, edges)
        kinds.add(columns)
        figures.append(sample_figures(columns, starts, 7))
    return np.concatenate(figures), step, kinds, edges


def near(found, expected):
    return np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=25)
@given(samples=SAMPLES, batch=st.integers(1, 9), group=st.integers(1, 9))
def test_sums_are_those_of_plain_loops(tmp_path_factory, samples, batch, group):
    # Two visits to one sample, one after the other, are told apart by the position, which goes back.
    samples = [
        one for number, one in enumerate(samples) if len(one[1]) > 1 or number == 0 or samples[number - 1][0] != one[0]
    ]
    path = write_file(tmp_path_factory.mktemp("records") / "r.parquet", samples, row_group_size=group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_files, "BATCH_ROWS", batch)
        figures, step, kinds, edges = read(path)

    expected = [(sample, tokens) for sample, tokens in visits(samples) if tokens]
    assert figures["sample"].tolist() == [sample for sample, _ in expected]
    assert figures["num_response"].tolist() == [len(tokens) for _, tokens in expected]
    near(figures["dropped_share"], [mean(not one.selected for one in tokens) for _, tokens in expected])
    near(figures["mean_loss"], [mean(one.loss for one in tokens) for _, tokens in expected])
    near(
        figures["drift"],
        [mean(one.loss - one.history_loss for one in tokens if not one.selected) for _, tokens in expected],
    )
    scores = [[one.score for one in tokens if not math.isnan(one.score)] for _, tokens in expected]
    near(figures["top_score"], [max(values, default=math.nan) for values in scores])

    every = [token for _, tokens in expected for token in tokens]
    kept, left = [one for one in every if one.selected], [one for one in every if not one.selected]
    assert (step.num_selected, step.num_dropped) == (len(kept), len(left))
    near([step.loss_selected, step.loss_dropped], [sum(one.loss for one in part) for part in (kept, left)])
    near(step.drift, mean(one.loss - one.history_loss for one in left))
    for found, part in ((step.selected, kept), (step.dropped, left)):
        values = [one.score for one in part if not math.isnan(one.score)]
        if edges is not None:
            assert found.tolist() == np.histogram(np.array(values, dtype=np.float32), edges)[0].tolist()

    by_kind = defaultdict(list)
    for one in every:
        by_kind[one.token].append(one)
    assert sorted(kinds.notable(100).tolist()) == sorted(by_kind)
    for kind, tokens in by_kind.items():
        known = [one for one in tokens if not math.isnan(one.history_loss)]
        near(
            [kinds[name][kind] for name in ("count", "selected", "loss", "with_history", "history_loss", "change")],
            [
                len(tokens),
                sum(one.selected for one in tokens),
                sum(one.loss for one in tokens),
                len(known),
                sum(one.history_loss for one in known),
                sum(one.loss - one.history_loss for one in known),
            ],
        )


def test_a_sample_twice_in_a_batch_counts_once_as_a_sample_and_twice_as_tokens(tmp_path):
    """Records of a batch are sorted by sample and position, so that the two stand between each other."""
    token = Token(loss=2.0, selected=False)
    rows = [(3, place, token) for place in range(4) for _ in range(2)]
    figures, step, _, _ = read(write_rows(tmp_path / "r.parquet", rows))
    assert (figures["sample"].tolist(), figures["num_response"].tolist(), figures["num_tokens"].tolist()) == (
        [3],
        [3],
        [4],
    )
    assert step.num_dropped == 6


@pytest.mark.parametrize(
    ("kept", "left", "threshold"),
    [([0.5, 0.9], [0.1, 0.4], 0.5), ([0.5, 0.9], [0.5], 0.5), ([0.3, 0.9], [0.1, 0.4], None), ([0.5], [], 0.5)],
)
def test_a_threshold_is_told_where_there_is_a_single_one(tmp_path, kept, left, threshold):
    tokens = [
        Token(role=0),
        *(Token(score=score) for score in kept),
        *(Token(score=score, selected=False) for score in left),
    ]
    step = read(write_file(tmp_path / "r.parquet", [(0, tokens)]))[1]
    assert math.isnan(step.threshold) if threshold is None else step.threshold == pytest.approx(threshold)


def test_infinite_scores_fall_into_the_outermost_bins(tmp_path):
    scores = [-math.inf, 0.0, 1.0, math.inf]
    figures, step, _, edges = read(
        write_file(tmp_path / "r.parquet", [(0, [Token(role=0), *(Token(score=score) for score in scores)])])
    )
    assert edges is not None and (edges[0], edges[-1]) == (0.0, 1.0)
    assert (step.selected[0], step.selected[-1], step.selected.sum()) == (2, 2, 4)


def test_a_score_on_an_edge_is_in_the_bin_above_it_and_the_highest_in_the_last(tmp_path):
    tokens = [Token(role=0), *(Token(score=float(score)) for score in range(BINS + 1))]
    _, step, _, edges = read(write_file(tmp_path / "r.parquet", [(0, tokens)]))
    assert edges is not None and edges.tolist() == list(range(BINS + 1))
    assert step.selected.tolist() == [1] * (BINS - 1) + [2]


def test_a_sample_without_an_end_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "BATCH_ROWS", 10)
    monkeypatch.setattr(record_files, "LONGEST", 25)
    path = write_file(tmp_path / "r.parquet", [(0, [Token()] * 100)])
    parts = [len(columns["sample"]) for columns, _ in whole_samples(find_records(path)[0], COLUMNS)]
    assert sum(parts) == 100 and max(parts) <= 40
