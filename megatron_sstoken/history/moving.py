"""History from weights that follow those in training: a copy of these, or their average; one forward pass a step.

The copy is fp32 and dealt out over the ranks as the optimizer's weights are. For the pass it takes the place of the parameters,
which come back afterwards bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_sstoken.checkpoint.size import COPY_BYTES, trained_parameters
from megatron_sstoken.config import HistorySettings, Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.files import format_bytes
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model
from megatron_sstoken.model.optimizer import WeightsCopy, owned_ranges, parts_of
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import score_batch
from megatron_sstoken.run_plan import RunPlan


class Moving(HistorySource):
    """What both have in common: the copy, and the pass under it. Of a model with adapters it is a copy of these alone."""

    passes_per_step = 1
    copies_weights = True
    needs_training = True

    def __init__(self, settings: HistorySettings):
        self.settings = settings
        self._copy: WeightsCopy = ()

    @classmethod
    def problems(cls, settings: Settings) -> list[str]:
        found = super().problems(settings)
        if settings.training.precision == "fp8" and settings.training.fp8_recipe == "delayed":
            found.append(
                "training.fp8_recipe=delayed takes its scales from earlier passes, some of which "
                f"history.source={cls.name} makes with other weights: use fp8_recipe=tensorwise"
            )
        return found

    @classmethod
    def describe_work(cls, plan: RunPlan) -> str:
        size = format_bytes(COPY_BYTES * trained_parameters(plan.architecture, plan.settings))
        return f"one forward pass a step under a copy of the trained weights, {size} over all ranks"

    @classmethod
    def open(cls, plan: RunPlan, layout: Layout) -> "Moving":
        return cls(plan.settings.history)

    def attach(self, optimizer: MegatronOptimizer) -> None:
        self._copy = [
            (owned, owned.values.to(torch.float32, copy=True))
            for part in parts_of(optimizer)
            for owned in owned_ranges(part)
        ]

    def weights_copy(self) -> WeightsCopy:
        return self._copy

    def prepare(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        with model.evaluating(), self.in_place(model):
            reports = score_batch(replace(model, captured_layers=()), batches)
        return [replace(report.batch, history_loss=report.loss) for report in reports] or batches

    @contextmanager
    def in_place(self, model: Model) -> Iterator[None]:
        """Within, the parameters of the model are the copy, in their type. All ranks enter and leave it together.

        An error within ends the run: nothing is brought back then.
        """
        # Weights in bf16 could be made anew from the optimizer's. In fp32 these are the parameters themselves, and state in
        # the host's memory would have to come from there: what was there serves all, for the time of the pass.
        saved = [owned.values.clone() for owned, _ in self._copy]
        for owned, values in self._copy:
            owned.values.copy_(values)
        model.spread_weights()
        yield
        for (owned, _), values in zip(self._copy, saved, strict=True):
            owned.values.copy_(values)
        model.spread_weights()


class Snapshot(Moving):
    """The weights as they were at the last step that `history.every` divides, and before the first at the start."""

    name = "snapshot"
    uses = frozenset({"every"})

    @classmethod
    def describe(cls, settings: Settings) -> str:
        return f"{cls.name} (of every {settings.history.every} steps)"

    def after_step(self, done: int, *, updated: bool) -> None:
        # After a step that was skipped as well: the weights are what they were before it.
        if done % self.settings.every == 0:
            for owned, values in self._copy:
                values.copy_(owned.weights)


class MovingAverage(Moving):
    """copy ← decay · copy + (1 − decay) · weights after each update."""

    name = "ema"
    uses = frozenset({"decay"})

    @classmethod
    def describe(cls, settings: Settings) -> str:
        return f"{cls.name} (decay {settings.history.decay})"

    def after_step(self, done: int, *, updated: bool) -> None:
        if updated:
            for owned, values in self._copy:
                # Where a part of the optimizer's state lies in the host's memory, it comes from there.
                values.lerp_(owned.weights.to(values.device), 1 - self.settings.decay)
