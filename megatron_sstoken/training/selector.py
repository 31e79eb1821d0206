"""From the settings to the selected tokens of a global batch, in one pass through the model or in two.

Scopes `sample` and `microbatch` select while training: each micro-batch's tokens are known before its backward pass. The
scope `batch` and `rho: auto` need every score before the first gradient: a pass that only scores, one selection, and a
training pass with fixed masks. That costs a forward pass. A threshold, or a choice made before training, needs no others.
"""

import math
from dataclasses import dataclass, replace
from decimal import Decimal

import torch

from megatron_sstoken.config import SelectionSettings, Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.loss import LossRule, token_weights
from megatron_sstoken.passes.step import TokenReport, score_batch, select_and_train, train_on
from megatron_sstoken.selection.adaptive import choose_rho
from megatron_sstoken.selection.explore import explore
from megatron_sstoken.selection.methods import Method, Selection, find_method, score_tokens, select_tokens
from megatron_sstoken.selection.signals import TokenSignals, concatenate_signals
from megatron_sstoken.selection.topk import token_id


@dataclass(frozen=True)
class Selector:
    """How tokens are selected at one step: the settings, and what changes from step to step."""

    settings: SelectionSettings
    gamma: float
    seed: int
    step: int
    """Number of the global batch: random selection draws anew in each."""
    group: torch.distributed.ProcessGroup
    """The data-parallel ranks."""
    history: HistorySource = HistorySource()
    """Where history losses come from."""
    rule: LossRule = LossRule()
    """What the losses of selected tokens are divided by."""

    @property
    def method(self) -> Method:
        return find_method(self.settings.method)

    @property
    def needs_all_scores(self) -> bool:
        """Whether the whole global batch must be scored before anything is selected."""
        ranks = self.method.selects and self.settings.rule_in_force == "top"
        return ranks and (self.settings.scope == "batch" or self.settings.rho == "auto")

    def __call__(self, report: TokenReport) -> Selection:
        """Select among the response tokens of one micro-batch."""
        return self._select(signals_of(report), self.settings.rho)

    def _select(self, signals: TokenSignals, rho: float | str | Decimal) -> Selection:
        selection = select_tokens(
            signals,
            method=self.settings.method,
            rho=rho,
            scope=self.settings.scope,
            gamma=self.gamma,
            rel_floor=self.settings.rel_floor,
            seed=self.seed,
            step=self.step,
            group=self.group,
            rule=self.settings.rule_in_force,
            tau=self.settings.threshold,
        )
        if not (self.settings.explore and self.method.selects):
            return selection
        # With other rules tokens do not compete, and a micro-step's would depend on the layout.
        share, scope = self.settings.explore, self.settings.scope if self.settings.rule_in_force == "top" else "sample"
        return explore(signals, selection, share, scope, self.seed, self.step, self.group)

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
        settings, signals = self.settings, signals.competing()
        score, _ = score_tokens(
            signals, settings.method, gamma=self.gamma, rel_floor=settings.rel_floor, seed=self.seed, step=self.step
        )
        ids = token_id(signals.sample, signals.position)[signals.response]
        competing = score[signals.response]
        bounds = settings.rho_min, settings.rho_max
        return choose_rho(competing, ids, *bounds, self.group, bounded=self.method.bounded)


def selector_of(
    settings: Settings,
    layout: Layout,
    *,
    gamma: float,
    step: int,
    history: HistorySource | None = None,
    drifted: int = 0,
) -> Selector:
    """The selector of global batch number `step`, after drift has been noticed `drifted` times."""
    seed, group, selection = settings.training.seed, layout.data, settings.selection.after_drift(drifted)
    return Selector(selection, gamma, seed, step, group, history or HistorySource(), LossRule.of(settings))


def signals_of(report: TokenReport) -> TokenSignals:
    """The selection's view of a report."""
    batch = report.batch
    history = {} if batch.history_loss is None else {"history_loss": batch.history_loss}
    return TokenSignals(
        segment=batch.segment,
        num_segments=batch.num_segments,
        response=batch.response,
        sample=batch.sample,
        position=batch.position,
        values={**report.values, **history, **batch.known},
        response_counts=batch.facts.response_counts,
        num_chosen=batch.facts.num_chosen,
        exempt=batch.exempt,
        exempt_counts=batch.facts.exempt_counts,
    )


def train_on_selected(
    model: Model,
    batches: list[TokenBatch],
    selector: Selector,
    *,
    whole_gradients: bool = False,
) -> list[TokenReport]:
    """Select tokens of a global batch and leave the gradient of their loss, as `select_and_train` does."""
    rule = selector.rule
    batches = selector.history.prepare(model, batches)
    if not selector.needs_all_scores:
        return select_and_train(model, batches, selector, rule=rule, whole_gradients=whole_gradients)
    with model.evaluating():
        scored = score_batch(model, batches)
    selections, rho = selector.over_batch(scored) if scored else ([], math.nan)
    uncaptured = replace(model, captured_layers=())  # attention is known by now
    reports = train_on(uncaptured, batches, selections, rule=rule, whole_gradients=whole_gradients)
    return [_completed(report, one, rho) for report, one in zip(reports, scored, strict=True)]


def _completed(trained: TokenReport, scored: TokenReport, rho: float) -> TokenReport:
    """The report of a training pass, which tells of selected tokens only, with the others as they were scored."""
    assert trained.selection is not None
    loss = torch.where(trained.selection.mask, trained.loss, scored.loss)
    values = {**scored.values, "loss": loss}
    return replace(scored, values=values, selection=trained.selection, weight=trained.weight, rho=rho)


def score_and_select(model: Model, batches: list[TokenBatch], selector: Selector) -> list[TokenReport]:
    """Forward only: reports that say what would be selected, and how much it would count. Leaves no trace in training."""
    batches = selector.history.consult(model, batches)
    if not selector.needs_all_scores:
        reports = score_batch(model, batches, selector)
    else:
        scored = score_batch(model, batches)
        selections, rho = selector.over_batch(scored) if scored else ([], math.nan)
        reports = [replace(report, selection=one, rho=rho) for report, one in zip(scored, selections, strict=True)]
    return [replace(one, weight=token_weights(one.values, one.batch, selector.rule)) for one in reports]
