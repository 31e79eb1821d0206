"""The run plan: a run whose settings passed every check that needs no process group (`validate/run.py` makes it)."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import BatchShape, PackOrder, SampleFilter
from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.head import UNCERTAINTY
from megatron_sstoken.selection.methods import Method, find_method


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
    notes: tuple[str, ...] = ()
    """What a dry run lets pass: weights or devices that are not here yet."""

    @property
    def num_steps(self) -> int:
        return -(-(self.num_packs + self.lag) // self.shape.global_batch_size)

    @cached_property
    def visited(self) -> np.ndarray:
        """int64, ascending: numbers of the samples of the training data that the run sees: their history is needed."""
        return self.train.order.samples_before(self.num_packs)

    @property
    def method(self) -> Method:
        """How tokens are scored."""
        return find_method(self.settings.selection.method)

    @property
    def weighted(self) -> bool:
        """Whether the losses of tokens count as much as the training data says."""
        method = self.settings.weights.method
        return self.train.store.manifest.weighted if method is None else method == "external"

    @property
    def needs_history(self) -> bool:
        return "history_loss" in self.method.needs

    @property
    def needs_entropy(self) -> bool:
        """Whether the head tells more of every prediction than its loss."""
        return self.settings.logging.entropy or bool(UNCERTAINTY & self.method.needs)
