"""Global sums and quantiles against numpy, and operations against a count by hand."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.config import ParallelSettings
from megatron_sstoken.data.batches import Visits
from megatron_sstoken.data.sources import Sources
from megatron_sstoken.model.families import Architecture, read_architecture
from megatron_sstoken.training.metrics import QUANTILES, StepMetrics, summarize, training_flops
from tests.helpers.distributed_runner import run_distributed
from tests.helpers.token_batches import make_batch, make_report
from tests.helpers.workbench import load_model, make_model

TINY = Architecture(
    family="llama",
    hidden_size=8,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=3,
    ffn_hidden_size=10,
    vocabulary_size=7,
    max_positions=64,
    norm_epsilon=1e-6,
    rope_base=1e4,
    rope_scaling=None,
    tied_embeddings=False,
    qkv_bias=False,
)


@pytest.fixture(scope="module")
def layout():
    """A layout of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    yield SimpleNamespace(
        is_last_stage=True, data=group, data_size=1, last_stage_rank=0, groups=SimpleNamespace(pp=group)
    )
    dist.destroy_process_group()


def make_reports(seed: int = 0, scale: int = 1, **options):
    """Two micro-batches of different numbers of tokens."""
    roles = [[[0] * 3 + [1] * 20 * scale, [0, 1, 0, 1, 1]], [[1] + [0] * 2 + [1] * 9 * scale]]
    return [
        make_report(make_batch(part, 32 * scale, num_rows=2, seed=seed + number), seed=seed + number, **options)
        for number, part in enumerate(roles)
    ]


def response_values(reports) -> dict[str, np.ndarray]:
    """Of the response tokens of all reports: loss, REL, attention and whether selected."""
    columns: dict[str, list] = {"loss": [], "rel": [], "attention": [], "selected": []}
    for report in reports:
        for t in range(len(report.loss)):
            if report.batch.response[t]:
                columns["loss"].append(float(report.loss[t]))
                columns["rel"].append(float(report.batch.history_loss[t]) - float(report.loss[t]))
                columns["attention"].append(float(report.values["attention"][t]))
                columns["selected"].append(bool(report.selection.mask[t]))
    return {name: np.array(values) for name, values in columns.items()}


def check_sums(metrics: StepMetrics, values: dict[str, np.ndarray]) -> None:
    loss, selected = values["loss"], values["selected"]
    assert 0 < selected.sum() < len(selected)
    assert metrics.loss_selected == pytest.approx(loss[selected].mean(), rel=1e-6)
    assert metrics.loss_all == pytest.approx(loss.mean(), rel=1e-6)
    assert metrics.loss_dropped == pytest.approx(loss[~selected].mean(), rel=1e-6)
    assert metrics.dropped_excess == pytest.approx(-values["rel"][~selected].astype(np.float64).mean(), rel=1e-5)
    assert (metrics.num_selected, metrics.num_response) == (selected.sum(), len(loss))
    assert metrics.share_selected == selected.mean()


def test_one_process(layout):
    reports = make_reports()
    metrics = summarize(reports, TINY, layout)
    values = response_values(reports)
    check_sums(metrics, values)
    assert (metrics.num_tokens, metrics.num_positions) == (23 + 5 + 12, 4 * 32)
    assert metrics.model_flops == sum(training_flops(report.batch, TINY) for report in reports)
    np.testing.assert_allclose(metrics.rel_quantiles, np.quantile(values["rel"], QUANTILES), rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        metrics.attention_quantiles, np.quantile(values["attention"], QUANTILES), rtol=0, atol=1e-6
    )


def test_without_selection_every_response_token_counts(layout):
    reports = make_reports(selected=False)
    metrics = summarize(reports, TINY, layout)
    assert metrics.num_selected == metrics.num_response == 20 + 3 + 9
    assert metrics.loss_selected == metrics.loss_all and math.isnan(metrics.loss_dropped)
    assert metrics.share_selected == 1.0


def test_weights_of_selected_tokens(layout):
    reports, chosen = [], []
    for number, report in enumerate(make_reports()):
        weight = 2 * torch.rand(len(report.loss), generator=torch.Generator().manual_seed(number))
        mask = report.selection.mask
        chosen += weight[mask].tolist()
        reports.append(dataclasses.replace(report, weight=torch.where(mask, weight, torch.nan)))
    metrics = summarize(reports, TINY, layout)
    check_sums(metrics, response_values(reports))  # losses carry no weight
    assert metrics.weight_mean == pytest.approx(np.mean(chosen), rel=1e-6)
    assert metrics.weight_share == pytest.approx(sum(chosen) ** 2 / np.sum(np.square(chosen)) / len(chosen), rel=1e-6)
    alike = summarize(make_reports(), TINY, layout)
    assert math.isnan(alike.weight_mean) and math.isnan(alike.weight_share)


def test_without_history_and_attention(layout):
    report = make_report(make_batch([[0, 1, 1]], 4, history=False), attention=False)
    metrics = summarize([report], TINY, layout)
    assert np.isnan(metrics.rel_quantiles).all() and np.isnan(metrics.attention_quantiles).all()
    assert math.isnan(metrics.dropped_excess)
    assert len(metrics.rel_quantiles) == len(QUANTILES) and metrics.num_response == 2


def test_without_response_tokens(layout):
    metrics = summarize([make_report(make_batch([[0, 0]], 4, num_rows=2))], TINY, layout)
    assert (metrics.num_selected, metrics.num_response, metrics.num_tokens, metrics.num_positions) == (
        0,
        0,
        2,
        8,
    )
    losses = (metrics.loss_selected, metrics.loss_all, metrics.loss_dropped, metrics.share_selected)
    assert np.isnan(losses).all() and np.isnan(metrics.rel_quantiles).all()


def test_a_loss_that_is_not_finite_on_a_dropped_token(layout):
    report = make_report(make_batch([[0, 1, 1, 1]], 4))
    mask = torch.tensor([False, True, True, False])
    loss = torch.tensor([torch.nan, 1.0, 3.0, torch.inf])
    selection = dataclasses.replace(report.selection, mask=mask)
    metrics = summarize([dataclasses.replace(report, values={"loss": loss}, selection=selection)], TINY, layout)
    assert metrics.loss_selected == 2.0 and math.isinf(metrics.loss_all)


def metrics_on_ranks(rank: int) -> list[StepMetrics]:
    """Data parallel with different reports on each rank, with none on one rank, and pipeline parallel."""
    from megatron_sstoken.parallel import create_layout, reset_layout

    layout = create_layout(ParallelSettings(), seed=0)
    assert layout.data_size == 2
    results = [summarize(make_reports(seed=10 * rank, scale=1 + 9 * rank), TINY, layout)]
    empty = [make_report(make_batch([], 32, num_rows=2))]
    results.append(summarize(make_reports() if rank == 0 else empty, TINY, layout))
    reset_layout()
    layout = create_layout(ParallelSettings(pipeline=2), seed=0)
    results.append(summarize(make_reports() if layout.is_last_stage else [], TINY, layout))
    reset_layout()
    return results


def same(first: StepMetrics, second: StepMetrics) -> bool:
    return repr(first) == repr(second)


def test_two_ranks(layout):
    first, second = run_distributed(metrics_on_ranks, 2)
    assert all(same(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    both = make_reports() + make_reports(seed=10, scale=10)
    values = response_values(both)
    together, with_nothing, pipeline = first
    check_sums(together, values)
    assert together.num_tokens == 40 + 203 + 5 + 93 and together.num_positions == 4 * 32 + 4 * 320
    assert together.model_flops == pytest.approx(sum(training_flops(report.batch, TINY) for report in both))
    # merged from the percentiles of each rank: a few percent off in rank
    for quantiles, name in ((together.rel_quantiles, "rel"), (together.attention_quantiles, "attention")):
        below = [(values[name] <= value + 1e-6).mean() for value in quantiles]
        np.testing.assert_allclose(below, QUANTILES, rtol=0, atol=0.03)
    alone = summarize(make_reports(), TINY, layout)
    assert with_nothing.rel_quantiles == alone.rel_quantiles and with_nothing.num_positions == 4 * 32 + 64
    assert with_nothing.loss_selected == alone.loss_selected
    assert same(pipeline, alone), "the last stage tells the first"


SOURCES = Sources(("a", "b", "c"), np.array([0, 2, 1, 0, 2]))


def of_sources(reports, indices):
    """The reports with batches that hold samples of these numbers in the store; and what the sources' sums must be."""
    made, wanted = [], {name: [0.0, 0] for name in SOURCES.names}
    for report, index in zip(reports, indices, strict=True):
        visits = Visits(index, [0] * len(index), (0, 0))
        made.append(dataclasses.replace(report, batch=dataclasses.replace(report.batch, visits=visits)))
        for t in np.flatnonzero(report.batch.response.numpy()):
            sums = wanted[SOURCES.names[SOURCES.of_sample[index[int(report.batch.segment[t])]]]]
            sums[0] += float(report.loss[t].double())
            sums[1] += 1
    return made, wanted


def check_sources(metrics: StepMetrics, *wanted: dict[str, list]) -> None:
    assert list(metrics.of_sources) == list(SOURCES.names)
    for name, (total, count) in metrics.of_sources.items():
        assert total == pytest.approx(sum(one[name][0] for one in wanted), rel=1e-12)
        assert count == sum(one[name][1] for one in wanted)


def test_losses_of_sources(layout):
    reports, wanted = of_sources(make_reports(), [[4, 2], [1]])
    metrics = summarize(reports, TINY, layout, SOURCES)
    check_sources(metrics, wanted)
    assert math.isnan(metrics.source_losses["a"]) and metrics.source_losses["b"] == pytest.approx(
        wanted["b"][0] / wanted["b"][1]
    )
    without = summarize(reports, TINY, layout)
    assert not without.of_sources and repr(dataclasses.replace(metrics, of_sources={})) == repr(without)


def test_mean_history_loss(layout):
    reports = make_reports()
    history = np.concatenate([r.batch.history_loss[r.batch.response].numpy() for r in reports]).astype(np.float64)
    assert summarize(reports, TINY, layout).loss_history == pytest.approx(history.mean(), rel=1e-6)
    first = reports[0].batch.history_loss.clone()
    first[reports[0].batch.segment == 0] = torch.nan  # a first visit
    known = torch.cat([first[reports[0].batch.response], reports[1].batch.history_loss[reports[1].batch.response]])
    reports[0] = dataclasses.replace(reports[0], batch=dataclasses.replace(reports[0].batch, history_loss=first))
    wanted = np.nanmean(known.numpy().astype(np.float64))
    assert summarize(reports, TINY, layout).loss_history == pytest.approx(wanted, rel=1e-6)
    without = make_report(make_batch([[0, 1, 1]], 4, history=False), attention=False)
    assert math.isnan(summarize([without], TINY, layout).loss_history)


def counted(function, name: str, calls: list[str]):
    def call(*arguments, **keywords):
        calls.append(name)
        return function(*arguments, **keywords)

    return call


def sources_on_ranks(rank: int) -> list:
    """Data parallel with other samples on each rank, with none on one, and pipeline parallel: collectives are counted."""
    from megatron_sstoken.parallel import create_layout, reset_layout

    results = []
    for options in ({}, {"pipeline": 2}):
        layout = create_layout(ParallelSettings(**options), seed=0)
        mine = of_sources(make_reports(), [[4, 2], [1]])[0] if rank == 0 else of_rank_1()[0]
        mine = mine if layout.is_last_stage else []
        calls: list[str] = []
        with pytest.MonkeyPatch.context() as patch:
            for name in ("all_reduce", "all_gather", "broadcast"):
                own = getattr(dist, name)
                patch.setattr(dist, name, counted(own, name, calls))
            results.append(summarize(mine, TINY, layout, SOURCES))
            with_sources, calls[:] = [*calls], []
            summarize(mine, TINY, layout)
        assert with_sources == calls, "no further collective"
        reset_layout()
    return results


def of_rank_1():
    reports = [*make_reports(seed=10), make_report(make_batch([], 32, num_rows=2))]
    return of_sources(reports, [[0, 0], [3], []])


def test_losses_of_sources_on_two_ranks():
    """As those of one process that has the samples of both."""
    first, second = run_distributed(sources_on_ranks, 2)
    assert all(same(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    ours, theirs = of_sources(make_reports(), [[4, 2], [1]])[1], of_rank_1()[1]
    check_sources(first[0], ours, theirs)
    check_sources(first[1], theirs)


def test_flops_by_hand():
    # q 8·12, k and v 8·6, o 12·8, gate, up and down 8·10, two norms of 8; the head 8·7 and the last norm
    layer = 8 * 12 + 2 * 8 * 6 + 12 * 8 + 3 * 8 * 10 + 2 * 8
    weights = 2 * layer + 8 * 7 + 8
    batch = make_batch([[0, 1, 1], [0, 0, 0, 1, 1]], 8)
    pairs = (1 + 2 + 3) + (1 + 2 + 3 + 4 + 5)
    # query·key and probability·value, a multiplication and an addition each, forward and twice that backward
    attention = 3 * (2 + 2) * 3 * 4 * 2 * pairs
    assert training_flops(batch, TINY) == 6 * weights * 8 + attention
    assert training_flops(make_batch([], 8, num_rows=1), TINY) == 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_flops_count_the_models_parameters(family, tmp_path):
    """6 a token and parameter, but none for looking up an embedding that is not the head as well."""
    path = make_model(tmp_path / family, family)
    model = load_model(path)
    parameters = sum(p.numel() for p in model.parameters())
    if not model.config.tie_word_embeddings:
        parameters -= model.model.embed_tokens.weight.numel()
    attention = 12 * 4 * 8 * 4 * (1 + 2 + 3)
    found = training_flops(make_batch([[0, 1, 1]], 4), read_architecture(path))
    assert found == 6 * parameters * 3 + attention
