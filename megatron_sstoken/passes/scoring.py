"""Forward-only passes over prepared data, in its order."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from megatron_sstoken import watchdog
from megatron_sstoken.data.batches import BatchLoader, Packing, PackOrder, TokenBatch, TokenValues
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport, score_batch
from megatron_sstoken.run_plan import DataPlan, RunPlan

ScoreBatch = Callable[[int, list[TokenBatch]], list[TokenReport]]
"""Number of a global batch and this rank's micro-batches of it → reports, on the last stage."""


def sequential_loader(
    data: DataPlan,
    plan: RunPlan,
    layout: Layout,
    history: TokenValues | None = None,
    *,
    indices: np.ndarray | None = None,
    weighted: bool = False,
    weights: TokenValues | None = None,
    known: Mapping[str, TokenValues] | None = None,
) -> BatchLoader:
    """Every sample of a folder once, or those of `indices` (ascending), in its order; packed where training packs.

    `weighted`, `weights`, `known`: as for `BatchLoader`.
    """
    capacity = plan.settings.data.sequence_length
    packing: Packing = "next_fit" if plan.settings.data.packing else "none"
    samples = data.samples if indices is None else replace(data.samples, indices=indices)
    order = PackOrder(samples, seed=0, shuffle=False, packing=packing, capacity=capacity)
    return BatchLoader(
        data.store,
        order,
        plan.shape,
        data_rank=layout.data_rank,
        num_packs=order.num_packs(1),
        history=history,
        weighted=weighted,
        weights=weights,
        known=known,
    )


def scored_batches(
    model: Model, loader: BatchLoader, layout: Layout, *, title: str, score: ScoreBatch | None = None
) -> Iterator[tuple[int, list[TokenReport]]]:
    """Global batches as (number, this rank's reports), with a progress bar on rank 0.

    `score` takes the place of `score_batch`.
    """
    model.train(False)
    for number in tqdm(range(loader.num_batches), title, unit="batch", disable=layout.rank != 0):
        watchdog.arrived(f"{title}, batch {number + 1}")
        batches = loader.load(number)
        yield number, score_batch(model, batches) if score is None else score(number, batches)
