"""Selection methods, by name, and the one function that applies them.

A method maps signals to a score per token; the highest are trained on. To add one, write the function and enter it in
`METHODS`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_sstoken.scores.signals import (
    TokenSignals,
    combine,
    normalize_per_sample,
    retrospective_excess_loss,
)
from megatron_sstoken.selection.topk import counts_selected, distributed_topk, segment_topk, token_id


@dataclass(frozen=True)
class Context:
    """What scoring may depend on besides the signals."""

    gamma: float
    seed: int
    draw: int
    """Number of the global batch."""


@dataclass(frozen=True)
class Method:
    """A way to score tokens. `score` is None where every response token is taken."""

    score: Callable[[TokenSignals, torch.Tensor, Context], torch.Tensor] | None
    """(signals, rel_norm fp32 [T], context) → fp32 [T], higher is better."""
    needs_history: bool
    needs_attention: bool


@dataclass(frozen=True)
class Selection:
    """The outcome for T tokens."""

    mask: torch.Tensor
    """bool [T]: trained on."""
    score: torch.Tensor
    """fp32 [T]; NaN outside the response, and everywhere if the method has no score."""
    rel_norm: torch.Tensor
    """fp32 [T]; NaN outside the response, and everywhere without history."""


def uniform_hash(seed: int, draw: int, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Uniform in [0, 1), fp32, a function of (seed, draw, sample, position) alone: equal on every layout and device.

    Counter-based, with the finaliser of splitmix64 (Steele et al., 2014) in wrapping int64 arithmetic.
    """
    start = ((seed & 0xFFFFFFFF) << 31) ^ draw
    state = _mix(_mix(torch.full_like(sample, start)) ^ token_id(sample, position))
    return (_shift_right(state, 40)).to(torch.float32) / 2**24


def _mix(value: torch.Tensor) -> torch.Tensor:
    value = value + (0x9E3779B97F4A7C15 - 2**64)
    value = (value ^ _shift_right(value, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    value = (value ^ _shift_right(value, 27)) * (0x94D049BB133111EB - 2**64)
    return value ^ _shift_right(value, 31)


def _shift_right(value: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: int64 tensors shift arithmetically."""
    return (value >> bits) & (2 ** (64 - bits) - 1)


METHODS: dict[str, Method] = {
    "sstoken": Method(lambda s, rel_norm, c: combine(rel_norm, s.attention, c.gamma), True, True),
    "full": Method(None, False, False),
    "random": Method(lambda s, _, c: uniform_hash(c.seed, c.draw, s.sample, s.position), False, False),
    # ssToken's two halves alone, for ablations
    "rel": Method(lambda s, rel_norm, _: rel_norm, True, False),
    "attention": Method(lambda s, _, __: s.attention, False, True),
    # RHO-1: excess loss over a reference, of the opposite sign and not normalised
    "rho1": Method(lambda s, _, __: -retrospective_excess_loss(s.loss, s.history_loss), True, False),
}


def select_tokens(
    signals: TokenSignals,
    *,
    method: str,
    rho: float,
    scope: str,
    gamma: float,
    rel_floor: float,
    seed: int,
    draw: int,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Score the response tokens and take the ceil(ρ·n) best, exactly.

    `scope` sample: n are the response tokens of one sample, and no rank needs another. Otherwise n are those that all
    ranks of `group` pass in, and every rank of it calls this: one micro-batch each, or all micro-batches of a global
    batch one after another. REL is normalised per sample in every scope. Raises ValueError for a score that is NaN,
    naming sample and position.
    """
    entry = METHODS[method]
    undefined = torch.full_like(signals.loss, torch.nan)
    if entry.score is None:
        return Selection(signals.response.clone(), undefined, undefined)
    rel_norm = undefined
    if entry.needs_history:
        rel = retrospective_excess_loss(signals.loss, signals.history_loss)
        rel_norm = normalize_per_sample(rel, signals.response, signals.segment, signals.num_segments, rel_floor)
    score = entry.score(signals, rel_norm, Context(gamma, seed, draw))
    score = torch.where(signals.response, score, torch.nan)
    if scope == "sample":
        mask = _select_per_sample(signals, score, rho)
    else:
        ids = token_id(signals.sample, signals.position)[signals.response]
        chosen, _ = distributed_topk(score[signals.response], ids, rho, group)
        mask = torch.zeros_like(signals.response).masked_scatter_(signals.response, chosen)
    return Selection(mask, score, rel_norm)


def _select_per_sample(signals: TokenSignals, score: torch.Tensor, rho: float) -> torch.Tensor:
    broken = signals.response & score.isnan()
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise ValueError(
            f"the score of sample {int(signals.sample[first])}, position {int(signals.position[first])} is NaN: "
            f"loss {float(signals.loss[first])}, history loss {float(signals.history_loss[first])}, attention "
            f"{float(signals.attention[first])}"
        )
    num_segments = max(signals.num_segments, 1)
    sizes = torch.bincount(signals.segment[signals.response], minlength=num_segments)
    return segment_topk(score, signals.response, signals.segment, num_segments, counts_selected(rho, sizes))
