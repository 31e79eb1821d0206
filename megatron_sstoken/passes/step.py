"""One global batch through megatron's schedule: losses, attention masses, selection, and gradients if training."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.model.attention import SampleBounds
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.loss import BY_TOKEN, LossRule, divide_by_weights, loss_weights, token_weights
from megatron_sstoken.passes.masses import MassTransport, mean_mass, total_mass
from megatron_sstoken.passes.micro_batch import MicroBatch, micro_batch, of_this_rank, to_predicting
from megatron_sstoken.selection.methods import Selection


@dataclass(frozen=True)
class TokenReport:
    """What the last pipeline stage knows of one micro-batch; entry t of every tensor speaks of token t."""

    batch: TokenBatch
    values: Mapping[str, torch.Tensor]
    """Signal → fp32 [T], of what was computed in this pass: `loss` (NaN for first tokens and padding, and for context tokens
    unless the model scores them), `attention` (mean over heads and captured layers of the attention to the context),
    and the `PREDICTION_SIGNALS` that the head was asked for (of the prediction whose loss is `loss`, defined where that is)."""
    selection: Selection | None = None
    weight: torch.Tensor | None = None
    """fp32 [T]: how much the loss of each selected token counts; it may be anything elsewhere. None: all count alike."""
    rho: float = math.nan
    """The share that was asked for, where it was chosen for this batch."""

    @property
    def loss(self) -> torch.Tensor:
        return self.values["loss"]

    @property
    def history_loss(self) -> torch.Tensor | None:
        return self.batch.history_loss


SelectMicroBatch = Callable[[TokenReport], Selection]
"""Selects among the tokens of one micro-batch; may communicate over the data-parallel ranks."""


def select_and_train(
    model: Model,
    batches: list[TokenBatch],
    select: SelectMicroBatch,
    *,
    rule: LossRule = BY_TOKEN,
    whole_gradients: bool = False,
) -> list[TokenReport]:
    """Forward and backward over this rank's micro-batches, selecting between them; leaves the gradient of the batch's loss.

    `select` is called once a micro-batch on the last pipeline stage. All ranks call this with equally many micro-batches.
    With `whole_gradients` every data-parallel rank gets all gradients, not its shard. Returns a report per micro-batch on the
    last stage, nothing elsewhere.
    """
    return _train(model, batches, select, rule, force_all_reduce=whole_gradients)


def train_on(
    model: Model,
    batches: list[TokenBatch],
    selections: list[Selection],
    *,
    rule: LossRule = BY_TOKEN,
    whole_gradients: bool = False,
) -> list[TokenReport]:
    """As `select_and_train`, with selections made beforehand: one a micro-batch on the last stage, none elsewhere.

    The reports tell the losses of selected tokens only: no others are computed.
    """
    # The one wait of this pass: the masks, all at once.
    masks = [selection.mask for selection in selections]
    scored = np.split(torch.cat(masks).cpu().numpy(), np.cumsum([len(mask) for mask in masks])[:-1]) if masks else []
    selections = [replace(one, num_selected=int(mask.sum())) for one, mask in zip(selections, scored, strict=True)]
    following = iter(selections)
    return _train(model, batches, lambda report: next(following), rule, scored, force_all_reduce=whole_gradients)


def _train(
    model: Model,
    batches: list[TokenBatch],
    select: SelectMicroBatch,
    rule: LossRule,
    scored: Sequence[np.ndarray] = (),
    **options: Any,
) -> list[TokenReport]:
    """Forward and backward; gradients are divided by what the rule says."""
    sums: list[torch.Tensor] = []
    reports = _run(model, batches, _training_loss(model, select, rule, sums), scored, forward_only=False, **options)
    if rule.scales_afterwards:
        divide_by_weights(model, sums)
    return reports


def _training_loss(model: Model, select: SelectMicroBatch, rule: LossRule, sums: list[torch.Tensor]) -> Callable:
    """megatron's loss function of one micro-batch: (sum, count, report). Adds to `sums` what `divide_by_weights` takes."""

    def loss_function(losses: torch.Tensor, report: TokenReport, one: MicroBatch):
        with torch.no_grad():
            selection = select(report)
            weight = token_weights(report.values, report.batch, rule)
            weights, counted = loss_weights(selection.mask, weight, report.batch, rule)
            weights = of_this_rank(to_predicting(weights), one.bounds.index)
            one.note_selected(selection.num_selected)
            count = of_this_rank(counted, one.bounds.index).sum(dtype=torch.int)  # each where it lies
            if rule.scales_afterwards:
                sums.append(torch.stack([count.double(), weights.double().sum()]))
        # where, not a product alone: a loss that is not finite on an unselected token must not reach the sum.
        # A weight that is no number, that of a selected token, must.
        total = torch.where(weights != 0, losses * weights, 0.0).sum()
        return total, count, replace(report, selection=selection, weight=weight)

    return loss_function


def score_batch(model: Model, batches: list[TokenBatch], select: SelectMicroBatch | None = None) -> list[TokenReport]:
    """Forward only; with `select` the reports say what it would select. Reports as in `select_and_train`."""

    def loss_function(losses: torch.Tensor, report: TokenReport, one: MicroBatch):
        selection = None if select is None else select(report)
        return (
            losses.sum(),
            torch.zeros((), dtype=torch.int, device=losses.device),
            replace(report, selection=selection),
        )

    with torch.no_grad():
        return _run(model, batches, loss_function, forward_only=True)


def calibrate(model: Model, batches: list[TokenBatch]) -> None:
    """Pass once through the batches for the scales of FP8's delayed recipe alone, if that has not been done.

    They start at 1, too coarse for weights around 0.02, and Transformer Engine renews them only after passes with gradients
    on: a history pass, which has none, would never leave the start.
    """
    if not model.needs_calibration:
        return
    model.needs_calibration = False
    with torch.enable_grad():
        _run(
            model,
            batches,
            lambda losses, report, one: (losses.sum(), losses.new_zeros((), dtype=torch.int), {}),
            forward_only=True,
        )


def _run(
    model: Model,
    batches: list[TokenBatch],
    loss_function: Callable,
    scored: Sequence[np.ndarray] = (),
    **schedule_options: Any,
) -> list[TokenReport]:
    """One pass through the schedule. `scored`: see `micro_batch`; for each, or for none."""
    calibrate(model, batches)
    layout = model.layout
    work = [micro_batch(model, batch, tokens) for batch, tokens in zip_longest(batches, scored)]
    chunk_number = {id(chunk): number for number, chunk in enumerate(model.chunks)}
    num_tokens = batches[0].tokens.shape[1]
    transport = MassTransport(model, num_tokens // layout.context_size)

    def forward_step(iterator, chunk):
        one = next(iterator)
        number = chunk_number[id(chunk)]
        if model.captured_layers:
            model.captures[number].arm(one.context)
        earlier = transport.unload(number)
        output = chunk(
            one.tokens.unsqueeze(0),
            one.position.unsqueeze(0),
            None,
            labels=one.labels.unsqueeze(0),
            packed_seq_params=one.bounds,
        )
        mass = total_mass(earlier, model.captures[number].take())
        return transport.load(number, output, mass), partial(_finish_micro_batch, model, one, mass, loss_function)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(work) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(batches),
        seq_length=num_tokens + transport.num_positions,
        micro_batch_size=1,
        **schedule_options,
    )


def _finish_micro_batch(
    model: Model, one: MicroBatch, mass: torch.Tensor | None, loss_function: Callable, outputs: torch.Tensor
):
    """On the last stage: gather what the head and the attention captures tell over the context parallel ranks, align it with
    tokens, and call the loss function. `outputs`: fp32 [1 + signals, T / cp] of the model; `mass`: of all captured layers."""
    with torch.no_grad():
        known = [*outputs.detach()]
        if model.captured_layers:
            assert mass is not None, "captured layers have a mass"
            known.append(mean_mass(model, mass))
        whole = gather_tokens(torch.stack(known), one.bounds, model.layout)
        told = zip(model.unwrapped[-1].head.told, whole[: len(outputs)], strict=True)
        values = {name: to_predicted(row, one.batch) for name, row in told}
        if model.captured_layers:
            values["attention"] = whole[-1]
        report = TokenReport(one.batch, values)
    return loss_function(outputs[0], report, one)


def gather_tokens(values: torch.Tensor, bounds: SampleBounds, layout: Layout) -> torch.Tensor:
    """[n, T / cp] of each context parallel rank → [n, T] in the samples' order, on all of them."""
    if bounds.gathered_order is None:
        return values
    gathered = [torch.empty_like(values) for _ in range(layout.context_size)]
    dist.all_gather(gathered, values, group=layout.groups.cp)
    return torch.cat(gathered, dim=1).index_select(1, bounds.gathered_order)


def to_predicted(losses: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Move losses from the position that predicts to the token that is predicted; NaN where there is none."""
    moved = torch.full_like(losses, torch.nan)
    moved[1:] = losses[:-1]
    return torch.where((batch.position > 0) & (batch.segment >= 0), moved, torch.nan)
