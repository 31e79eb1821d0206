"""Exact top-k of scores: within each sample by one sort, across ranks by radix select over histograms.

Nobody gathers scores. A distributed algorithm here is a generator run by every rank on its own shard: it
yields integer counts, and is sent their sum over all ranks (`Rounds`). What it yields next depends on sums
alone, never on the shard, so all ranks take part in the same collectives whatever they hold. `run_rounds`
drives one generator over a process group, or thousands of them in one process: a simulation runs the very
code that training does.
"""

import math
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias, TypeVar, overload

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sstoken.selection.rho import Rho, parse_rho

Result = TypeVar("Result")
Rounds: TypeAlias = Generator[Tensor, Tensor, Result]
"""Yields int64 counts of this rank, receives their sum over all ranks, returns a result."""

POSITION_BITS = 24
SCORE_DIGITS = (11, 11, 10)
"""Bits of a key that each round settles. A round is one all-reduce of 2^bits counts of 8 bytes: 11 + 11 + 10
takes 3 rounds and 40 KiB, 8·4 takes 4 and 8 KiB, 16 + 16 takes 2 and 1 MiB. 16 KiB still costs what an empty
all-reduce costs (latency, tens of µs), 512 KiB does not (50 µs at 10 GB/s): three rounds are the quickest."""
ID_DIGITS = (11, 11, 11, 10, 10, 10)
"""The same for the 63 bits of a token id; run only if some, not all, of the tokens that tie are taken."""


@dataclass
class Traffic:
    """What a rank handed to all-reduce."""

    collectives: int = 0
    num_bytes: int = 0

    def add(self, counts: Tensor) -> None:
        self.collectives += 1
        self.num_bytes += counts.nbytes


@dataclass(frozen=True)
class TopK:
    """A rank's part of a selection over all ranks; all but `mask` is the same on every rank."""

    mask: Tensor
    """bool, as long as this rank's scores."""
    threshold: float
    """The lowest selected score (−0.0 counts as 0.0), NaN if nothing is selected."""
    num_candidates: int
    num_selected: int


@overload
def count_selected(rho: Rho, num: int) -> int: ...
@overload
def count_selected(rho: Rho, num: Tensor) -> Tensor: ...
def count_selected(rho: Rho, num: int | Tensor) -> int | Tensor:
    """k = ceil(ρ·num), exactly, from ρ's decimal value: 0.07 of 100 is 7, where floating point gives 8.

    num: an int, or an int64 tensor of any shape with values up to 10^12; the result is like it. Raises
    ValueError for a ρ that `parse_rho` refuses.
    """
    share = parse_rho(rho)
    p, q = share.numerator, share.denominator
    # num·p may pass 2^63. In num = whole·q + rest the rest is below q, and rest·p below 10^18.
    whole, rest = num // q, num % q
    return whole * p + (rest * p + q - 1) // q


def sortable_keys(scores: Tensor) -> Tensor:
    """Map fp32 to int64 in [0, 2^32) in the same order; −0.0 and 0.0 share a key. Shape is kept; no NaN.

    A float is a sign and a magnitude whose bits, read as an integer, are in the order of its value. Integer
    arithmetic only, so that denormals survive where the machine flushes them.
    """
    assert scores.dtype == torch.float32, scores.dtype
    bits = scores.contiguous().view(torch.int32).long()
    magnitude = bits & 0x7FFFFFFF
    return (1 << 31) + torch.where(bits < 0, -magnitude, magnitude)


def score_of_key(key: int) -> float:
    """The inverse of `sortable_keys` for one key."""
    magnitude = key - (1 << 31)
    (value,) = struct.unpack("<f", struct.pack("<I", abs(magnitude)))
    return math.copysign(value, magnitude)


def descending_keys(scores: Tensor) -> Tensor:
    """As `sortable_keys`, the highest score first; −1 for NaN."""
    return torch.where(scores.isnan(), -1, (1 << 32) - 1 - sortable_keys(scores))


def score_of_descending_key(key: int) -> float:
    """The inverse of `descending_keys` for one key that is not −1."""
    return score_of_key((1 << 32) - 1 - key)


def token_id(sample: Tensor, position: Tensor) -> Tensor:
    """One int64 that is unique to a token and orders by sample (below 2^39), then position (below 2^24)."""
    if not position.is_cuda:  # there, asking would wait for the device
        assert bool(((position >= 0) & (position < 1 << POSITION_BITS)).all()), "a position is outside [0, 2^24)"
    return sample << POSITION_BITS | position


def split_token_id(token: int) -> tuple[int, int]:
    """(sample, position) of a `token_id`."""
    return token >> POSITION_BITS, token & ((1 << POSITION_BITS) - 1)


NO_TOKEN = (1 << 63) - 1
"""Above every token id."""


def first_where(mask: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """int64 []: the lowest id of the tokens that `mask` names, `NO_TOKEN` if it names none. All [T]."""
    return torch.where(mask, token_id(sample, position), NO_TOKEN).amin() if len(mask) else mask.new_full((), NO_TOKEN)


def nan_error(token: int) -> ValueError:
    """The error for a score that is NaN, naming the token with this id."""
    sample, position = split_token_id(token)
    return ValueError(
        f"the score of sample {sample} (row number in the input), position {position}, is NaN: "
        "it cannot be ranked; look for a loss, history loss or attention that is not finite in this sample"
    )


def segment_topk(scores: Tensor, candidates: Tensor, segment: Tensor, num_segments: int, k: Tensor) -> Tensor:
    """The k[s] highest scores among the candidates of each segment s; of equal scores the lower index wins.

    scores: fp32 [T], no NaN among candidates, anything elsewhere; candidates: bool [T]; segment: int64 [T],
    used where candidates is true; k: int64 [num_segments], a k above the number of candidates takes them all.
    Returns bool [T].
    """
    slot = torch.where(candidates, segment, num_segments)
    descending = (1 << 32) - 1 - sortable_keys(scores)
    order = torch.sort(slot << 32 | descending, stable=True).indices
    count = histogram(slot, num_segments + 1)
    start = count.cumsum(0) - count
    rank = torch.arange(len(scores), device=scores.device) - start[slot[order]]
    quota = torch.cat([k, k.new_zeros(1)])
    return torch.zeros_like(candidates).scatter_(0, order, rank < quota[slot[order]])


def distributed_topk(
    scores: Tensor,
    token_ids: Tensor,
    group: dist.ProcessGroup | None,
    *,
    k: int | None = None,
    rho: Rho | None = None,
    traffic: Traffic | None = None,
) -> TopK:
    """The k highest scores of all ranks of `group`; of equal ones the lower token id wins. All ranks call it.

    scores: fp32 [n], the candidates of this rank, n may be 0 and differ; token_ids: int64 [n], not negative,
    unique over all ranks; group: None is this process alone. Give either k (above the number of candidates
    takes all), or rho, and k is ceil(ρ·candidates of all ranks). `traffic` is added to. 3 collectives and 40
    KiB, 9 and 112 KiB where ties have to be broken, whatever the number of tokens; one wait for the device
    (two with ties).

    Raises the same ValueError on every rank if a score of any rank is NaN, naming the first such token's
    sample and position; and ValueError for a k or rho that cannot be.
    """
    (result,) = run_rounds([topk_rounds(scores, token_ids, _quota(k, rho))], sum_over(group), traffic)
    return result


def simulate_topk(
    shards: Sequence[tuple[Tensor, Tensor]],
    *,
    k: int | None = None,
    rho: Rho | None = None,
    traffic: Traffic | None = None,
) -> list[TopK]:
    """`distributed_topk` on as many ranks as there are shards (scores, token ids), in this process."""
    quota = _quota(k, rho)
    ranks = [topk_rounds(scores, token_ids, quota) for scores, token_ids in shards]
    return run_rounds(ranks, sum_over(None), traffic)


def sum_over(group: dist.ProcessGroup | None) -> Callable[[Tensor], None]:
    """A function that sums a tensor in place over the ranks of `group`; None is this process alone."""

    def all_reduce(counts: Tensor) -> None:
        if group is not None:
            dist.all_reduce(counts, group=group)

    return all_reduce


def run_rounds(
    ranks: Sequence[Rounds[Result]], all_reduce: Callable[[Tensor], None], traffic: Traffic | None = None
) -> list[Result]:
    """Run the ranks that live in this process in step to their ends; their results in order.

    `all_reduce` sums a tensor in place over the processes.
    """
    received = None
    while True:
        total, results = None, []
        for rank in ranks:
            try:
                counts = rank.send(received)  # type: ignore[arg-type]  # a generator starts by being sent None
            except StopIteration as stop:
                results.append(stop.value)
            else:
                total = counts if total is None else total + counts
        if total is None:
            return results
        assert not results, f"{len(results)} of {len(ranks)} ranks left a collective"
        all_reduce(total)
        if traffic is not None:
            traffic.add(total)
        received = total


def topk_rounds(scores: Tensor, token_ids: Tensor, quota: Callable[[Tensor], Tensor]) -> Rounds[TopK]:
    """One rank of `distributed_topk`. `quota`: number of candidates of all ranks → k, both int64 []."""
    keys = descending_keys(scores)
    found = yield from kth_smallest(keys, quota, SCORE_DIGITS)
    yield from refuse_nan(found.num_excluded, scores, token_ids)
    mask, tied = keys < found.key, keys == found.key
    if found.num_wanted_equal < found.num_equal:
        cut = yield from kth_smallest(
            torch.where(tied, token_ids, -1), lambda total: total.clamp(max=found.num_wanted_equal), ID_DIGITS
        )
        assert cut.num_equal == 1, f"token {split_token_id(cut.key)} is there {cut.num_equal} times"
        tied &= token_ids <= cut.key
    threshold = score_of_descending_key(found.key) if found.num_wanted else math.nan
    return TopK(mask | tied, threshold, found.num_candidates, found.num_wanted)


def refuse_nan(num_nan: int, scores: Tensor, token_ids: Tensor) -> Rounds[None]:
    """Raise `nan_error` of the lowest token id whose score is NaN; `num_nan`: how many over all ranks."""
    if num_nan:
        nan_ids = torch.where(scores.isnan(), token_ids, -1)
        lowest = yield from kth_smallest(nan_ids, lambda total: total.clamp(max=1), ID_DIGITS)
        raise nan_error(lowest.key)


@dataclass(frozen=True)
class KthSmallest:
    """What `kth_smallest` finds; the same on every rank."""

    key: int
    """The k-th smallest key; 0 if k is 0."""
    num_wanted: int
    """k."""
    num_wanted_equal: int
    """How many of the keys equal to `key` are among the k smallest."""
    num_equal: int
    """How many there are."""
    num_candidates: int
    num_excluded: int


def kth_smallest(keys: Tensor, quota: Callable[[Tensor], Tensor], digits: tuple[int, ...]) -> Rounds[KthSmallest]:
    """Radix select, most significant digit first: each round counts the next digit of keys still in question.

    keys: int64 [n] in [0, 2^sum(digits)), or −1: excluded. quota: number of candidates of all ranks → k
    (int64 [] both), from 0 to that number. Nothing is read back from the device before the end.
    """
    return (yield from narrow_down(partial(count_digits, keys), quota, digits, start=keys.new_zeros(())))


def narrow_down(
    count: Callable[[Tensor, int, int], Tensor],
    quota: Callable[[Tensor], Tensor],
    digits: tuple[int, ...],
    *,
    start: Tensor,
) -> Rounds[KthSmallest]:
    """`kth_smallest` of keys that need not lie in one tensor: `count` is `count_digits` of them all.

    start: a 0 where the counts lie.
    """
    prefix = start
    undecided = sum(digits)
    wanted = remaining = num_candidates = num_excluded = num_equal = prefix
    for number, width in enumerate(digits):
        undecided -= width
        sums = yield count(prefix, undecided, width)
        counts = sums[:-1]
        if number == 0:  # all keys but the excluded are in question
            num_excluded, num_candidates = sums[-1], counts.sum()
            wanted = remaining = quota(num_candidates)
        passed = counts.cumsum(0) < remaining
        chosen = passed.sum()
        remaining = remaining - torch.where(passed, counts, 0).sum()
        num_equal = counts.take(chosen)
        prefix = prefix << width | chosen
    results = torch.stack([prefix, wanted, remaining, num_equal, num_candidates, num_excluded])
    return KthSmallest(*results.tolist())


def count_digits(keys: Tensor, prefix: Tensor, undecided: int, width: int) -> Tensor:
    """How often each digit of `width` bits follows `prefix` in the keys, then how many keys do not begin so.

    `undecided` bits of a key follow the digit. Returns int64 [2^width + 1].
    """
    num_bins = 1 << width
    in_question = keys >> (undecided + width) == prefix  # never so for −1
    digit = (keys >> undecided) & (num_bins - 1)
    return histogram(torch.where(in_question, digit, num_bins), num_bins + 1)


def indices_where(mask: Tensor, number: int | None) -> Tensor:
    """int64: the indices of the true entries of `mask` (bool [n]), ascending.

    `number`: how many there are. Where the host does not know (None), it waits for the device to tell.
    """
    if number is None:
        return mask.nonzero().squeeze(1)
    slot = torch.where(mask, mask.cumsum(0) - 1, number)
    found = mask.new_zeros(number + 1, dtype=torch.int64)
    return found.scatter_(0, slot, torch.arange(len(mask), device=mask.device))[:number]


def histogram(slot: Tensor, num_slots: int) -> Tensor:
    """int64 [num_slots]: how often each slot occurs (`bincount` would wait for a CUDA device)."""
    return slot.new_zeros(num_slots).scatter_add_(0, slot, slot.new_ones(1).expand_as(slot))


def _quota(k: int | None, rho: Rho | None) -> Callable[[Tensor], Tensor]:
    """Number of candidates → number to select."""
    if rho is not None and k is None:
        parse_rho(rho)  # before any collective
        return lambda total: count_selected(rho, total)
    if k is None or rho is not None:
        raise ValueError(f"k={k} and rho={rho}: give one of them")
    if k < 0:
        raise ValueError(f"k={k} is negative: use 0 or more")
    return lambda total: total.clamp(max=k)
