"""What a step is told by: global sums, quantiles, speed; printed, and written for TensorBoard."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.tensorboard import SummaryWriter

from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.device import compute_device, have_cuda, peak_memory_bytes, to_compute_device
from megatron_sstoken.files import write_failure
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.flops import causal_pairs, model_flops
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.selection.topk import NO_TOKEN, nan_error

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_PERCENTILES = 101


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

    @property
    def share_selected(self) -> float:
        return self.num_selected / self.num_response if self.num_response else math.nan


@dataclass(frozen=True)
class PendingMetrics:
    """The numbers of a global batch on their way to the host."""

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
        selected_loss, response_loss, excess, selected, weight, squares, *further = (
            self._numbers[1:].view(torch.float64).tolist()
        )
        response, tokens, positions, flops, rho, *percentiles = further
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
        )


def summarize(reports: list[TokenReport], architecture: Architecture, layout: Layout) -> StepMetrics:
    """Reduce reports over the data-parallel ranks and tell every rank. All ranks call it; it waits for the device."""
    return begin_summary(reports, architecture, layout).read()


def begin_summary(reports: list[TokenReport], architecture: Architecture, layout: Layout) -> PendingMetrics:
    """Reduce this step's reports over the data-parallel ranks, and begin to tell every rank; nobody waits for the device.

    All ranks call it.
    """
    device = compute_device()
    first_nan = torch.full((1,), NO_TOKEN, device=device)
    sums = torch.zeros(10, dtype=torch.float64, device=device)
    percentiles = torch.full((2, 1 + _PERCENTILES), torch.nan, dtype=torch.float64, device=device)
    if layout.is_last_stage:
        if reports:
            sums = _sums_of(reports, architecture)
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
        return PendingMetrics(packed, None)
    arrival = torch.cuda.Event()
    numbers = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    numbers.copy_(packed, non_blocking=True)
    arrival.record()
    return PendingMetrics(numbers, arrival)


def _sums_of(reports: list[TokenReport], architecture: Architecture) -> torch.Tensor:
    """float64 [10] of this rank: losses of selected and of response tokens, by how much those of dropped tokens are above their
    history losses (NaN without), then counts and sums of weights, in the order of `PendingMetrics`."""
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


class StepLogger:
    """Prints a line every `every` steps and writes TensorBoard points; rank 0 does, the others hold their peace."""

    def __init__(
        self, directory: str | None, every: int, num_steps: int, layout: Layout, *, resumed: int | None = None
    ):
        """`resumed`: steps done before this start. TensorBoard shows no later points of starts before."""
        self._active = layout.rank == 0
        purge = None if resumed is None else resumed + 1
        self._lost: set[str] = set()
        self._writer: SummaryWriter | None = None
        if directory is not None and self._active:
            with self.outlive(directory):
                self._writer = SummaryWriter(directory, purge_step=purge)
        self._every, self._num_steps, self._world_size = every, num_steps, layout.world_size
        self._last = time.monotonic()
        self._begun, self._done = self._last, 0

    def step(
        self,
        number: int,
        metrics: StepMetrics,
        gradient_norm: float,
        learning_rate: float,
        further: dict[str, float] | None = None,
    ) -> None:
        """Tell of the optimizer step `number` (from 1); `further`: more TensorBoard points."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self._done += 1
        if not self._active or (number % self._every and number != self._num_steps):
            return
        eta = (now - self._begun) / self._done * (self._num_steps - number)
        speed = metrics.num_tokens / seconds
        tflops = metrics.model_flops / seconds / 1e12
        self.say(
            f"step {number}/{self._num_steps} | loss {metrics.loss_selected:.4f} (all {metrics.loss_all:.4f}, dropped "
            f"{metrics.loss_dropped:.4f}) | selected {100 * metrics.share_selected:.1f} % | grad norm "
            f"{gradient_norm:.3f} | lr {learning_rate:.3e} | {speed:,.0f} tokens/s | {tflops:.3g} TFLOP/s | "
            f"ETA {_clock(eta)}"
        )
        if self._writer is None:
            return
        points = {
            "loss/selected": metrics.loss_selected,
            "loss/all": metrics.loss_all,
            "loss/dropped": metrics.loss_dropped,
            "selection/share": metrics.share_selected,
            "selection/rho": metrics.rho,
            "weights/mean": metrics.weight_mean,
            "weights/effective_share": metrics.weight_share,
            "optimizer/gradient_norm": gradient_norm,
            "optimizer/learning_rate": learning_rate,
            "speed/tokens_per_second": speed,
            "speed/model_tflops": tflops,
            "speed/model_tflops_per_process": tflops / self._world_size,
            "speed/step_seconds": seconds,
            "data/real_share": metrics.num_tokens / metrics.num_positions,
            "memory/peak_gib": peak_memory_bytes() / 2**30,
        }
        for name, values in (("rel", metrics.rel_quantiles), ("attention", metrics.attention_quantiles)):
            points |= {f"{name}/q{round(100 * q):02d}": v for q, v in zip(QUANTILES, values, strict=True)}
        self.scalars(number, points | (further or {}))

    def scalars(self, number: int, points: dict[str, float]) -> None:
        """Write TensorBoard points, leaving out what is undefined."""
        if self._writer is not None:
            with self.outlive(self._writer.log_dir):
                for name, value in points.items():
                    if not math.isnan(value):
                        self._writer.add_scalar(name, value, number)

    def say(self, text: str) -> None:
        """Print a line of its own."""
        if self._active:
            print(text, flush=True)

    @contextmanager
    def outlive(self, path: str | Path) -> Iterator[None]:
        """Within, nothing that goes wrong with a log ends the run: it goes on, saying so once for each kind of log."""
        try:
            yield
        except OSError as error:
            reason = write_failure(error, Path(path)).strerror
            kind = os.path.dirname(path) if str(path).endswith(".parquet") else str(path)
            if kind not in self._lost:
                self._lost.add(kind)
                print(f"warning: {kind}: {reason}: the run goes on without this log", file=sys.stderr, flush=True)
            if self._writer is not None and kind == self._writer.log_dir:
                self._writer = None

    def pause(self) -> None:
        """Leave out the time since the last step: what comes next is timed from here."""
        self._last = time.monotonic()

    def close(self) -> None:
        """Flush TensorBoard."""
        if self._writer is not None:
            with self.outlive(self._writer.log_dir):
                self._writer.close()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
