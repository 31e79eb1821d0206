"""Token reports as numpy columns, gathered on the one process that writes files made of them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport


def columns_of(report: TokenReport) -> dict[str, np.ndarray]:
    """The real tokens of one micro-batch as numpy columns, in the batch's order; undefined values are NaN."""
    batch, selection = report.batch, report.selection
    if selection is not None:
        selection.require_numbers()
    undefined = torch.full_like(report.loss, torch.nan)

    def of_response(values: torch.Tensor | None) -> torch.Tensor:
        return undefined if values is None else torch.where(batch.response, values, torch.nan)

    role = torch.where(batch.context, 0, 1)
    columns = {
        "sample": batch.sample,
        "position": batch.position.int(),
        "token": batch.tokens[0].int(),
        "role": role.to(torch.int8),
        "loss": report.loss,
        "history_loss": undefined if report.history_loss is None else report.history_loss,
        "rel_norm": of_response(selection.rel_norm if selection else None),
        "attention": of_response(report.values.get("attention")),
        "score": of_response(selection.score if selection else None),
        "selected": selection.mask if selection else torch.zeros_like(batch.response),
        "weight": undefined
        if selection is None or report.weight is None
        else torch.where(selection.mask, report.weight, torch.nan),
        "entropy": report.values.get("entropy", undefined),
        "top1": report.values.get("top1", undefined),
    }
    real = batch.segment >= 0
    return {name: values[real].cpu().numpy() for name, values in columns.items()}


def gather_columns(reports: list[TokenReport], layout: Layout) -> dict[str, np.ndarray] | None:
    """The columns of all data-parallel ranks, sorted by sample and position, on the writer.

    All ranks may call it; only one process of each replica takes part, and all others get None at once.
    """
    if not layout.is_replica_leader:
        return None
    mine = [columns_of(report) for report in reports]
    gathered: list | None = [None] * layout.data_size if layout.is_writer else None
    dist.gather_object(mine, gathered, dst=dist.get_global_rank(layout.data, 0), group=layout.data)
    if gathered is None:
        return None
    parts = [columns for rank in gathered for columns in rank]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = np.lexsort((whole["position"], whole["sample"]))
    return {name: values[order] for name, values in whole.items()}


@dataclass(frozen=True)
class SampleLosses:
    """The losses of one sample in a global batch."""

    index: int
    """Its number in the store."""
    epoch: int
    values: np.ndarray
    """fp32 [its length in the run]; NaN where there is none."""


def gather_losses(reports: list[TokenReport], layout: Layout) -> list[SampleLosses] | None:
    """The losses of all data-parallel ranks, ascending by number and epoch, on the writer: 4 bytes a token are sent.

    All ranks may call it; only one process of each replica takes part, and all others get None at once.
    """
    if not layout.is_replica_leader:
        return None
    visits = [report.batch.visits for report in reports if report.batch.visits is not None]
    facts = [report.batch.facts for report in reports]
    losses = torch.cat([report.loss for report in reports]).cpu().numpy()
    mine = (
        [index for one in visits for index in one.index],
        [epoch for one in visits for epoch in one.epoch],
        [length - 1 for one in facts for length in one.sample_lengths],  # a first token has no loss
        losses[np.concatenate([one.follows for one in facts])],
    )
    gathered: list = [mine]
    if layout.data_size > 1:
        gathered = [None] * layout.data_size
        wanted = gathered if layout.is_writer else None
        dist.gather_object(mine, wanted, dst=dist.get_global_rank(layout.data, 0), group=layout.data)
    if not layout.is_writer:
        return None
    found = []
    for index, epoch, sizes, values in gathered:
        parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
        whole = (np.concatenate([[np.float32("nan")], part]) for part in parts)
        found += [SampleLosses(*one) for one in zip(index, epoch, whole, strict=True)]
    return sorted(found, key=lambda one: (one.index, one.epoch))
