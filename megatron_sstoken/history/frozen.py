"""History from frozen weights: what a run visits is scored once, before training, into a store that later runs reuse."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sstoken import watchdog
from megatron_sstoken.checkpoint.weights_source import WeightsSource, starting_weights
from megatron_sstoken.config import LoraSettings, Settings, SettingsError
from megatron_sstoken.data.batches import TokenValues
from megatron_sstoken.data.column import FIRST_VERSION, TokenColumn, TokenColumnWriter, column_path, is_column
from megatron_sstoken.data.store import SampleStore, StoreManifest
from megatron_sstoken.files import naming
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.lock import Lock
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.parallel import Layout, agree_on_problems, broadcast_object, writer_rank
from megatron_sstoken.passes.columns import SampleLosses, gather_losses
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.run_plan import RunPlan


class Frozen(HistorySource):
    """Reads the losses of a store; what the run visits and the store does not hold is scored first."""

    name = "frozen"
    before_training = True
    uses = frozenset({"hf_path", "store"})

    def __init__(self, column: TokenColumn):
        self.column = column

    @classmethod
    def describe(cls, settings: Settings) -> str:
        return f"{cls.name} ({settings.history.hf_path or 'starting weights'})"

    @classmethod
    def describe_work(cls, plan: RunPlan) -> str:
        count, all_ = len(plan.visited), len(plan.train.samples.indices)
        whole = (
            f"all {all_:,} samples" if count == all_ else f"{count:,} of {all_:,} samples, those that the run visits,"
        )
        return f"{whole} are scored before the first step, unless the store holds them"

    @classmethod
    def open(cls, plan: RunPlan, layout: Layout) -> "Frozen":
        """Raises SettingsError as `scored_column`."""
        return cls(scored_column(plan, layout, history_weights(plan.settings), plan.settings.history.store))

    def token_values(self) -> TokenValues:
        return self.column

    def folders(self) -> list[Path]:
        return [self.column.path]


def scored_column(plan: RunPlan, layout: Layout, weights: WeightsSource, path: str | None = None) -> TokenColumn:
    """Losses of `plan.visited` under frozen weights, from the store at `path` (default: beside the data), scored if need be.

    All ranks call it. Raises SettingsError where a store lies in the way that belongs to other data, tokenizer, template or
    weights.
    """
    identity = broadcast_object(
        history_identity(
            plan.train.store.manifest,
            weights_fingerprint=weights.fingerprint() if layout.rank == 0 else "",
            precision=numerics_of(plan.settings),
            scored_length=int(plan.train.samples.lengths.max()),
        ),
        source=0,
    )
    earlier = identity | {"num_scored": len(plan.train.samples.indices)}  # as version 1 told stores apart
    before, now = (history_path(plan.train.store.path, one) for one in (earlier, identity))
    path = path or broadcast_object(before if is_column(before) else now, source=0)
    lock = Lock(f"{path}.lock")
    with lock:
        holds = partial(_holds_visited, path, plan)
        if not there_or_ours(lock, holds, layout, what="history losses", doing=f"scoring {path}"):
            build_history(lambda: frozen_model(weights, plan, layout), plan, layout, path, identity)
    column, problems = None, []
    try:
        column = TokenColumn(path)
        column.require(earlier if column.version == FIRST_VERSION else identity)
        if missing := len(missing_samples(column, plan)):
            problems = [
                f"history.store={path}: {missing} samples are not seen here: name a folder that all nodes share"
            ]
    except ValueError as error:
        problems = [f"history.store={path}: {error}"]
    agree_on_problems(problems)
    assert column is not None
    return column


def missing_samples(column: TokenColumn, plan: RunPlan) -> np.ndarray:
    """int64, ascending: numbers of the samples that the run visits and the column does not hold."""
    offsets = plan.train.store.offsets
    return plan.visited[~column.holds(offsets[plan.visited], offsets[plan.visited + 1])]


def _holds_visited(path: str, plan: RunPlan) -> bool:
    """Whether the store holds all that the run visits."""
    try:
        return is_column(path) and not len(missing_samples(TokenColumn(path), plan))
    except ValueError:  # told where it is opened
        return True


def there_or_ours(lock: Lock, is_there: Callable[[], bool], layout: Layout, *, what: str, doing: str) -> bool:
    """Whether what a lock guards is there. If not, rank 0 holds the lock on return; another run that holds it is waited for.

    A sweep's runs start together on one data folder: one of them works, the others use what it has made. All ranks call it;
    `is_there` is asked on rank 0. `what`, `doing`: what is waited for, and what the other run does to it, for people.
    """
    told = False
    while True:
        there, holder = False, None
        if layout.rank == 0:
            there = is_there()
            holder = None if there else lock.take()
            # Another run may have finished between the two questions.
            there = there or (holder is None and is_there())
            if holder and not told:
                print(f"{what}: waiting for {holder}, which is {doing}", flush=True)
                told = True
        there, holder = broadcast_object((there, holder), source=0, group=layout.control)
        if there or holder is None:
            return there
        watchdog.arrived(f"waiting for another run's {what}")
        time.sleep(2)


def history_weights(settings: Settings) -> WeightsSource:
    """The frozen weights that history is scored with: `history.hf_path`, or the starting weights."""
    return WeightsSource(settings.history.hf_path) if settings.history.hf_path else starting_weights(settings)


def frozen_model(source: WeightsSource, plan: RunPlan, layout: Layout) -> Model:
    """The model of these weights, without gradients, ready to score."""
    settings = plan.settings if source.adapters else replace(plan.settings, lora=LoraSettings())
    model = build_model(read_architecture(source.hf_path), settings, layout, trainable=False)
    source.load(model)
    return model


def history_identity(
    manifest: StoreManifest, *, weights_fingerprint: str, precision: str, scored_length: int
) -> dict[str, Any]:
    """Everything that history losses depend on; a store is used only where all of it is equal.

    `scored_length`: tokens after which samples were cut.
    """
    return {
        "data": manifest.data_fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "template": manifest.template_fingerprint,
        "weights": weights_fingerprint,
        "precision": precision,
        "scored_length": scored_length,
    }


def history_path(data: Path, identity: dict[str, Any]) -> str:
    """Default folder of a history store: beside the data, named by its identity."""
    return column_path(data, "history", identity)


def build_history(model: Callable[[], Model], plan: RunPlan, layout: Layout, path: str, identity: dict) -> None:
    """Score the samples that the run visits and the token column at `path` does not hold yet; it may be stopped any time.

    `model` makes the history model. Samples go in the order of the store; one process gathers and writes them, so that nothing
    depends on how the file system treats several writers. Tokens of a sample that are not scored (first tokens, cut-off tails,
    context) are NaN. Raises SettingsError where another column is in the way.
    """
    store = plan.train.store
    problem, missing, writer = None, plan.visited[:0], None
    if layout.is_writer:
        try:
            writer = TokenColumnWriter(path, identity, int(store.offsets[-1]))
            missing = missing_samples(TokenColumn(path), plan)
        except (ValueError, OSError) as error:
            problem = str(error)
    source = writer_rank(layout)
    problem, missing = broadcast_object((problem, missing), source=source)
    if problem:
        raise SettingsError([f"history.store={path}: {problem}"])
    if len(missing):
        loader = sequential_loader(plan.train, plan, layout, indices=missing)
        for _, reports in scored_batches(model(), loader, layout, title="history losses"):
            losses = gather_losses(reports, layout)
            problem = _not_finite(losses, store) if losses is not None else None
            if problem := broadcast_object(problem, source=source, group=layout.control):
                raise SettingsError([f"history.store={path}: {problem}"])
            if writer is not None and losses is not None:
                with naming(writer.path):
                    write_losses(writer, store, losses)
                    writer.commit()
    if writer is not None:
        writer.close()
    torch.distributed.barrier(group=layout.control)


def write_losses(writer: TokenColumnWriter, store: SampleStore, losses: list[SampleLosses]) -> None:
    """Write the losses of samples, ascending; those that follow each other in the store at once."""
    waiting: list[np.ndarray] = []
    start = stop = 0
    for one in losses:
        if store.offsets[one.index] != stop and waiting:
            writer.write(start, np.concatenate(waiting))
            waiting = []
        if not waiting:
            start = stop = int(store.offsets[one.index])
        values = np.full(store.lengths[one.index], np.nan, dtype=np.float32)
        values[: len(one.values)] = one.values
        waiting.append(values)
        stop += len(values)
    if waiting:
        writer.write(start, np.concatenate(waiting))


def _not_finite(losses: list[SampleLosses], store: SampleStore) -> str | None:
    """The first response token of a batch whose loss says nothing."""
    for one in losses:
        wrong = response_losses_missing(one, store)
        if wrong.any():
            first = int(wrong.argmax())
            return (
                f"the history model's loss of the token at position {first} of input row {store.rows[one.index]} is "
                f"{one.values[first]}: check the weights of history.hf_path (default: model.hf_path), or use "
                "training.precision=fp32"
            )
    return None


def response_losses_missing(one: SampleLosses, store: SampleStore) -> np.ndarray:
    """bool [its length]: response tokens of a sample whose loss is not finite."""
    wrong = (store.roles(one.index, len(one.values)) == 1) & ~np.isfinite(one.values)
    wrong[0] = False  # nothing precedes it
    return wrong
