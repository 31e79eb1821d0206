"""What is known of tokens before the first step, besides history losses: reference losses, external values, a choice."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from megatron_sstoken import watchdog
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.data.batches import TokenValues
from megatron_sstoken.data.column import TokenColumn, column_path, is_column
from megatron_sstoken.data.external import ExternalFiles, fill_values, open_external
from megatron_sstoken.data.response_chunks import response_chunks
from megatron_sstoken.data.whole_column import write_column
from megatron_sstoken.history.frozen import scored_column, there_or_ours
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.lock import Lock
from megatron_sstoken.parallel import Layout, agree_on_problems, broadcast_object
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.training.dataset_scope import chosen_of_data

Result = TypeVar("Result")


@dataclass(frozen=True)
class Known:
    """Token columns of the training data, for the loader."""

    values: Mapping[str, TokenColumn] = field(default_factory=dict)
    """By the names of `TokenSignals`: what batches carry as `known`."""
    weights: TokenColumn | None = None
    """Weights of tokens that take the place of the store's."""

    @property
    def digests(self) -> dict[str, str]:
        """What tells them from others: their folders are named by their content."""
        columns = dict(self.values) | ({"weight": self.weights} if self.weights else {})
        return {name: column.path.name for name, column in columns.items()}

    def folders(self) -> list[Path]:
        """Folders that are read from."""
        return [column.path for column in (*self.values.values(), *([self.weights] if self.weights else []))]


NOTHING = Known()


def open_known(plan: RunPlan, layout: Layout, history: HistorySource) -> Known:
    """What the run's method, rule and weights ask for, worked out by one process where it is not there yet.

    All ranks call it, before the model to train is made. Raises SettingsError on all of them, for files that are of other
    data, and scores that are missing or cannot be ranked.
    """
    watchdog.arrived("token columns")
    values: dict[str, TokenColumn] = {}
    if "reference_loss" in plan.method.needs:
        reference = WeightsSource(plan.settings.history.reference_hf_path or "")
        values["reference_loss"] = scored_column(plan, layout, reference)
    for value in plan.external_values - {"weight"}:
        values["external" if value == "score" else "chosen"] = _external_column(plan, layout, value)
    if plan.ranks_all_data:
        values["chosen"] = _chosen_column(plan, layout, values, history.token_values())
    weights = _external_column(plan, layout, "weight") if "weight" in plan.external_values else None
    return Known(values, weights)


def _external_column(plan: RunPlan, layout: Layout, value: str) -> TokenColumn:
    """A value of `selection.external` for every token; checked to be there wherever the run needs it."""
    store, name = plan.train.store, plan.settings.selection.external or ""

    def prepare() -> tuple[dict[str, Any], Callable[[np.ndarray], None]]:
        fingerprint = store.manifest.data_fingerprint
        files = open_external(name, fingerprint)
        identity = {"data": fingerprint, "files": files.checksums(), "value": value}
        return identity, partial(_fill, files, value, plan)

    column = _column("external", prepare, plan, layout)
    if value == "score":
        _on_first(layout, lambda: _require_scores(plan, column))
    return column


def _fill(files: ExternalFiles, value: str, plan: RunPlan, column: np.ndarray) -> None:
    store = plan.train.store
    with tqdm(desc=f"external {value}", total=files.num_rows, unit="row", unit_scale=True) as bar:
        filled, ignored = fill_values(files, value, store, column, bar.update)
    told = f"external {value}: of {filled:,} of {store.manifest.num_response_tokens:,} response tokens"
    print(told + (f"; {ignored:,} of other tokens are ignored" if ignored else ""), flush=True)


def _require_scores(plan: RunPlan, column: TokenColumn) -> None:
    """Raise ValueError where a response token that the run uses has no score: it can be neither ranked nor compared."""
    missing, first = 0, ""
    for chunk in response_chunks(plan.train.store, plan.train.samples):
        absent = np.isnan(chunk.read(column))
        if absent.any() and not missing:
            at = int(absent.argmax())
            first = f"sample {plan.train.store.rows[chunk.index[at]]}, position {chunk.position[at]}"
        missing += int(np.count_nonzero(absent))
    if missing:
        raise ValueError(
            f"selection.external={plan.settings.selection.external} has no score of {missing:,} response tokens (first: "
            f"{first}): score all of data.train, or give `selected` instead, which leaves out tokens that are not named"
        )


def _chosen_column(
    plan: RunPlan, layout: Layout, values: Mapping[str, TokenColumn], history: TokenValues | None
) -> TokenColumn:
    """What `selection.scope: dataset` chooses."""

    def prepare() -> tuple[dict[str, Any], Callable[[np.ndarray], None]]:
        known: dict[str, TokenValues] = dict(values)
        if "history_loss" in plan.method.needs:
            assert history is not None, "validate/settings.py asks for a history that is known before training"
            known["history_loss"] = history
        cut, identity, fill = chosen_of_data(plan, known)
        print(
            f"scope dataset: {cut.num_selected:,} of {cut.num_candidates:,} response tokens are selected, with scores of "
            f"{cut.threshold:.6g} and above",
            flush=True,
        )
        return identity, fill

    return _column("chosen", prepare, plan, layout)


def _column(
    kind: str, prepare: Callable[[], tuple[dict[str, Any], Callable[[np.ndarray], None]]], plan: RunPlan, layout: Layout
) -> TokenColumn:
    """The column that `prepare` tells of, on all ranks: its identity, and what fills it. Rank 0 makes it once for all runs."""
    identity: dict[str, Any] = {}
    fill: Callable[[np.ndarray], None] | None = None
    problems = []
    if layout.rank == 0:
        try:
            identity, fill = prepare()
        except ValueError as error:
            problems = [str(error)]
    agree_on_problems(problems)
    identity = broadcast_object(identity, source=0, group=layout.control)
    path = column_path(plan.train.store.path, kind, identity)

    def make() -> None:
        assert fill is not None, "rank 0 has prepared it"
        write_column(path, identity, int(plan.train.store.offsets[-1]), fill)

    with Lock(f"{path}.lock") as lock:
        there = partial(is_column, path)
        if not there_or_ours(lock, there, layout, what="token columns", doing=f"making {path}"):
            _on_first(layout, make)
    column, problems = None, []
    try:
        column = TokenColumn(path)
        column.require(identity)
    except ValueError as error:
        problems = [f"data.train: {error}"]
    agree_on_problems(problems)
    assert column is not None
    return column


def _on_first(layout: Layout, work: Callable[[], Result]) -> Result:
    """What `work` gives on rank 0, on all ranks; a ValueError there is a SettingsError everywhere."""
    result, problems = None, []
    if layout.rank == 0:
        try:
            result = work()
        except ValueError as error:
            problems = [str(error)]
    agree_on_problems(problems)
    told: Result = broadcast_object(result, source=0, group=layout.control)  # type: ignore[assignment]
    return told
