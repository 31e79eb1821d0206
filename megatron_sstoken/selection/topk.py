"""Exact top-k: within segments by sorting, over all ranks by radix select. Nothing gathers all scores.

Radix select: scores become unsigned integers of the same order, and all ranks together narrow down the k-th largest
digit by digit, each round one all-reduce of a histogram. 32 bits in digits of 11, 11 and 10 bits are three rounds of
16 KiB: with 16-bit digits one round less would cost twenty times the bytes, and rounds of this size are bound by
latency anyway. Ties that straddle k go to the lowest token ids, found in the same way; only then there are six more
rounds. The traffic does not depend on the number of tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import torch
import torch.distributed as dist

_POSITION_BITS = 24
_DIGIT = 11
_KEY_BITS = 32
_ID_BITS = 63

Reduce = Callable[[torch.Tensor], torch.Tensor]
"""Sums an int64 tensor over all ranks."""


@dataclass
class Traffic:
    """What the collectives of one selection moved."""

    collectives: int = 0
    num_bytes: int = 0
    """Bytes that each rank contributes, over all collectives."""


def keep_fraction(rho: float | str | Decimal) -> Fraction:
    """ρ as the decimal number that was written, exactly. Raises ValueError outside (0, 1] or beyond 9 decimals."""
    try:
        fraction = Fraction(str(rho))
    except ValueError as error:
        raise ValueError(f"rho={rho} is not a number") from error
    if not 0 < fraction <= 1:
        raise ValueError(f"rho={rho} is outside (0, 1]")
    if 10**9 % fraction.denominator:
        raise ValueError(f"rho={rho} has more than 9 decimals: round it")
    return fraction


def count_selected(rho: float | str | Decimal, num: int) -> int:
    """ceil(ρ·num), exactly, for ρ's decimal value: 0.07 of 100 are 7, which floating point makes 8."""
    fraction = keep_fraction(rho)
    return -(-fraction.numerator * num // fraction.denominator)


def counts_selected(rho: float | str | Decimal, counts: torch.Tensor) -> torch.Tensor:
    """`count_selected` for every element of an int64 tensor, exact up to 9·10⁹ tokens each."""
    fraction = keep_fraction(rho)
    return -(-counts * fraction.numerator).div(fraction.denominator, rounding_mode="floor")


def sortable_keys(scores: torch.Tensor) -> torch.Tensor:
    """fp32 → int64 in [0, 2³²) of the same order; −0.0 and +0.0 become equal. NaN has no place in it."""
    bits = (scores.float() + 0.0).view(torch.int32).to(torch.int64)  # −0.0 + 0.0 is +0.0
    return torch.where(bits >= 0, bits + 2**31, -bits - 1)


def token_id(sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """One int64 that orders tokens by sample, then position. Positions must be below 2²⁴, samples below 2³⁹."""
    assert position.numel() == 0 or int(position.max()) < 2**_POSITION_BITS, "samples have fewer than 2²⁴ tokens"
    return (sample << _POSITION_BITS) | position


def split_token_id(identity: int) -> tuple[int, int]:
    """Sample and position of a token id."""
    return identity >> _POSITION_BITS, identity & (2**_POSITION_BITS - 1)


def segment_topk(
    scores: torch.Tensor, candidates: torch.Tensor, segment: torch.Tensor, num_segments: int, k: torch.Tensor
) -> torch.Tensor:
    """The k[s] highest-scored candidates of each segment s, bool [T]; among equals the lower index wins.

    `scores` fp32 [T] without NaN at candidates, `candidates` bool [T], `segment` int64 [T] in [0, num_segments) at
    candidates, `k` int64 [num_segments] of at most as many as there are candidates. Two stable sorts.
    """
    index = candidates.nonzero().squeeze(1)
    best_first = torch.sort(sortable_keys(scores[index]), descending=True, stable=True).indices
    owner = segment[index][best_first]
    by_segment = torch.sort(owner, stable=True).indices
    owner = owner[by_segment]
    sizes = torch.bincount(owner, minlength=num_segments)
    starts = sizes.cumsum(0) - sizes
    rank = torch.arange(len(owner), device=scores.device) - starts[owner]
    chosen = index[best_first[by_segment[rank < k[owner]]]]
    return torch.zeros_like(candidates).index_fill_(0, chosen, True)


def distributed_topk(
    scores: torch.Tensor,
    token_ids: torch.Tensor,
    rho: float | str | Decimal,
    group: dist.ProcessGroup | None,
    traffic: Traffic | None = None,
) -> tuple[torch.Tensor, float]:
    """The ceil(ρ·n) highest of all ranks' n scores: this rank's mask, and the lowest selected score.

    `scores` fp32 [m] and `token_ids` int64 [m] (unique over all ranks; among equal scores lower ids win) of this rank,
    m ≥ 0. Every rank of `group` calls it and runs the same collectives; None is a group of one. The mask equals
    `torch.topk` over the gathered scores. Raises ValueError on all ranks if any score is NaN, naming one of them. With
    no scores at all the threshold is NaN.
    """
    traffic = Traffic() if traffic is None else traffic

    def reduce(counts: torch.Tensor) -> torch.Tensor:
        traffic.collectives += 1
        traffic.num_bytes += counts.numel() * counts.element_size()
        if group is not None:
            dist.all_reduce(counts, group=group)
        return counts

    (mask,), threshold = select_over_shards([(scores, token_ids)], lambda total: count_selected(rho, total), reduce)
    return mask, threshold


def select_over_shards(
    shards: Sequence[tuple[torch.Tensor, torch.Tensor]], number_to_select: Callable[[int], int], reduce: Reduce
) -> tuple[list[torch.Tensor], float]:
    """The algorithm of `distributed_topk` over several shards (scores, token ids) in this process.

    With one shard and an all-reduce it is one rank's part; with all shards and an identity it simulates any number of
    ranks. `number_to_select` maps the global number of scores to k.
    """
    broken = [scores.isnan() for scores, _ in shards]
    keys = [sortable_keys(scores.masked_fill(nan, 0.0)) for (scores, _), nan in zip(shards, broken, strict=True)]
    active = [torch.ones_like(nan) for nan in broken]
    bins = 2**_DIGIT
    shift = _KEY_BITS - _DIGIT

    # The first round also counts the scores, and those that are NaN.
    first = torch.cat([_histogram(keys, active, shift, bins), torch.stack([nan.sum() for nan in broken]).sum()[None]])
    first = reduce(first)
    if int(first[-1]):
        identities = [ids for _, ids in shards]
        sample, position = split_token_id(_lowest_ids(identities, broken, 1, reduce))
        raise ValueError(f"the score of sample {sample}, position {position} is NaN: {int(first[-1])} such scores")
    histogram = first[:-1]
    total = int(histogram.sum())
    k = number_to_select(total)
    if k == 0 or total == 0:
        return [torch.zeros_like(nan) for nan in broken], float("nan")

    remaining, prefix, width = k, 0, _DIGIT
    while True:
        digit, remaining = _digit_of_kth_largest(histogram, remaining)
        prefix = (prefix << width) | digit
        active = [a & ((key >> shift) == prefix) for a, key in zip(active, keys, strict=True)]
        if shift == 0:
            break
        width = min(_DIGIT, shift)
        shift -= width
        histogram = reduce(_histogram(keys, active, shift, 2**width))
    masks = [key > prefix for key in keys]
    num_tied = int(histogram[digit])
    if remaining == num_tied:
        masks = [mask | tied for mask, tied in zip(masks, active, strict=True)]
    else:
        highest_id = _lowest_ids([ids for _, ids in shards], active, remaining, reduce)
        masks = [
            mask | (tied & (ids <= highest_id)) for mask, tied, (_, ids) in zip(masks, active, shards, strict=True)
        ]
    return masks, _score_of_key(prefix)


def _histogram(keys: Sequence[torch.Tensor], active: Sequence[torch.Tensor], shift: int, bins: int) -> torch.Tensor:
    """How often each digit occurs among the active keys of all shards, int64 [bins]."""
    counts = [torch.bincount((key[a] >> shift) & (bins - 1), minlength=bins) for key, a in zip(keys, active, strict=True)]
    return torch.stack(counts).sum(dim=0)


def _digit_of_kth_largest(histogram: torch.Tensor, k: int) -> tuple[int, int]:
    """The digit of the k-th largest, and its rank (from 1) among those that share the digit."""
    from_above = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, k))
    above = int(from_above[place - 1]) if place else 0
    return len(histogram) - 1 - place, k - above


def _lowest_ids(
    identities: Sequence[torch.Tensor], active: Sequence[torch.Tensor], count: int, reduce: Reduce
) -> int:
    """The count-th lowest of the active ids of all shards."""
    mirrored = [2**_ID_BITS - 1 - ids for ids in identities]
    remaining, prefix, shift = count, 0, _ID_BITS
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        histogram = reduce(_histogram(mirrored, active, shift, 2**width))
        digit, remaining = _digit_of_kth_largest(histogram, remaining)
        prefix = (prefix << width) | digit
        active = [a & ((key >> shift) == prefix) for a, key in zip(active, mirrored, strict=True)]
    return 2**_ID_BITS - 1 - prefix


def _score_of_key(key: int) -> float:
    """The fp32 score that `sortable_keys` maps to `key`."""
    bits = key - 2**31 if key >= 2**31 else -key - 1
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
