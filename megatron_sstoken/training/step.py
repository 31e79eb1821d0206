"""One global batch through megatron's schedule: losses, attention masses, selection, and gradients if training."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sstoken.config import SelectionSettings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.device import compute_device
from megatron_sstoken.model.attention import sample_bounds
from megatron_sstoken.model.build import Model
from megatron_sstoken.scores.signals import TokenSignals
from megatron_sstoken.selection.methods import METHODS, Selection, select_tokens


@dataclass(frozen=True)
class TokenReport:
    """What the last pipeline stage knows of one micro-batch; entry t of every tensor speaks of token t."""

    batch: TokenBatch
    loss: torch.Tensor
    """fp32 [T], NaN for first tokens and padding."""
    attention: torch.Tensor | None
    """fp32 [T]: mean over heads and measured layers of the attention to the context; None if not measured."""
    selection: Selection | None = None

    @property
    def history_loss(self) -> torch.Tensor | None:
        return self.batch.history_loss


@dataclass(frozen=True)
class Selector:
    """How tokens are selected at one step: the settings, and what changes from step to step."""

    settings: SelectionSettings
    gamma: float
    seed: int
    draw: int
    """Number of the global batch: random selection draws anew in each."""
    group: dist.ProcessGroup
    """The data-parallel ranks."""

    def __call__(self, report: TokenReport) -> Selection:
        """Select among the response tokens of one micro-batch."""
        return select_tokens(
            signals_of(report),
            method=self.settings.method,
            rho=self.settings.rho,
            scope=self.settings.scope,
            gamma=self.gamma,
            rel_floor=self.settings.rel_floor,
            seed=self.seed,
            draw=self.draw,
            group=self.group,
        )


def signals_of(report: TokenReport) -> TokenSignals:
    """The selection's view of a report."""
    nothing = torch.full_like(report.loss, torch.nan)
    batch = report.batch
    return TokenSignals(
        segment=batch.segment,
        num_segments=batch.num_segments,
        response=batch.response,
        sample=batch.sample,
        position=batch.position,
        loss=report.loss,
        history_loss=nothing if batch.history_loss is None else batch.history_loss,
        attention=nothing if report.attention is None else report.attention,
    )


def measures_attention(settings: SelectionSettings) -> bool:
    """Whether the selection method uses the attention mass."""
    return METHODS[settings.method].needs_attention


def measures_history(settings: SelectionSettings) -> bool:
    """Whether the selection method uses history losses."""
    return METHODS[settings.method].needs_history


def train_batch(model: Model, batches: list[TokenBatch], selector: Selector) -> list[TokenReport]:
    """Forward and backward over this rank's micro-batches; leaves gradients of Σ selected loss ÷ number selected.

    All ranks call it with equally many micro-batches. Returns a report per micro-batch on the last pipeline stage,
    nothing elsewhere.
    """

    def loss_function(losses: torch.Tensor, report: TokenReport):
        with torch.no_grad():
            selection = selector(report)
        trained = to_predicting(selection.mask)
        # where, not a product: a loss that is not finite on an unselected token must not reach the sum.
        total = torch.where(trained, losses[0], 0.0).sum()
        return total, trained.sum(dtype=torch.int), _with(report, selection)

    return _run(model, batches, loss_function, forward_only=False)


def score_batch(model: Model, batches: list[TokenBatch], selector: Selector | None = None) -> list[TokenReport]:
    """Forward only; with a `selector` the reports say what it would select. Reports as in `train_batch`."""

    def loss_function(losses: torch.Tensor, report: TokenReport):
        selection = None if selector is None else selector(report)
        return losses.sum(), torch.zeros((), dtype=torch.int, device=losses.device), _with(report, selection)

    with torch.no_grad():
        return _run(model, batches, loss_function, forward_only=True)


def _with(report: TokenReport, selection: Selection | None) -> TokenReport:
    return TokenReport(report.batch, report.loss, report.attention, selection)


def _run(model: Model, batches: list[TokenBatch], loss_function: Callable, *, forward_only: bool) -> list[TokenReport]:
    device = compute_device()
    batches = [batch.to(device) for batch in batches]
    probe_of = dict(zip(map(id, model.chunks), model.probes, strict=True))

    def forward_step(iterator, chunk):
        batch = next(iterator)
        probe = probe_of[id(chunk)]
        if model.tapped_layers:
            probe.arm(batch.context)
        losses = chunk(
            batch.tokens,
            batch.position.unsqueeze(0),
            None,
            labels=batch.labels,
            packed_seq_params=sample_bounds(batch.lengths, device),
        )
        return losses, partial(_finish_micro_batch, model, batch, probe.take(), loss_function)

    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(batches) for _ in model.chunks],
        model=model.chunks,
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _finish_micro_batch(model: Model, batch: TokenBatch, masses: dict, loss_function: Callable, losses: torch.Tensor):
    """On the last stage: align losses with tokens, finish the attention mass, and hand over to the loss function."""
    with torch.no_grad():
        attention = mean_attention(model, masses) if model.tapped_layers else None
        report = TokenReport(batch, to_predicted(losses.detach()[0], batch), attention)
    return loss_function(losses, report)


def mean_attention(model: Model, masses: dict[int, torch.Tensor]) -> torch.Tensor:
    """Mean over all query heads and the measured layers; sums over the tensor parallel group. fp32 [T]."""
    total = torch.stack([masses[layer] for layer in model.tapped_layers]).sum(dim=0)
    dist.all_reduce(total, group=model.layout.groups.tp)
    return total / (model.architecture.num_attention_heads * len(model.tapped_layers))


def to_predicted(losses: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
    """Move losses from the position that predicts to the token that is predicted; NaN where there is none."""
    moved = torch.full_like(losses, torch.nan)
    moved[1:] = losses[:-1]
    return torch.where((batch.position > 0) & (batch.segment >= 0), moved, torch.nan)


def to_predicting(mask: torch.Tensor) -> torch.Tensor:
    """Move a mask from the predicted token to the position whose output predicts it."""
    moved = torch.zeros_like(mask)
    moved[:-1] = mask[1:]
    return moved
