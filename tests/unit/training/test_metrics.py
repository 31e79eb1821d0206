"""Global sums and quantiles against numpy, operations against a count by hand, and the step log."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sstoken.config import ParallelSettings
from megatron_sstoken.model.families import Architecture, read_architecture
from megatron_sstoken.training.metrics import QUANTILES, StepLogger, StepMetrics, summarize, training_flops
from tests.helpers.cli import scalars
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


def metrics_with(**changes) -> StepMetrics:
    values = {
        "loss_selected": 1.5,
        "loss_all": 1.25,
        "loss_dropped": 1.0,
        "dropped_excess": -0.5,
        "num_selected": 30,
        "num_response": 60,
        "num_tokens": 100,
        "num_positions": 400,
        "model_flops": 1e9,
        "rel_quantiles": (0.1, 0.2, 0.3, 0.4, 0.5),
        "attention_quantiles": (0.6, 0.7, 0.8, 0.9, 1.0),
    }
    return StepMetrics(**(values | changes))


RANK_0 = SimpleNamespace(rank=0, world_size=2)


def test_log_prints_every_few_steps_and_the_last(tmp_path, capsys):
    logger = StepLogger(str(tmp_path), 2, 5, RANK_0)
    for number in range(1, 6):
        logger.step(number, metrics_with(), 0.5, 1e-4)
    logger.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" |")[0] for line in lines] == ["step 2/5", "step 4/5", "step 5/5"]
    for part in (
        "loss 1.5000 (all 1.2500, dropped 1.0000)",
        "selected 50.0 %",
        "grad norm 0.500",
        "lr 1.000e-04",
        "tokens/s",
        "TFLOP/s",
    ):
        assert part in lines[0]
    assert lines[2].endswith("ETA 0:00:00")
    assert scalars(tmp_path, "loss/selected") == {2: 1.5, 4: 1.5, 5: 1.5}
    assert scalars(tmp_path, "selection/share")[2] == 0.5 and scalars(tmp_path, "data/real_share")[2] == 0.25
    assert scalars(tmp_path, "optimizer/gradient_norm")[2] == 0.5
    assert scalars(tmp_path, "rel/q05")[2] == pytest.approx(0.1)
    assert scalars(tmp_path, "attention/q95")[2] == pytest.approx(1.0)
    speed = scalars(tmp_path, "speed/tokens_per_second")[4] * scalars(tmp_path, "speed/step_seconds")[4]
    assert speed == pytest.approx(100, rel=1e-3), "real tokens, not positions"
    ratio = scalars(tmp_path, "speed/model_tflops")[4] / scalars(tmp_path, "speed/model_tflops_per_process")[4]
    assert ratio == pytest.approx(2.0, rel=1e-3)


def test_log_leaves_out_what_is_undefined(tmp_path):
    logger = StepLogger(str(tmp_path), 1, 2, RANK_0)
    logger.step(1, metrics_with(loss_dropped=math.nan), 0.5, 1e-4)
    logger.step(2, metrics_with(), 0.5, 1e-4)
    logger.close()
    assert scalars(tmp_path, "loss/dropped") == {2: 1.0} and set(scalars(tmp_path, "loss/all")) == {1, 2}


def test_other_ranks_hold_their_peace(tmp_path, capsys):
    logger = StepLogger(str(tmp_path / "logs"), 1, 2, SimpleNamespace(rank=1, world_size=2))
    logger.step(1, metrics_with(), 0.5, 1e-4)
    logger.say("something")
    logger.scalars(1, {"loss/validation": 1.0})
    logger.close()
    assert capsys.readouterr().out == "" and not (tmp_path / "logs").exists()
