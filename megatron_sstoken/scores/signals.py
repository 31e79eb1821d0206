"""From losses and attention to a score per token: pure functions over one-dimensional tensors.

All tensors hold the T tokens of whole samples, one sample after another, in any number; entry t speaks of token t.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenSignals:
    """What selection knows of T tokens. Values outside `response` are undefined, NaN included, and never used."""

    segment: torch.Tensor
    """int64 [T]: index of the token's sample, in [0, num_segments); −1 is padding."""
    num_segments: int
    response: torch.Tensor
    """bool [T]: response tokens at position ≥ 1, the set R of the paper."""
    sample: torch.Tensor
    """int64 [T]: row number in the input."""
    position: torch.Tensor
    """int64 [T]: position in the sample."""
    loss: torch.Tensor
    """fp32 [T], nats, under the weights of this step."""
    history_loss: torch.Tensor
    """fp32 [T], nats, under the history weights."""
    attention: torch.Tensor
    """fp32 [T] in [0, 1]: attention mass on the context."""


def retrospective_excess_loss(loss: torch.Tensor, history_loss: torch.Tensor) -> torch.Tensor:
    """REL = history loss − loss (ssToken, Eq. 3): large where the model has become better than its past self.

    RHO-1's excess loss has the opposite sign.
    """
    return history_loss - loss


def normalize_per_sample(
    rel: torch.Tensor,
    response: torch.Tensor,
    segment: torch.Tensor,
    num_segments: int,
    rel_floor: float,
    epsilon: float = 1e-8,
) -> torch.Tensor:
    """Min-max of `rel` over the response tokens of each sample, fp32 [T]; NaN outside `response`.

    A sample whose values spread less than `rel_floor` gets 0 throughout: right after the start the model and its past
    are the same, and min-max would blow up rounding. 0 reproduces the official code.
    """
    owner = segment.clamp(min=0)
    lowest = rel.new_full((max(num_segments, 1),), torch.inf)
    lowest = lowest.scatter_reduce(0, owner, rel.masked_fill(~response, torch.inf), "amin")
    highest = rel.new_full((max(num_segments, 1),), -torch.inf)
    highest = highest.scatter_reduce(0, owner, rel.masked_fill(~response, -torch.inf), "amax")
    spread = (highest - lowest)[owner]
    normalized = (rel - lowest[owner]) / (spread + epsilon)
    normalized = torch.where(spread < rel_floor, torch.zeros_like(rel), normalized)
    return torch.where(response, normalized, torch.nan)


def combine(rel_norm: torch.Tensor, attention: torch.Tensor, gamma: float) -> torch.Tensor:
    """score = γ·rel_norm + (1 − γ)·attention, fp32 [T]; at γ = 0 or 1 the other signal is not looked at."""
    if gamma == 0:
        return attention.clone()
    if gamma == 1:
        return rel_norm.clone()
    return gamma * rel_norm + (1 - gamma) * attention
