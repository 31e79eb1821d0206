"""From the settings to the selected tokens of a global batch, in one pass through the model or in two.

Scopes `sample` and `microbatch` select while training: each micro-batch's tokens are known before its backward pass. The
scope `batch` and `rho: auto` need every score before the first gradient: a pass that only scores, one selection, and a
training pass with fixed masks. That costs a forward pass.
"""

import math
from dataclasses import dataclass, replace
from decimal import Decimal

import torch

from megatron_sstoken.config import SelectionSettings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.model.build import Model
from megatron_sstoken.passes.step import TokenReport, score_batch, train_batch
from megatron_sstoken.selection.adaptive import choose_rho
from megatron_sstoken.selection.methods import Selection, score_tokens, select_tokens
from megatron_sstoken.selection.signals import TokenSignals, concatenate_signals
from megatron_sstoken.selection.topk import token_id


@dataclass(frozen=True)
class Selector:
    """How tokens are selected at one step: the settings, and what changes from step to step."""

    settings: SelectionSettings
    gamma: float
    seed: int
    draw: int
    """Number of the global batch: random selection draws anew in each."""
    group: torch.distributed.ProcessGroup
    """The data-parallel ranks."""
    history_by_adapters_off: bool = False
    """Whether history losses are scored batch by batch, by the model without its adapters."""

    @property
    def needs_all_scores(self) -> bool:
        """Whether the whole global batch must be scored before anything is selected."""
        return self.settings.method != "full" and (self.settings.scope == "batch" or self.settings.rho == "auto")

    def __call__(self, report: TokenReport) -> Selection:
        """Select among the response tokens of one micro-batch."""
        return self._select(signals_of(report), self.settings.rho)

    def _select(self, signals: TokenSignals, rho: float | str | Decimal) -> Selection:
        return select_tokens(
            signals,
            method=self.settings.method,
            rho=rho,
            scope=self.settings.scope,
            gamma=self.gamma,
            rel_floor=self.settings.rel_floor,
            seed=self.seed,
            draw=self.draw,
            group=self.group,
        )

    def over_batch(self, reports: list[TokenReport]) -> tuple[list[Selection], float]:
        """Select among all micro-batches of a global batch; every rank of `group` calls it with as many.

        Returns a selection a micro-batch, and ρ.
        """
        signals = [signals_of(report) for report in reports]
        whole = concatenate_signals(signals)
        rho = self._choose_rho(whole) if self.settings.rho == "auto" else self.settings.rho
        if self.settings.scope != "batch":
            return [self._select(part, rho) for part in signals], float(rho)
        together = self._select(whole, rho)
        sizes = [len(part.response) for part in signals]
        parts = zip(
            together.mask.split(sizes),
            together.score.split(sizes),
            together.rel_norm.split(sizes),
            together.threshold.split([part.num_segments for part in signals]),
            strict=True,
        )
        return [Selection(*part) for part in parts], float(rho)

    def _choose_rho(self, signals: TokenSignals) -> Decimal:
        settings = self.settings
        score, _ = score_tokens(
            signals, settings.method, gamma=self.gamma, rel_floor=settings.rel_floor, seed=self.seed, draw=self.draw
        )
        ids = token_id(signals.sample, signals.position)[signals.response]
        return choose_rho(score[signals.response], ids, settings.rho_min, settings.rho_max, self.group)


def signals_of(report: TokenReport) -> TokenSignals:
    """The selection's view of a report; what was not measured is NaN."""
    unknown = torch.full_like(report.loss, torch.nan)
    batch = report.batch
    return TokenSignals(
        segment=batch.segment,
        num_segments=batch.num_segments,
        response=batch.response,
        sample=batch.sample,
        position=batch.position,
        loss=report.loss,
        history_loss=unknown if batch.history_loss is None else batch.history_loss,
        attention=unknown if report.attention is None else report.attention,
    )


def train_on_selected(
    model: Model, batches: list[TokenBatch], selector: Selector, *, whole_gradients: bool = False
) -> list[TokenReport]:
    """Select tokens of a global batch and leave the gradient of their loss, as `train_batch` does."""
    average = selector.settings.loss_average
    if selector.history_by_adapters_off:
        model.train(False)
        batches = with_history(model, batches)
        model.train(True)
    if not selector.needs_all_scores:
        return train_batch(model, batches, selector, loss_average=average, whole_gradients=whole_gradients)
    model.train(False)
    scored = score_batch(model, batches)
    model.train(True)
    selections, rho = selector.over_batch(scored) if scored else ([], math.nan)
    without_capture = replace(model, captured_layers=())  # attention is known by now
    reports = train_batch(without_capture, batches, selections, loss_average=average, whole_gradients=whole_gradients)
    return [_completed(report, one, rho) for report, one in zip(reports, scored, strict=True)]


def _completed(trained: TokenReport, scored: TokenReport, rho: float) -> TokenReport:
    """The report of a training pass, which tells of selected tokens only, with the others as they were scored."""
    assert trained.selection is not None
    loss = torch.where(trained.selection.mask, trained.loss, scored.loss)
    return replace(scored, loss=loss, selection=trained.selection, rho=rho)


def score_and_select(model: Model, batches: list[TokenBatch], selector: Selector) -> list[TokenReport]:
    """Forward only: reports that say what would be selected."""
    if selector.history_by_adapters_off:
        batches = with_history(model, batches)
    if not selector.needs_all_scores:
        return score_batch(model, batches, selector)
    scored = score_batch(model, batches)
    selections, rho = selector.over_batch(scored) if scored else ([], math.nan)
    return [replace(report, selection=one, rho=rho) for report, one in zip(scored, selections, strict=True)]


def with_history(model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
    """The batches with the history losses of the model without its adapters, on the last stage; as they are elsewhere."""
    with model.adapters_off() as base:
        reports = score_batch(base, batches)
    return [replace(report.batch, history_loss=report.loss) for report in reports] or batches
