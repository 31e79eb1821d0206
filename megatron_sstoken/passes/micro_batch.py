"""A micro-batch as one rank computes it: whole samples for the selection, this rank's share of the tokens for the model."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.device import to_compute_device
from megatron_sstoken.model.attention import SampleBounds, sample_bounds
from megatron_sstoken.model.build import Model
from megatron_sstoken.model.head import IGNORE_INDEX


@dataclass(frozen=True)
class MicroBatch:
    """Everything lies on the compute device. T tokens, of which this context parallel rank computes T / cp."""

    batch: TokenBatch
    bounds: SampleBounds
    tokens: torch.Tensor
    """int64 [T / cp]."""
    position: torch.Tensor
    """int64 [T / cp]."""
    labels: torch.Tensor
    """int64 [T / cp]: `TokenBatch.labels` where the token that is predicted has a loss, `IGNORE_INDEX` elsewhere."""
    context: torch.Tensor
    """bool [T / cp]."""
    num_scored: int
    """How many of the T tokens have a loss."""

    def note_selected(self, number: int | None) -> None:
        """Before the backward pass: how many of the T tokens are trained on, or at most, where the host knows it.

        Which of them this context parallel rank holds only the device knows, unless they are all that have a loss.
        """
        rows = self.bounds.head_rows
        if rows is not None and number == self.num_scored:
            rows.num_trained = len(rows.scored)
        elif rows is not None and self.bounds.index is None:
            rows.num_trained = number


def micro_batch(model: Model, batch: TokenBatch, scored: np.ndarray | None = None) -> MicroBatch:
    """Bring a batch to the device; nobody waits for it.

    `scored`: bool [T], on the host, the tokens with a loss; default: all response tokens, and those of the context where the
    model scores them, too.
    """
    layout, facts = model.layout, batch.facts
    if scored is None:
        scored = facts.follows if model.scores_context else facts.response
    batch = batch.mapped(to_compute_device)
    bounds = sample_bounds(batch.lengths, layout.context_size, layout.context_rank)
    predicting = np.append(scored[1:], False)
    bounds.head_rows = model.head_rows(predicting if bounds.local is None else predicting[bounds.local])
    labels = torch.where(to_compute_device(torch.from_numpy(predicting)), batch.labels[0], IGNORE_INDEX)
    return MicroBatch(
        batch,
        bounds,
        tokens=of_this_rank(batch.tokens[0], bounds.index),
        position=of_this_rank(batch.position, bounds.index),
        labels=of_this_rank(labels, bounds.index),
        context=of_this_rank(batch.context, bounds.index),
        num_scored=int(scored.sum()),
    )


def of_this_rank(values: torch.Tensor, index: torch.Tensor | None) -> torch.Tensor:
    """The entries [T / cp] of whole samples [T] that this context parallel rank holds."""
    return values if index is None else values.index_select(0, index)


def to_predicting(values: torch.Tensor) -> torch.Tensor:
    """Move values from the predicted token to the position whose output predicts it; zero at the end."""
    moved = torch.zeros_like(values)
    moved[:-1] = values[1:]
    return moved
