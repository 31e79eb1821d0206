"""Which rows of hidden states the head reads: those of tokens with a loss, as the host knows them before the pass."""

from dataclasses import dataclass

import numpy as np
import torch

from megatron_sstoken.device import to_compute_device


@dataclass
class HeadRows:
    """The rows of one context parallel rank that the head reads. Indices lie on the device, their numbers on the host.

    So nobody waits for the device to learn how many there are.
    """

    scored: torch.Tensor
    """int64 [n]: the rows with a label among the rank's tokens."""
    padded: torch.Tensor
    """int64 [m]: those among the rows that this rank holds between layers, then repetitions of row 0 where another tensor
    rank has more."""
    number: int
    """How many of `padded` are not repetitions."""
    num_trained: int | None = None
    """How many of the losses get a gradient, or at most, set before the backward pass; None: to be found out there."""


def head_rows(scored: np.ndarray, sequence_ranks: int, sequence_rank: int) -> HeadRows:
    """`scored`: bool [tokens of this context parallel rank], alike on all tensor ranks.

    Sequence parallel deals tokens out evenly to `sequence_ranks` (1 without it), whose collectives want equally many rows of
    each: as many as the fullest has, and one at least.
    """
    parts = scored.reshape(sequence_ranks, -1)
    own = np.flatnonzero(parts[sequence_rank])
    padded = np.zeros(max(int(parts.sum(axis=1).max()), 1), dtype=np.int64)
    padded[: len(own)] = own
    indices = to_compute_device(torch.from_numpy(np.concatenate([np.flatnonzero(scored), padded])))
    return HeadRows(indices[: -len(padded)], indices[-len(padded) :], len(own))
