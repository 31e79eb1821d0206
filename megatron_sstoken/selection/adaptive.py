"""A share ρ that follows the scores: Otsu's threshold between low and high ones, the same in every layout."""

from decimal import ROUND_FLOOR, Decimal
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sstoken.selection.rho import Rho, parse_rho
from megatron_sstoken.selection.topk import Rounds, Traffic, histogram, refuse_nan, run_rounds, sum_over

NUM_BINS = 1024


def choose_rho(
    scores: Tensor,
    token_ids: Tensor,
    rho_min: Rho,
    rho_max: Rho,
    group: dist.ProcessGroup | None,
    traffic: Traffic | None = None,
    *,
    bounded: bool = True,
) -> Decimal:
    """The share of the scores of all ranks that lies above Otsu's threshold, within [rho_min, rho_max].

    scores: fp32 [n] of this rank, n may be 0; in [0, 1] if `bounded`, else the histogram reaches from the lowest to the
    highest finite score of all ranks, which one more collective of 16 bytes finds. What lies outside counts as the nearest
    end, infinite scores too. token_ids: int64 [n] as `topk.token_id` makes them; group: None is this process alone. All
    ranks call it; one collective of 8 KiB. Returns the same decimal on every rank (see `otsu_rho`). Raises ValueError for
    bounds that `parse_rho` refuses or that are in the wrong order, and the same ValueError on every rank if a score of any
    rank is NaN.
    """
    low, high = _bounds(rho_min, rho_max)
    reach = None if bounded else score_range(scores)
    if reach is not None:
        if group is not None:
            dist.all_reduce(reach, op=dist.ReduceOp.MAX, group=group)
        if traffic is not None:
            traffic.add(reach)
    (rho,) = run_rounds([rho_rounds(scores, token_ids, low, high, reach)], sum_over(group), traffic)
    return rho


def score_range(scores: Tensor) -> Tensor:
    """float64 [2]: the highest of the finite scores, and of their negatives; −inf both where there is none.

    Of several ranks the larger of each counts.
    """
    wide = torch.cat([scores.double(), scores.new_full((1,), torch.nan, dtype=torch.float64)])
    return torch.stack([torch.where(wide.isfinite(), sign * wide, -torch.inf).amax() for sign in (1, -1)])


def rho_rounds(
    scores: Tensor, token_ids: Tensor, rho_min: Decimal, rho_max: Decimal, reach: Tensor | None = None
) -> Rounds[Decimal]:
    """One rank of `choose_rho`. reach: `score_range` of all ranks; None: scores lie in [0, 1]."""
    known = scores.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if reach is not None:
        lowest, highest = -reach[1], reach[0]
        # One correctly rounded operation after another on equal numbers: a score has the same bin on every rank.
        known = torch.where(highest > lowest, (known.double() - lowest) / (highest - lowest), 0.0)
    bins = (known.clamp(0, 1) * NUM_BINS).long().clamp(max=NUM_BINS - 1)  # the product is exact: a power of two
    sums = yield histogram(torch.where(scores.isnan(), NUM_BINS, bins), NUM_BINS + 1)
    *counts, num_nan = sums.tolist()
    yield from refuse_nan(num_nan, scores, token_ids)
    return otsu_rho(counts, rho_min, rho_max)


def otsu_rho(counts: list[int], rho_min: Rho, rho_max: Rho) -> Decimal:
    """The share of a histogram above the cut of largest between-class variance, within [rho_min, rho_max].

    counts: how many scores fall in each bin, ascending. The share is rounded down to 6 decimals: below 10^6
    scores `count_selected` then gives exactly the number above the cut. Of equally good cuts the lower wins
    (a larger share); without a cut that has scores on both sides, `rho_max`. N. Otsu, IEEE Trans. SMC 9
    (1979): the variance is w0·w1·(m0 − m1)², compared here in exact integers.
    """
    low, high = _bounds(rho_min, rho_max)
    total = sum(counts)
    moment = sum(index * count for index, count in enumerate(counts))
    below = accumulate(counts)
    moment_below = accumulate(index * count for index, count in enumerate(counts))
    best, best_weight, num_above = 0, 1, total
    for w0, s0 in zip(below, moment_below, strict=True):
        w1, s1 = total - w0, moment - s0
        if w0 and w1:
            variance, weight = (s1 * w0 - s0 * w1) ** 2, w0 * w1
            if variance * best_weight > best * weight:
                best, best_weight, num_above = variance, weight, w1
    if num_above == total:
        return high
    share = (Decimal(num_above) / Decimal(total)).quantize(Decimal("1e-6"), rounding=ROUND_FLOOR)
    return min(max(share, low), high)


def _bounds(rho_min: Rho, rho_max: Rho) -> tuple[Decimal, Decimal]:
    if parse_rho(rho_min) > parse_rho(rho_max):
        raise ValueError(f"rho_min={rho_min} is above rho_max={rho_max}: use a smaller rho_min")
    return Decimal(str(rho_min)), Decimal(str(rho_max))
