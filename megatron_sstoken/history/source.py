"""Where history losses come from: the protocol, and the registry that finds every source of this folder.

A source is one file: a subclass of `HistorySource` with a name. Nothing else knows the names.
"""

import functools
import importlib
import pkgutil
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from megatron.core.optimizer import MegatronOptimizer

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import TokenBatch, TokenValues
from megatron_sstoken.model.build import Model
from megatron_sstoken.model.optimizer import WeightsCopy
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.selection.methods import find_method

_SOURCES: dict[str, type["HistorySource"]] = {}


class HistorySource:
    """Gives batches their history losses. This class itself gives none: what a method that needs no history gets."""

    name: ClassVar[str] = ""
    """Value of `history.source`."""
    before_training: ClassVar[bool] = False
    """Whether the losses of all data are known before the first step (`token_values`)."""
    uses: ClassVar[frozenset[str]] = frozenset()
    """The other settings of `history` that it reads."""
    needs_training: ClassVar[bool] = False
    """Whether its losses come about while a run trains: a scoring run has none of them."""
    passes_per_step: ClassVar[int] = 0
    """Forward passes over the batch that each step takes for it."""
    copies_weights: ClassVar[bool] = False
    """Whether it keeps `weights_copy`."""

    def __init_subclass__(cls) -> None:
        if name := cls.__dict__.get("name"):  # a name of its own, not its parent's
            _SOURCES[name] = cls

    @classmethod
    def problems(cls, settings: Settings) -> list[str]:
        """Which settings it cannot work with, as messages: here those of `history` that it would ignore."""
        return _ignored(settings, cls)

    @classmethod
    def describe(cls, settings: Settings) -> str:
        """For the run plan."""
        return cls.name

    @classmethod
    def describe_work(cls, plan: RunPlan) -> str | None:
        """For the run plan: what it computes or keeps besides the steps themselves."""
        return None

    @classmethod
    def open(cls, plan: RunPlan, layout: Layout) -> "HistorySource":
        """Ready for the first step; all ranks call it. May score `plan.visited`, and raise SettingsError."""
        return cls()

    def token_values(self) -> TokenValues | None:
        """Losses that are known before the step: the loader puts them into its batches."""
        return None

    def folders(self) -> list[Path]:
        """Folders that its losses are read from."""
        return []

    def attach(self, optimizer: MegatronOptimizer) -> None:
        """Get to know the optimizer of a run, whose model holds its starting weights: before a checkpoint is loaded."""

    def weights_copy(self) -> WeightsCopy:
        """Its copy of the trained weights, which checkpoints hold; the same tensors from `attach` on."""
        return ()

    def prepare(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        """This rank's batches with history losses, on the last stage, before a step or scoring; all ranks call it."""
        return batches

    def consult(self, model: Model, batches: list[TokenBatch]) -> list[TokenBatch]:
        """As `prepare`, of batches that nothing is trained on, in between: changes nothing of what steps get."""
        return self.prepare(model, batches)

    def observe(self, reports: list[TokenReport]) -> None:
        """What a training step saw of this rank's batches (on the last stage; nothing elsewhere); all ranks call it."""

    def after_step(self, done: int, *, updated: bool) -> None:
        """`done` steps are done; `updated`: the last of them has changed the weights (it was not skipped)."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, the same on every rank; goes into checkpoints where it is not empty."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""


def _ignored(settings: Settings, source: type[HistorySource]) -> list[str]:
    """A message for every setting of `history` that is set and that neither the source nor a method reads."""
    found = []
    for field in fields(settings.history):
        value = getattr(settings.history, field.name)
        if value == field.default or field.name in {"source", "reference_hf_path", *source.uses}:
            continue
        others = " or ".join(name for name, one in history_sources().items() if field.name in one.uses)
        found.append(
            f"history.{field.name}={value} is not used by history.source={source.name}: leave it out, or use source={others}"
        )
    return found


@functools.cache
def history_sources() -> dict[str, type[HistorySource]]:
    """Name → source, of all modules in this folder, by name."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(sorted(_SOURCES.items()))  # modules may have been imported in any order


def source_of(settings: Settings) -> type[HistorySource]:
    """The source of a run's history; `HistorySource` itself where its method needs none."""
    needed = "history_loss" in find_method(settings.selection.method).needs
    return history_sources()[settings.history.source] if needed else HistorySource


def open_history(plan: RunPlan, layout: Layout) -> HistorySource:
    """The history of a run, ready for its first step. All ranks call it. Raises SettingsError as the source does."""
    return source_of(plan.settings).open(plan, layout)
