"""A global batch in numbers: sums and quantiles over all ranks."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.data.sources import NO_SOURCES, Sources
from megatron_sstoken.device import compute_device, have_cuda, to_compute_device
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.flops import causal_pairs, model_flops
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.selection.topk import NO_TOKEN, nan_error

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PERCENTILES = 101
_NUM_SUMS = 12
"""Sums that every step has, in the order of `_sums_of`."""


@dataclass(frozen=True)
class StepMetrics:
    """A global batch in numbers, the same on every rank. Losses are means in nats; NaN where there is no token."""

    loss_selected: float
    loss_all: float
    loss_dropped: float
    dropped_excess: float
    """Mean over the dropped tokens of loss − history loss; NaN without history."""
    num_selected: int
    num_response: int
    num_tokens: int
    """Real tokens: no padding."""
    num_positions: int
    """Positions computed, padding included."""
    model_flops: float
    """Floating-point operations of one forward and backward pass over the real tokens."""
    rel_quantiles: tuple[float, ...]
    """Of the retrospective excess loss (nat) over the response tokens, at `QUANTILES`; NaN without history."""
    attention_quantiles: tuple[float, ...]
    rho: float = math.nan
    """The share chosen for this batch; NaN where the settings fix it and nothing had to be scored beforehand."""
    weight_mean: float = math.nan
    """Of the weights w of the selected tokens; NaN where all count alike."""
    weight_share: float = math.nan
    """(Σ w)² ÷ Σ w² ÷ the number of selected tokens: the share of them that, each counting alike, would say as much."""
    loss_history: float = math.nan
    """Mean history loss of the response tokens that have one."""
    of_sources: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    """Source → sum of the losses of its response tokens, and their number."""

    @property
    def share_selected(self) -> float:
        return self.num_selected / self.num_response if self.num_response else math.nan

    @property
    def source_losses(self) -> dict[str, float]:
        """Source → mean loss of its response tokens; NaN where it has none here."""
        return {name: total / count if count else math.nan for name, (total, count) in self.of_sources.items()}


@dataclass(frozen=True)
class PendingMetrics:
    """The numbers of a global batch on their way to the host."""

    _sources: tuple[str, ...]
    _numbers: torch.Tensor
    """int64 on the host; floats as their bits. Not to be read before `_arrival`."""
    _arrival: torch.cuda.Event | None

    def read(self) -> StepMetrics:
        """The metrics; waits for the device if it is not yet so far. Raises ValueError, on all ranks, where a score is NaN."""
        if self._arrival is not None and not self._arrival.query():
            self._arrival.synchronize()
        first_nan = int(self._numbers[0])
        if first_nan != NO_TOKEN:
            raise nan_error(first_nan)
        sums = self._numbers[1:].view(torch.float64).tolist()
        selected_loss, response_loss, excess, selected, weight, squares, history, with_history = sums[:8]
        response, tokens, positions, flops = sums[8:_NUM_SUMS]
        stop = _NUM_SUMS + len(self._sources)
        source_losses, source_counts = sums[_NUM_SUMS:stop], sums[stop : stop + len(self._sources)]
        rho, *percentiles = sums[stop + len(self._sources) :]
        at = [round(quantile * (_PERCENTILES - 1)) for quantile in QUANTILES]
        rel, attention = percentiles[:_PERCENTILES], percentiles[_PERCENTILES:]
        return StepMetrics(
            loss_selected=selected_loss / selected if selected else math.nan,
            loss_all=response_loss / response if response else math.nan,
            loss_dropped=(response_loss - selected_loss) / (response - selected) if response > selected else math.nan,
            dropped_excess=excess / (response - selected) if response > selected else math.nan,
            num_selected=int(selected),
            num_response=int(response),
            num_tokens=int(tokens),
            num_positions=int(positions),
            model_flops=flops,
            rel_quantiles=tuple(rel[index] for index in at),
            attention_quantiles=tuple(attention[index] for index in at),
            rho=rho,
            weight_mean=weight / selected if selected else math.nan,
            weight_share=weight**2 / squares / selected if squares else math.nan,
            loss_history=history / with_history if with_history else math.nan,
            of_sources={
                name: (loss, int(count))
                for name, loss, count in zip(self._sources, source_losses, source_counts, strict=True)
            },
        )


def summarize(
    reports: list[TokenReport], architecture: Architecture, layout: Layout, sources: Sources = NO_SOURCES
) -> StepMetrics:
    """Reduce reports over the data-parallel ranks and tell every rank. All ranks call it; it waits for the device."""
    return begin_summary(reports, architecture, layout, sources).read()


def begin_summary(
    reports: list[TokenReport], architecture: Architecture, layout: Layout, sources: Sources = NO_SOURCES
) -> PendingMetrics:
    """Reduce this step's reports over the data-parallel ranks, and begin to tell every rank; nobody waits for the device.

    `sources`: those of the samples, told apart in batches that a loader made. All ranks call it.
    """
    device = compute_device()
    first_nan = torch.full((1,), NO_TOKEN, device=device)
    sums = torch.zeros(_NUM_SUMS + 2 * len(sources.names), dtype=torch.float64, device=device)
    percentiles = torch.full((2, 1 + _PERCENTILES), torch.nan, dtype=torch.float64, device=device)
    if layout.is_last_stage:
        if reports:
            sums = torch.cat([_sums_of(reports, architecture), _sums_by_source(reports, sources)])
        dist.all_reduce(sums, group=layout.data)
        percentiles = _merge_percentiles(_percentiles_of(reports, device), layout)
        for report in reports:
            if report.selection is not None and report.selection.first_nan is not None:
                first_nan = torch.minimum(first_nan, report.selection.first_nan)
        dist.all_reduce(first_nan, op=dist.ReduceOp.MIN, group=layout.data)
    rho = torch.full((1,), reports[0].rho if reports else math.nan, dtype=torch.float64, device=device)
    floats = torch.cat([sums, rho, percentiles[:, 1:].flatten()])
    packed = torch.cat([first_nan, floats.view(torch.int64)])
    dist.broadcast(packed, src=layout.last_stage_rank, group=layout.groups.pp)
    if not have_cuda():
        return PendingMetrics(sources.names, packed, None)
    arrival = torch.cuda.Event()
    numbers = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    numbers.copy_(packed, non_blocking=True)
    arrival.record()
    return PendingMetrics(sources.names, numbers, arrival)


def _sums_of(reports: list[TokenReport], architecture: Architecture) -> torch.Tensor:
    """float64 [12] of this rank: losses of selected and of response tokens, by how much those of dropped tokens are above their
    history losses (NaN without), counts and sums of weights and history losses, in the order of `PendingMetrics`."""
    losses = torch.cat([report.loss.double() for report in reports])
    response = torch.cat([report.batch.response for report in reports])
    selected = torch.cat([r.batch.response if r.selection is None else r.selection.mask for r in reports])
    weights = torch.cat([torch.full_like(r.loss, torch.nan) if r.weight is None else r.weight for r in reports])
    weights = torch.where(selected, weights, 0.0).double()
    found = [
        torch.where(selected, losses, 0.0).sum(),
        torch.where(response, losses, 0.0).sum(),
        _excess_of(reports, losses, response & ~selected),
        selected.sum().double(),
        weights.sum(),
        weights.square().sum(),
        *_history_of(reports, response),
    ]
    facts = [report.batch.facts for report in reports]
    known = [
        sum(sum(one.response_counts) for one in facts),
        sum(sum(one.sample_lengths) for one in facts),
        len(response),
        sum(training_flops(report.batch, architecture) for report in reports),
    ]
    return torch.cat([torch.stack(found), to_compute_device(torch.tensor(known, dtype=torch.float64))])


def _excess_of(reports: list[TokenReport], losses: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """float64 []: the sum of loss − history loss over the dropped tokens."""
    history = [report.history_loss for report in reports]
    known = [one for one in history if one is not None]
    if len(known) < len(history):
        return losses.new_full((), torch.nan)
    return torch.where(dropped, losses - torch.cat(known), 0.0).sum()


def _history_of(reports: list[TokenReport], response: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 [] each: the sum of the history losses of the response tokens that have one, and their number."""
    missing = [torch.full_like(r.loss, torch.nan) if r.history_loss is None else r.history_loss for r in reports]
    history = torch.cat(missing)
    known = response & ~history.isnan()
    return torch.where(known, history, 0.0).sum(dtype=torch.float64), known.sum().double()


def _sums_by_source(reports: list[TokenReport], sources: Sources) -> torch.Tensor:
    """float64 [2 · sources] of this rank: the losses of the response tokens of each source, then their numbers."""
    size, device = len(sources.names), reports[0].loss.device
    if not size:
        return torch.empty(0, dtype=torch.float64, device=device)
    visits = [report.batch.visits for report in reports]
    of_segments = [sources.of_sample[one.index] for one in visits if one is not None]
    counts = [count for report in reports for count in report.batch.facts.response_counts]
    numbers = np.concatenate([*of_segments, [0]]).astype(np.int64)  # an entry where there is no sample
    facts = to_compute_device(torch.from_numpy(np.bincount(numbers[:-1], counts, size)))
    of_segment = to_compute_device(torch.from_numpy(numbers))
    total = torch.zeros(size, dtype=torch.float64, device=device)
    first = 0
    for report in reports:
        loss = torch.where(report.batch.response, report.loss, 0.0).double()
        total.index_add_(0, of_segment[first + report.batch.segment.clamp(min=0)], loss)
        first += report.batch.num_segments
    return torch.cat([total, facts.double()])


def training_flops(batch: TokenBatch, a: Architecture) -> float:
    """Operations of forward and backward over the real tokens of a batch."""
    lengths = batch.facts.sample_lengths
    return model_flops(a, sum(lengths), sum(map(causal_pairs, lengths)))


def _percentiles_of(reports: list[TokenReport], device: torch.device) -> torch.Tensor:
    """float64 [2, 102]: for REL and attention the number of response tokens on this rank that have it, then percentiles."""
    signals = [
        [(r.history_loss - r.loss, r.batch.response) for r in reports if r.history_loss is not None],
        [(r.values["attention"], r.batch.response) for r in reports if "attention" in r.values],
    ]
    return torch.stack([_percentiles(values, device) for values in signals])


def _percentiles(values: list[tuple[torch.Tensor, torch.Tensor]], device: torch.device) -> torch.Tensor:
    """Of pairs of values and masks: how many of the masked values are not NaN, and their percentiles, interpolated."""
    nothing = torch.full((1,), torch.nan, device=device)  # which is what there is to read where there are no values
    known = torch.cat([nothing, *(torch.where(mask, value, torch.nan) for value, mask in values)]).sort().values
    count = (~known.isnan()).sum()  # NaN is last
    place = torch.linspace(0, 1, _PERCENTILES, dtype=torch.float64, device=device) * (count - 1).clamp(min=0)
    low, high = (known.take(end.long()).double() for end in (place.floor(), place.ceil()))
    return torch.cat([count.double().reshape(1), torch.lerp(low, high, place - place.floor())])


def _merge_percentiles(mine: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Percentiles of all ranks together, each rank's standing for as many tokens as it has; those without are NaN."""
    gathered = mine.new_empty(layout.data_size, *mine.shape)
    dist.all_gather(list(gathered.unbind()), mine, group=layout.data)
    counts = gathered[:, :, 0].t().contiguous()  # [2, ranks]
    values, order = gathered[:, :, 1:].transpose(0, 1).flatten(1).sort(dim=1)  # NaN is last, and weighs nothing
    weights = counts.repeat_interleave(_PERCENTILES, dim=1).gather(1, order).cumsum(1)
    wanted = torch.linspace(0, 1, _PERCENTILES, dtype=mine.dtype, device=mine.device) * weights[:, -1:]
    places = torch.searchsorted(weights, wanted.contiguous()).clamp(max=values.shape[1] - 1)
    return torch.cat([counts.sum(1, keepdim=True), values.gather(1, places)], dim=1)
