"""The best tokens of all data, decided once before training: exact, in one process and in bounded memory."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sstoken.selection.rho import Rho, parse_rho
from megatron_sstoken.selection.topk import (
    ID_DIGITS,
    NO_TOKEN,
    SCORE_DIGITS,
    Rounds,
    count_digits,
    count_selected,
    descending_keys,
    narrow_down,
    run_rounds,
    score_of_descending_key,
    split_token_id,
    sum_over,
)

Chunks = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Called once for each time that all data is read: chunks of scores (fp32 [n]) and unique token ids (int64 [n])."""


@dataclass(frozen=True)
class Cut:
    """What divides the selected tokens of a data set from the others."""

    key: int
    """`descending_keys` of the lowest selected score."""
    last_id: int
    """Of the tokens with that score those up to this id are selected."""
    num_candidates: int
    num_selected: int

    @property
    def threshold(self) -> float:
        """The lowest selected score, NaN if nothing is selected."""
        return score_of_descending_key(self.key) if self.num_selected else math.nan

    def selects(self, scores: Tensor, token_ids: Tensor) -> Tensor:
        """bool [n]: which tokens of a chunk are selected."""
        keys = descending_keys(scores)
        return (keys < self.key) | ((keys == self.key) & (token_ids <= self.last_id))


class NanScore(ValueError):
    """A score that cannot be ranked."""

    def __init__(self, token: int):
        self.sample, self.position = split_token_id(token)
        super().__init__(f"the score of sample {self.sample}, position {self.position}, is NaN")


def find_cut(chunks: Chunks, rho: Rho) -> Cut:
    """The cut that selects the ceil(ρ·n) highest of all n scores; of equal ones the lower token ids.

    It is `torch.topk` of all scores, found by reading them 3 times, 9 times where ties straddle the cut (radix select). Raises
    NanScore for the lowest token id whose score is NaN, and ValueError for a ρ that `parse_rho` refuses.
    """
    parse_rho(rho)
    (cut,) = run_rounds([_rounds(chunks, rho)], sum_over(None))
    return cut


def _rounds(chunks: Chunks, rho: Rho) -> Rounds[Cut]:
    start = torch.zeros((), dtype=torch.int64)

    def count_by(keys_of: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, int, int], Tensor]:
        def count(prefix: Tensor, undecided: int, width: int) -> Tensor:
            total = torch.zeros((1 << width) + 1, dtype=torch.int64)
            for scores, ids in chunks():
                total += count_digits(keys_of(scores, ids), prefix, undecided, width)
            return total

        return count

    by_score = count_by(lambda scores, ids: descending_keys(scores))
    found = yield from narrow_down(by_score, lambda total: count_selected(rho, total), SCORE_DIGITS, start=start)
    if found.num_excluded:
        raise NanScore(min(int(torch.where(s.isnan(), ids, NO_TOKEN).amin()) for s, ids in chunks() if len(ids)))
    last = NO_TOKEN if found.num_wanted else -1
    if found.num_wanted_equal < found.num_equal:
        wanted = found.num_wanted_equal
        by_id = count_by(lambda scores, ids: torch.where(descending_keys(scores) == found.key, ids, -1))
        last = (yield from narrow_down(by_id, lambda total: total.clamp(max=wanted), ID_DIGITS, start=start)).key
    return Cut(found.key, last, found.num_candidates, found.num_wanted)
