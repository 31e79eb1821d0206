"""What is known of each token of a micro-batch, and ssToken's score of it: pure functions on tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSignals:
    """The T tokens of one micro-batch on one data-parallel rank; entry t of each tensor is about token t."""

    segment: Tensor
    """int64 [T]: which sample of this micro-batch, from 0; −1 is padding."""
    num_segments: int
    """Samples in this micro-batch."""
    response: Tensor
    """bool [T]: response tokens at position 1 or later, which compete."""
    sample: Tensor
    """int64 [T]: row number in the input."""
    position: Tensor
    """int64 [T]: position in the sample."""
    values: Mapping[str, Tensor]
    """Signal → fp32 [T], undefined outside `response`: it may hold anything there, even NaN. `loss` (nats, under the weights
    of this step) is always there; the others where the method needs them:

    `history_loss` (nats, under the history weights), `attention` (in [0, 1]: mean over heads of the attention that goes to
    earlier context tokens), `entropy` (nats) and `top1` (probability of the likeliest token) of the prediction.
    """

    response_counts: Sequence[int] | None = None
    """Response tokens of each sample, where the host knows them: then nothing waits for the device to count."""

    @property
    def competing(self) -> Tensor:
        """bool [T]: the tokens that a method chooses among."""
        return self.response

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def changed(self, **values: Tensor) -> "TokenSignals":
        """The same tokens with other or further values."""
        return replace(self, values={**self.values, **values})


def concatenate_signals(parts: Sequence[TokenSignals]) -> TokenSignals:
    """One or more micro-batches, all with the same signals, as one, for a selection over all of them; samples stay apart."""
    segments, first = [], 0
    for part in parts:
        segments.append(torch.where(part.segment >= 0, part.segment + first, -1))
        first += part.num_segments
    places = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("response", "sample", "position")}
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0].values}
    known = [part.response_counts for part in parts if part.response_counts is not None]
    counts = [count for of_part in known for count in of_part] if len(known) == len(parts) else None
    return TokenSignals(torch.cat(segments), first, values=values, response_counts=counts, **places)


def retrospective_excess_loss(loss: Tensor, history_loss: Tensor) -> Tensor:
    """REL = history − current, fp32 in nats: large where the model has become better than its past self.

    ssToken (arXiv 2510.18250) Eq. 3. RHO-1's excess loss has the opposite sign (current − reference).
    """
    return history_loss.float() - loss.float()


def normalize_per_sample(
    rel: Tensor, response: Tensor, segment: Tensor, num_segments: int, rel_floor: float, eps: float = 1e-8
) -> Tensor:
    """REL scaled to [0, 1] over the response tokens of each sample: (rel − min) / (max − min + eps), in fp32.

    rel: fp32 [T]; response: bool [T]; segment: int64 [T]. A sample whose max − min is below `rel_floor`
    (nats) gets 0 throughout: before the model has moved, min-max would blow numerical noise up to [0, 1]. 0
    is the official code. Returns fp32 [T], NaN outside `response` and where `rel` is NaN (which does not
    touch the sample's other tokens).
    """
    rel = rel.float()
    known = response & ~rel.isnan()
    slot = torch.where(known, segment, num_segments)
    lowest, highest = (
        rel.new_full((num_segments + 1,), start).scatter_reduce(0, slot, rel, reduce)[slot]
        for start, reduce in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    spread = highest - lowest
    scaled = torch.where(spread < rel_floor, 0.0, (rel - lowest) / (spread + eps))
    return torch.where(known, scaled, torch.nan)


def combine(rel_norm: Tensor, attention: Tensor, gamma: float) -> Tensor:
    """The ssToken score γ·rel_norm + (1−γ)·attention, fp32 [T]. ssToken, arXiv 2510.18250.

    At γ = 0 and γ = 1 the unused signal is not touched, so that NaN in it cannot reach the score. Raises
    ValueError for γ outside [0, 1].
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} is outside [0, 1]: it is the weight of the excess loss in the score")
    if gamma == 0:
        return attention.float()
    if gamma == 1:
        return rel_norm.float()
    return gamma * rel_norm.float() + (1 - gamma) * attention.float()
