"""History from frozen weights: the data is scored once, before training, into a store that later runs reuse."""

import hashlib
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_sstoken import watchdog
from megatron_sstoken.checkpoint.weights_source import WeightsSource, starting_weights
from megatron_sstoken.config import LoraSettings, Settings, SettingsError
from megatron_sstoken.data.batches import BatchLoader, TokenValues
from megatron_sstoken.data.column import TokenColumn, TokenColumnWriter
from megatron_sstoken.data.store import StoreManifest
from megatron_sstoken.files import naming
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.lock import Lock
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.parallel import Layout, agree_on_problems, broadcast_object, writer_rank
from megatron_sstoken.passes.columns import gather_columns
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.run_plan import RunPlan


class Frozen(HistorySource):
    """Reads the losses of a store, which it fills first if need be."""

    name = "frozen"
    uses = frozenset({"hf_path", "store"})

    def __init__(self, column: TokenColumn):
        self.column = column

    @classmethod
    def describe(cls, settings: Settings) -> str:
        return f"{cls.name} ({settings.history.hf_path or 'starting weights'})"

    @classmethod
    def open(cls, plan: RunPlan, layout: Layout) -> "Frozen":
        """Raises SettingsError where a store lies in the way that belongs to other data, tokenizer, template or weights."""
        weights = history_weights(plan.settings)
        identity = broadcast_object(
            history_identity(
                plan.train.store.manifest,
                weights_fingerprint=weights.fingerprint() if layout.rank == 0 else "",
                precision=numerics_of(plan.settings),
                scored_length=int(plan.train.samples.lengths.max()),
                num_scored=len(plan.train.samples.indices),
            ),
            source=0,
        )
        path = plan.settings.history.store or history_path(plan.train.store.path, identity)
        lock = Lock(f"{path}.lock")
        with lock:
            if not _complete_or_ours(path, lock, layout):
                build_history(history_model(plan, layout), plan, layout, path, identity)
        column, problems = None, []
        try:
            column = TokenColumn(path)
            column.require(identity)
        except ValueError as error:
            problems = [f"history.store={path}: {error}"]
        agree_on_problems(problems)
        assert column is not None
        return cls(column)

    def token_values(self) -> TokenValues:
        return self.column

    def folders(self) -> list[Path]:
        return [self.column.path]


def _complete_or_ours(path: str, lock: Lock, layout: Layout) -> bool:
    """Whether the store is complete. If not, rank 0 holds the lock on return; while another run scores it, all wait.

    A sweep's runs start together on one data folder: one of them scores, the others use what it has scored.
    """
    told = False
    while True:
        complete, holder = False, None
        if layout.rank == 0:
            complete = os.path.isfile(os.path.join(path, "manifest.json"))
            holder = None if complete else lock.take()
            # Another run may have finished between the two questions.
            complete = complete or (holder is None and os.path.isfile(os.path.join(path, "manifest.json")))
            if holder and not told:
                print(f"history losses: waiting for {holder}, which is scoring {path}", flush=True)
                told = True
        complete, holder = broadcast_object((complete, holder), source=0, group=layout.control)
        if complete or holder is None:
            return complete
        watchdog.arrived("waiting for another run's history")
        time.sleep(2)


def history_weights(settings: Settings) -> WeightsSource:
    """The frozen weights that history is scored with: `history.hf_path`, or the starting weights."""
    return WeightsSource(settings.history.hf_path) if settings.history.hf_path else starting_weights(settings)


def history_model(plan: RunPlan, layout: Layout) -> Model:
    """The history model, without gradients, ready to score."""
    source = history_weights(plan.settings)
    settings = plan.settings if source.adapters else replace(plan.settings, lora=LoraSettings())
    model = build_model(read_architecture(source.hf_path), settings, layout, trainable=False)
    source.load(model)
    return model


def history_identity(
    manifest: StoreManifest, *, weights_fingerprint: str, precision: str, scored_length: int, num_scored: int
) -> dict[str, Any]:
    """Everything that history losses depend on; a store is used only where all of it is equal.

    `scored_length`: tokens after which samples were cut; `num_scored`: samples not left out for their length.
    """
    return {
        "data": manifest.data_fingerprint,
        "tokenizer": manifest.tokenizer_fingerprint,
        "template": manifest.template_fingerprint,
        "weights": weights_fingerprint,
        "precision": precision,
        "scored_length": scored_length,
        "num_scored": num_scored,
    }


def history_path(data: Path, identity: dict[str, Any]) -> str:
    """Default folder of a history store: beside the data, named by its identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return str(data / "history" / digest[:16])


def build_history(model: Model, plan: RunPlan, layout: Layout, path: str, identity: dict) -> None:
    """Score every sample of `plan.train` with `model` into a token column at `path`; resumes a stopped one.

    Global batches go in the order of the store; one process gathers and writes them, so that nothing depends on how
    the file system treats several writers. Tokens that are not scored (first tokens, cut-off tails, dropped samples)
    are NaN.
    """
    store = plan.train.store
    problem, num_written, writer = None, 0, None
    if layout.is_writer:
        try:
            writer = TokenColumnWriter(path, identity, int(store.offsets[-1]))
            num_written = writer.num_written
        except (ValueError, OSError) as error:
            problem = str(error)
    source = writer_rank(layout)
    problem, num_written = broadcast_object((problem, num_written), source=source)
    if problem:
        raise SettingsError([f"history.store={path}: {problem}"])
    loader = sequential_loader(plan.train, plan, layout)
    # Batches may have had another size before: go on with the first that holds something not yet written.
    first = next((b for b in range(loader.num_batches) if _batch_span(loader, b)[1] > num_written), loader.num_batches)
    for number, reports in scored_batches(model, loader, layout, title="history losses", first=first):
        columns = gather_columns(reports, layout)
        problem = _not_finite(columns) if writer is not None and columns is not None else None
        if problem := broadcast_object(problem, source=source, group=layout.control):
            raise SettingsError([f"history.store={path}: {problem}"])
        if writer is not None and columns is not None:
            start, stop = _batch_span(loader, number)
            values = np.full(stop - start, np.nan, dtype=np.float32)
            index = np.searchsorted(store.rows, columns["sample"])
            values[store.offsets[index] + columns["position"] - start] = columns["loss"]
            with naming(writer.path):
                writer.append(values[max(writer.num_written - start, 0) :])
                writer.commit()
    if writer is not None:
        with naming(writer.path):
            writer.finish()
    torch.distributed.barrier(group=layout.control)


def _not_finite(columns: dict[str, np.ndarray]) -> str | None:
    """The first response token of a batch whose loss says nothing."""
    wrong = (columns["role"] == 1) & (columns["position"] > 0) & ~np.isfinite(columns["loss"])
    if not wrong.any():
        return None
    first = int(wrong.argmax())
    return (
        f"the history model's loss of the token at position {columns['position'][first]} of input row "
        f"{columns['sample'][first]} is {columns['loss'][first]}: check the weights of history.hf_path (default: "
        "model.hf_path), or use training.precision=fp32"
    )


def _batch_span(loader: BatchLoader, number: int) -> tuple[int, int]:
    """Flat tokens [start, stop) that belong to a batch of an unshuffled order, unused samples before the next included."""
    store, packs = loader.store, loader.packs(number)
    start = 0 if number == 0 else int(store.offsets[packs[0][0]])
    following = loader.packs(number + 1) if number + 1 < loader.num_batches else []
    stop = int(store.offsets[following[0][0]]) if following else int(store.offsets[-1])
    return start, stop
