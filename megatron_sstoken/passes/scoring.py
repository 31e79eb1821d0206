"""Forward-only passes over prepared data: history losses, token records, validation loss."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from megatron_sstoken.checkpoint.weights_source import history_model, history_weights
from megatron_sstoken.config import Settings, SettingsError
from megatron_sstoken.data.batches import BatchLoader, Packing, PackOrder
from megatron_sstoken.data.column import TokenColumn, TokenColumnWriter
from megatron_sstoken.history.identity import history_identity, history_path
from megatron_sstoken.model.backend import numerics_of
from megatron_sstoken.model.build import Model, broadcast_object
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport, score_batch
from megatron_sstoken.selection.methods import METHODS
from megatron_sstoken.training.metrics import summarize
from megatron_sstoken.training.records import RecordWriter, gather_columns
from megatron_sstoken.training.selector import Selector, score_and_select
from megatron_sstoken.validate.run import DataPlan, RunPlan


def sequential_loader(data: DataPlan, plan: RunPlan, layout: Layout, history: TokenColumn | None = None) -> BatchLoader:
    """Every sample of a folder once, in its order; packed where training packs."""
    capacity = plan.settings.data.sequence_length
    packing: Packing = "next_fit" if plan.settings.data.packing else "none"
    order = PackOrder(data.samples, seed=0, shuffle=False, packing=packing, capacity=capacity)
    return BatchLoader(
        data.store, order, plan.shape, data_rank=layout.data_rank, num_rows=order.num_rows(1), history=history
    )


def scored_batches(
    model: Model, loader: BatchLoader, layout: Layout, *, title: str, selector: Selector | None = None, first: int = 0
) -> Iterator[tuple[int, list[TokenReport]]]:
    """Global batches from `first` on as (number, this rank's reports), with a progress bar on rank 0."""
    model.train(False)
    numbers = range(first, loader.num_batches)
    for number in tqdm(numbers, title, loader.num_batches, unit="batch", initial=first, disable=layout.rank != 0):
        batches = loader.load(number)
        if selector is None:
            yield number, score_batch(model, batches)
        else:
            yield number, score_and_select(model, batches, replace(selector, draw=number))


def open_history(plan: RunPlan, layout: Layout) -> TokenColumn | None:
    """The stored history losses of `plan.train`, scored now if they are not there yet. All ranks call it.

    Raises SettingsError where a store lies in the way that belongs to other data, tokenizer, template or weights.
    """
    if not plan.needs_history or plan.settings.history.source != "frozen":
        return None
    weights = history_weights(plan)
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
    complete = broadcast_object(os.path.isfile(os.path.join(path, "manifest.json")), source=0)
    if not complete:
        model = history_model(plan, layout)
        build_history(model, plan, layout, path, identity)
        del model
    try:
        column = TokenColumn(path)
        column.require(identity)
    except ValueError as error:
        raise SettingsError([f"history.store={path}: {error}"]) from error
    return column


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
        if writer is not None and columns is not None:
            start, stop = _batch_span(loader, number)
            values = np.full(stop - start, np.nan, dtype=np.float32)
            index = np.searchsorted(store.rows, columns["sample"])
            values[store.offsets[index] + columns["position"] - start] = columns["loss"]
            writer.append(values[max(writer.num_written - start, 0) :])
            writer.commit()
    if writer is not None:
        writer.finish()
    torch.distributed.barrier(group=layout.control)


def _batch_span(loader: BatchLoader, number: int) -> tuple[int, int]:
    """Flat tokens [start, stop) that belong to a batch of an unshuffled order, unused samples before the next included."""
    store, rows = loader.store, loader.rows(number)
    start = 0 if number == 0 else int(store.offsets[rows[0][0]])
    following = loader.rows(number + 1) if number + 1 < loader.num_batches else []
    stop = int(store.offsets[following[0][0]]) if following else int(store.offsets[-1])
    return start, stop


def writer_rank(layout: Layout) -> int:
    """Global rank of the process that writes results, known to all."""
    ranks: list = [None] * layout.world_size
    torch.distributed.all_gather_object(ranks, layout.is_writer, group=layout.control)
    return ranks.index(True)


def write_records(model: Model, plan: RunPlan, layout: Layout, selector: Selector, history, path: str) -> None:
    """Score all samples of `plan.train` in their order and write their token records to `path`."""
    loader = sequential_loader(plan.train, plan, layout, history)
    with RecordWriter(path) if layout.is_writer else nullcontext() as writer:
        for _, reports in scored_batches(model, loader, layout, title="token records", selector=selector):
            columns = gather_columns(reports, layout)
            if writer is not None and columns is not None:
                writer.write(columns)


def validation_loss(model: Model, data: DataPlan, plan: RunPlan, layout: Layout) -> float:
    """Mean loss in nats over all response tokens of the validation data, each counting once. All ranks call it."""
    loader = sequential_loader(data, plan, layout)
    total, count = 0.0, 0
    for _, reports in scored_batches(model, loader, layout, title="validation"):
        metrics = summarize(reports, model.architecture, layout)
        if metrics.num_response:
            total += metrics.loss_all * metrics.num_response
            count += metrics.num_response
    model.train(True)
    return total / count


def selector_of(settings: Settings, layout: Layout, *, gamma: float, draw: int) -> Selector:
    """The selector of one global batch."""
    return Selector(
        settings.selection,
        gamma=gamma,
        seed=settings.training.seed,
        draw=draw,
        group=layout.data,
        history_by_adapters_off=settings.history.source == "adapters_off"
        and METHODS[settings.selection.method].needs_history,
    )
