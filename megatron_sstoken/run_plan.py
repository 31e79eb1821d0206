"""The run plan: a run whose settings passed every check that needs no process group (`validate/run.py` makes it)."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import BatchShape, PackOrder, SampleFilter
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.selection.methods import Method, find_method
from megatron_sstoken.selection.signals import PREDICTION_SIGNALS
from megatron_sstoken.selection.weights import TokenWeight, find_weight


@dataclass(frozen=True)
class DataPlan:
    """A prepared folder, and which of its samples a run uses in which order."""

    store: SampleStore
    samples: SampleFilter
    order: PackOrder


@dataclass(frozen=True)
class RunPlan:
    """A run whose settings have passed every check that needs no process group."""

    settings: Settings
    world_size: int
    architecture: Architecture
    train: DataPlan
    validation: DataPlan | None
    shape: BatchShape
    num_packs: int
    """Packs that training sees, over all epochs."""
    captured_layers: tuple[int, ...]
    """Layers (from 1) whose attention is captured; empty if the method does not use it."""
    lag: int = 0
    """Empty packs in the last batch of a shorter run that this one goes on from."""
    external_values: frozenset[str] = field(default=frozenset())
    """What is read from `selection.external`: of `data.external.VALUES`."""
    notes: tuple[str, ...] = ()
    """What a dry run lets pass: weights or devices that are not here yet."""

    @property
    def num_steps(self) -> int:
        return -(-(self.num_packs + self.lag) // self.shape.global_batch_size)

    @cached_property
    def visited(self) -> np.ndarray:
        """int64, ascending: numbers of the samples of the training data whose history is needed: those that the run sees, or
        all that compete."""
        if self.ranks_all_data:
            return self.train.samples.indices
        return self.train.order.samples_before(self.num_packs)

    @property
    def method(self) -> Method:
        """How tokens are scored."""
        return find_method(self.settings.selection.method)

    @property
    def weight_method(self) -> str:
        """`weights.method`, or what it is by default."""
        return self.settings.weights.method or ("external" if self.train.store.manifest.weighted else "none")

    @property
    def weight(self) -> TokenWeight:
        """How much tokens count."""
        return find_weight(self.weight_method)

    @property
    def ranks_all_data(self) -> bool:
        """Whether tokens of all data compete, before training."""
        return self.settings.selection.rule_in_force == "chosen" and "selected" not in self.external_values

    @property
    def weighted(self) -> bool:
        """Whether the losses of tokens count as much as the training data, or an external file, says."""
        held = self.train.store.manifest.weighted or "weight" in self.external_values
        return held and self.weight.data != "ignored"

    @property
    def needs_history(self) -> bool:
        return "history_loss" in self.method.needs

    @property
    def head_signals(self) -> tuple[str, ...]:
        """What the head tells of every prediction beside its loss."""
        wanted = self.method.needs | self.weight.needs
        if self.settings.logging.entropy:
            wanted |= {"entropy", "top1"}
        return tuple(name for name in PREDICTION_SIGNALS if name in wanted)
