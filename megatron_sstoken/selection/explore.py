"""Exploration: some of the selected tokens give way to tokens drawn at random, so that none is left out for ever."""

from dataclasses import replace
from decimal import Decimal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sstoken.selection.methods import Selection, random_scores
from megatron_sstoken.selection.rho import Rho
from megatron_sstoken.selection.signals import TokenSignals
from megatron_sstoken.selection.topk import (
    TopK,
    count_selected,
    distributed_topk,
    histogram,
    indices_where,
    segment_topk,
    token_id,
)

_STREAM = 0x6578706C6F7265  # "explore": the method `random` draws from another one


def explore(
    signals: TokenSignals,
    selection: Selection,
    share: Rho,
    scope: str,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Of k selected tokens keep the ceil((1 − ε)·k) best, and draw as many as give way from all others that compete.

    ε is `share`, a decimal in (0, 1), taken exactly. Tokens that give way may be drawn again; k stays. The draw is uniform, a
    hash of seed, step, sample and position: the same on every layout. What competes, and the ranks that must call, are those of
    `select_tokens` in the same scope; in scope sample nothing is communicated and nothing waits for the device, in others two
    more selections run over the ranks of `group`. Score and threshold stay as they were. Where no score is known, the first
    positions are kept. ε-greedy choice: Sutton and Barto, Reinforcement Learning (2018), section 2.2.
    """
    keep, competing = 1 - Decimal(str(share)), signals.competing().response
    chosen = selection.mask & competing
    ranked = torch.where(selection.score.isnan(), -torch.inf, selection.score)
    draw = random_scores(signals.sample, signals.position, seed ^ _STREAM, step)
    if scope == "sample":
        number = histogram(torch.where(chosen, signals.segment, signals.num_segments), signals.num_segments + 1)[:-1]
        num_kept = count_selected(keep, number)
        kept = _best_per_sample(signals, ranked, chosen, num_kept)
        drawn = _best_per_sample(signals, draw, competing & ~kept, number - num_kept)
    else:
        kept, counts = _best_across(signals, ranked, chosen, group, rho=keep)
        others = competing & ~kept
        drawn, _ = _best_across(signals, draw, others, group, k=counts.num_candidates - counts.num_selected)
    return replace(selection, mask=kept | drawn | (selection.mask & ~competing))


def _best_per_sample(signals: TokenSignals, values: Tensor, candidates: Tensor, k: Tensor) -> Tensor:
    return segment_topk(values, candidates, signals.segment, signals.num_segments, k)


def _best_across(
    signals: TokenSignals,
    values: Tensor,
    candidates: Tensor,
    group: dist.ProcessGroup | None,
    *,
    k: int | None = None,
    rho: Rho | None = None,
) -> tuple[Tensor, TopK]:
    """The highest values among the candidates of all ranks: which of this rank's tokens (bool [T]), and the counts."""
    index = indices_where(candidates, None)
    ids = token_id(signals.sample[index], signals.position[index])
    best = distributed_topk(values[index], ids, group, k=k, rho=rho)
    return torch.zeros_like(candidates).index_copy_(0, index, best.mask), best
