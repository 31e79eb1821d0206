"""The one-token shift between losses and tokens, and what a step hands to megatron's schedule."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sstoken.model.attention import AttentionCapture, SampleBounds, sample_bounds
from megatron_sstoken.model.head import HeadOptions
from megatron_sstoken.passes import step
from megatron_sstoken.passes.loss import LossRule
from megatron_sstoken.passes.step import (
    TokenReport,
    of_this_rank,
    score_batch,
    select_and_train,
    to_predicted,
    to_predicting,
    train_on,
)
from megatron_sstoken.selection.methods import Selection
from megatron_sstoken.selection.weights import find_weight
from tests.helpers.token_batches import TURNS, indices, make_batch, make_selector

ROLES = st.lists(st.integers(0, 1), min_size=1, max_size=9)


def naive_predicted(losses: torch.Tensor, batch) -> list[float | None]:
    """For every token the loss at the position before it in its sample, if there is one."""
    result: list[float | None] = []
    for t in range(len(losses)):
        first = batch.segment[t] < 0 or batch.position[t] == 0
        result.append(None if first else float(losses[t - 1]))
    return result


@given(roles=st.lists(ROLES, min_size=1, max_size=4), spare=st.integers(0, 3), data=st.data())
@settings(max_examples=60)
def test_shifts_are_inverse_and_stay_inside_samples(roles, spare, data):
    batch = make_batch(roles, max(map(len, roles)) + spare)
    size = len(batch.position)
    losses = torch.arange(size, dtype=torch.float32)
    predicted = to_predicted(losses, batch)
    assert [None if value.isnan() else float(value) for value in predicted] == naive_predicted(losses, batch)
    chosen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    mask = chosen & batch.response
    predicting = to_predicting(mask)
    assert torch.equal(losses[predicting], predicted[mask]), "the trained losses are those of the selected tokens"
    last_of_sample = torch.cat([batch.segment[1:] != batch.segment[:-1], torch.tensor([True])])
    assert not (predicting & ((batch.segment < 0) | last_of_sample)).any()


def test_values_of_other_samples_do_not_leak():
    batch = make_batch(TURNS, 6)
    losses = torch.full((18,), torch.inf)  # the first row is full: its last position borders on the next sample
    losses[:5] = torch.arange(5)
    predicted = to_predicted(losses, batch)
    assert predicted[:6].isnan().tolist() == [True] + [False] * 5
    assert predicted[1:6].tolist() == [0, 1, 2, 3, 4] and predicted[6].isnan()
    assert predicted[10:12].isnan().all(), "padding has no loss"


def test_to_predicting_moves_one_to_the_left():
    mask = torch.tensor([True, False, True, True, False])
    assert to_predicting(mask).tolist() == [False, True, True, False, False]
    assert mask.tolist() == [True, False, True, True, False]


def test_of_this_rank():
    values = torch.arange(16)
    assert of_this_rank(values, None) is values
    ranks = [sample_bounds([8, 4, 4], 2, rank) for rank in range(2)]
    parts = [of_this_rank(values, bounds.index) for bounds in ranks]
    assert parts[0].tolist() == [0, 1, 6, 7, 8, 11, 12, 15] and parts[1].tolist() == [
        2,
        3,
        4,
        5,
        9,
        10,
        13,
        14,
    ]
    assert torch.equal(torch.cat(parts)[ranks[0].gathered_order], values)


class Chunk(torch.nn.Module):
    """A model that returns given losses, one row of them for every call, and notes what it is called with."""

    def __init__(self, losses: list[torch.Tensor]):
        super().__init__()
        self.losses = torch.nn.ParameterList(row.unsqueeze(0).clone() for row in losses)
        self.calls: list[tuple] = []
        self.head = HeadOptions(99)

    def forward(self, tokens, position, attention_mask, *, labels, packed_seq_params):
        self.calls.append((tokens, position, attention_mask, labels, packed_seq_params))
        return self.losses[len(self.calls) - 1]

    def scale_gradients(self, factor):
        for row in self.losses:
            row.grad *= factor


def run_as_megatron(monkeypatch, chunk: Chunk, **model):
    """A model around `chunk`, and the list in which a plain schedule leaves (sum, count) of every micro-batch."""
    handed = []

    def schedule(*, forward_step_func, data_iterator, model, num_microbatches, forward_only, **_options):
        reports = []
        for _ in range(num_microbatches):
            output, loss_function = forward_step_func(data_iterator[0], model[0])
            total, count, report = loss_function(output)
            if not forward_only:
                total.backward()
            handed.append((total.detach(), count))
            reports.append(report)
        return reports

    monkeypatch.setattr(step, "get_forward_backward_func", lambda: schedule)
    layout = SimpleNamespace(context_size=1, context_rank=0, pipeline_size=1)
    whole = {
        "chunks": [chunk],
        "unwrapped": [chunk],
        "captures": [AttentionCapture()],
        "captured_layers": (),
        "layout": layout,
    }
    defaults = {"scores_context": False, "needs_calibration": False, "head_rows": lambda scored: None}
    return SimpleNamespace(**(whole | defaults | model)), handed


def select_these(*masks: list[int]) -> list[Selection]:
    """Selections made beforehand, one a micro-batch."""
    masked = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    return [Selection(mask, *(torch.zeros(len(mask)) for _ in range(3))) for mask in masked]


def test_select_and_train_sums_the_selected_losses(monkeypatch):
    batches = [make_batch(TURNS, 8, seed=1), make_batch([[0, 1, 1]], 8, first_sample=50, seed=2)]
    values = [torch.rand(24) + 1, torch.rand(8) + 1]
    chunk = Chunk(values)
    model, handed = run_as_megatron(monkeypatch, chunk)
    reports = select_and_train(model, batches, make_selector(method="random", rho=0.5))
    assert [int(count) for _, count in handed] == [4, 1]
    for batch, row, parameter, report, (total, count) in zip(
        batches, values, chunk.losses, reports, handed, strict=True
    ):
        assert not count.is_floating_point(), "megatron counts tokens in integers"
        trained = [t - 1 for t in indices(report.selection.mask)]
        assert float(total) == pytest.approx(float(row[trained].sum()), rel=1e-6)
        assert indices(parameter.grad[0]) == trained and set(parameter.grad[0].tolist()) <= {0.0, 1.0}
        assert report.batch.sample.tolist() == batch.sample.tolist()
        assert torch.equal(report.loss.nan_to_num(-1), to_predicted(row, batch).nan_to_num(-1))
        assert not report.loss.requires_grad


# Samples of rows of 4: two response tokens, three (one of them not selected), none selected; then one alone.
ROWS = [[0, 1, 1], [0, 1, 1, 1], [0, 1]]
SELECTED = [0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("average", "weights", "counts"),
    [
        ("token", ([1, 1, 1, 1], [1]), (4, 1)),
        ("sample", ([1 / 2, 1 / 2, 1 / 2, 1 / 2], [1]), (3, 1)),
        ("microbatch", ([1 / 4, 1 / 4, 1 / 4, 1 / 4], [1]), (1, 1)),
    ],
)
def test_averages(monkeypatch, average, weights, counts):
    """Selections made beforehand are used in order; fractions go into the weights, never into the counts."""
    chunk = Chunk([torch.rand(12) + 1, torch.rand(4) + 1])
    model, handed = run_as_megatron(monkeypatch, chunk)
    batches = [make_batch(ROWS, 4), make_batch([[0, 0, 1]], 4, first_sample=9)]
    reports = train_on(model, batches, select_these(SELECTED, [0, 0, 1, 0]), rule=LossRule(average))
    trained = [0, 1, 4, 6], [1]  # the positions that predict the selected tokens
    for parameter, at, wanted, (total, count), number, report in zip(
        chunk.losses, trained, weights, handed, counts, reports, strict=True
    ):
        expected = torch.zeros_like(parameter[0])
        expected[list(at)] = torch.tensor(wanted, dtype=torch.float32)
        torch.testing.assert_close(parameter.grad[0], expected)
        assert float(total) == pytest.approx(float((parameter[0].detach() * expected).sum()), rel=1e-6)
        assert int(count) == number and count.dtype == torch.int and report.selection.mask.any()


@pytest.mark.parametrize("of_the_data", [False, True])
@pytest.mark.parametrize("divisor", ["selected", "response", "weight"])
def test_soft_weights_over_micro_batches_of_very_different_lengths(monkeypatch, alone, divisor, of_the_data):
    """2, 300 and no response tokens: the gradient of each loss is that of the whole batch, its weight being a constant."""
    lengths, generator = (3, 301, 0), torch.Generator().manual_seed(1)
    batches = [make_batch([[0] + [1] * (n - 1)] if n else [], 304, num_rows=1, first_sample=n) for n in lengths]
    if of_the_data:
        batches = [replace(one, weight=one.response * (0.3 + 1.4 * (one.position % 2))) for one in batches]
    chunk = Chunk([6 * torch.rand(304, generator=generator) for _ in lengths])
    layout = SimpleNamespace(
        context_size=1, context_rank=0, pipeline_size=1, groups=SimpleNamespace(dp_cp=alone, pp=alone)
    )
    model, handed = run_as_megatron(monkeypatch, chunk, layout=layout)
    rule = LossRule("token", divisor, find_weight("power").at(1.7))
    reports = select_and_train(model, batches, make_selector(method="random", rho=0.4), rule=rule)
    found = torch.cat([row.grad[0] for row in chunk.losses]) / sum(int(count) for _, count in handed)

    trained, weights, num_response = [], [], 0
    for number, (batch, report) in enumerate(zip(batches, reports, strict=True)):
        num_response += int(batch.response.sum())
        for t in indices(report.selection.mask):
            loss = float(report.loss[t])
            weights.append(math.exp(-1.7 * loss) * (0.3 + 1.4 * (batch.position[t] % 2) if of_the_data else 1))
            trained.append(304 * number + t - 1)
            assert float(report.weight[t]) == pytest.approx(float(weights[-1]), rel=1e-5)
    assert len(trained) == 1 + 120 and num_response == 302
    divided_by = {"selected": len(trained), "response": num_response, "weight": sum(weights)}[divisor]
    expected = torch.zeros(3 * 304)
    expected[trained] = torch.tensor(weights) / divided_by
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", [torch.nan, torch.inf])
def test_a_selected_loss_that_is_not_finite(monkeypatch, loss):
    """p is no number where the loss is none, and that shows; it is 0 where the loss is infinite, and so is p · loss."""
    losses = torch.full((4,), 1.0)
    losses[1] = loss
    chunk = Chunk([losses])
    model, handed = run_as_megatron(monkeypatch, chunk)
    rule = LossRule(weigh=find_weight("power").at(1.0))
    (report,) = select_and_train(model, [make_batch([[0, 0, 1, 1]], 4)], make_selector(method="full"), rule=rule)
    assert float(handed[0][0]) == pytest.approx(math.nan if math.isnan(loss) else math.exp(-1), nan_ok=True)
    assert report.loss[2].isnan() if math.isnan(loss) else report.loss[2].isinf()


def labels_by_hand(batch, scored) -> list[int]:
    """The next token where that one gets a loss, else torch's ignore_index."""
    following = [*range(1, len(scored)), None]
    return [-100 if t is None or not scored[t] else int(batch.tokens[0, t]) for t in following]


def test_labels_name_the_tokens_that_get_a_loss(monkeypatch):
    """Response tokens; all but first tokens where context is scored, too; those selected beforehand."""
    batch = make_batch([[0, 0, 1], [0, 1, 0, 1], [0, 1]], 4)
    after_the_first = (batch.position > 0) & (batch.segment >= 0)
    selection = select_these([0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0])
    assert after_the_first.sum() > batch.response.sum() > selection[0].mask.sum()
    for options, run, scored in [
        ({}, lambda model: score_batch(model, [batch]), batch.response),
        ({"scores_context": True}, lambda model: score_batch(model, [batch]), after_the_first),
        ({}, lambda model: train_on(model, [batch], selection), selection[0].mask),
    ]:
        chunk = Chunk([torch.rand(12)])
        run(run_as_megatron(monkeypatch, chunk, **options)[0])
        assert chunk.calls[0][3].tolist() == [labels_by_hand(batch, scored)]


def test_the_model_gets_the_batch_and_its_bounds(monkeypatch):
    batch = make_batch(TURNS, 8)
    chunk = Chunk([torch.zeros(24)])
    model, _ = run_as_megatron(monkeypatch, chunk)
    select_and_train(model, [batch], make_selector(method="full"))
    ((tokens, position, attention_mask, labels, bounds),) = chunk.calls
    assert torch.equal(tokens, batch.tokens) and attention_mask is None
    assert labels.tolist() == [labels_by_hand(batch, batch.response)]
    assert torch.equal(position, batch.position.unsqueeze(0))
    assert isinstance(bounds, SampleBounds) and bounds.lengths == batch.lengths == [6, 2, 4, 4, 2, 6]


@pytest.mark.parametrize("average", ["token", "sample", "microbatch"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_and_not_selected_stays_out(monkeypatch, bad, average):
    batch = make_batch([[0, 0, 1, 1]], 8)
    losses = torch.full((8,), bad)
    losses[1:3] = 1.0  # what predicts tokens 2 and 3
    chunk = Chunk([losses])
    model, handed = run_as_megatron(monkeypatch, chunk)
    select_and_train(model, [batch], make_selector(method="full"), rule=LossRule(average))
    weight = 1.0 if average == "token" else 0.5
    assert float(handed[0][0]) == 2 * weight and int(handed[0][1]) == (2 if average == "token" else 1)
    assert chunk.losses[0].grad.tolist() == [[0, weight, weight, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("average", ["token", "sample", "microbatch"])
def test_a_micro_batch_without_samples(monkeypatch, average):
    chunk = Chunk([torch.rand(8)])
    model, handed = run_as_megatron(monkeypatch, chunk)
    batch = make_batch([], 8, num_rows=1)
    select_and_train(model, [batch], make_selector(method="random"), rule=LossRule(average))
    assert float(handed[0][0]) == 0.0 and int(handed[0][1]) == 0
    assert not chunk.losses[0].grad.any()


def test_score_batch_selects_only_on_demand(monkeypatch):
    batch = make_batch(TURNS, 8)
    for choose, selected in ((None, None), (make_selector(method="full"), batch.response)):
        chunk = Chunk([torch.rand(24)])
        model, handed = run_as_megatron(monkeypatch, chunk)
        (report,) = score_batch(model, [batch], choose)
        assert isinstance(report, TokenReport) and int(handed[0][1]) == 0
        assert report.selection is None if selected is None else torch.equal(report.selection.mask, selected)
        assert torch.equal(report.loss[batch.response], to_predicted(chunk.losses[0][0], batch)[batch.response])


@pytest.fixture
def alone():
    """A process group of this process only."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_attention_is_the_mean_over_heads_and_measured_layers(monkeypatch, alone):
    """Layers leave their masses, summed over heads, in the capture, which is armed with the batch's context."""
    batches = [make_batch(TURNS, 8, seed=seed) for seed in range(2)]
    chunk = Chunk([torch.rand(24), torch.rand(24)])
    masses = torch.rand(2, 2, 24)
    layout = SimpleNamespace(context_size=1, context_rank=0, pipeline_size=1, groups=SimpleNamespace(tp=alone))
    model, _ = run_as_megatron(
        monkeypatch,
        chunk,
        layout=layout,
        captured_layers=(2, 4),
        architecture=SimpleNamespace(num_attention_heads=4),
    )
    (capture,) = model.captures
    contexts = []

    def attend(*_):
        contexts.append(capture.context)
        capture.masses |= {2: masses[len(chunk.calls), 0], 4: masses[len(chunk.calls), 1]}

    chunk.register_forward_pre_hook(attend)
    reports = select_and_train(model, batches, make_selector(method="attention", gamma=0.0))
    for number, (report, batch) in enumerate(zip(reports, batches, strict=True)):
        assert torch.equal(contexts[number], batch.context)
        torch.testing.assert_close(report.values["attention"], (masses[number, 0] + masses[number, 1]) / 8)
    assert capture.context is None and capture.masses == {}


def test_delayed_scales_are_found_once_before_the_first_pass_with_gradients_on(monkeypatch):
    batch = make_batch(TURNS, 8)
    with_gradients = []

    class Recording(Chunk):
        def __call__(self, *arguments, **keywords):
            with_gradients.append(torch.is_grad_enabled())
            return super().__call__(*arguments, **keywords)

    model, _ = run_as_megatron(monkeypatch, Recording([torch.rand(24)] * 4), needs_calibration=True)
    for _ in range(2):
        (report,) = score_batch(model, [batch])
        assert isinstance(report, TokenReport)
    assert with_gradients == [True, False, False]
