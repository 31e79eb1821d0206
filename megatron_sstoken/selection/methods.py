"""The methods of token selection: what each scores, in one registry, and the selection itself.

To add a method, write its score and enter it in `METHODS`; outside the package, name its import path in the settings.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sstoken.selection.rho import Rho
from megatron_sstoken.selection.signals import (
    TokenSignals,
    combine,
    normalize_per_sample,
    retrospective_excess_loss,
)
from megatron_sstoken.selection.topk import (
    NO_TOKEN,
    count_selected,
    distributed_topk,
    first_where,
    histogram,
    indices_where,
    nan_error,
    segment_topk,
    token_id,
)

SCOPES = ("sample", "microbatch", "batch")
OPTIONAL_SIGNALS = frozenset({"history_loss", "attention", "entropy", "top1"})
"""Signals that cost something and are computed where a method needs them."""


@dataclass(frozen=True)
class Scorable:
    """What a method may score by; `x["loss"]` is a signal."""

    signals: TokenSignals
    rel_norm: Tensor
    """fp32 [T]: normalised REL; NaN if the method does not need `history_loss`."""
    gamma: float
    seed: int
    step: int

    def __getitem__(self, name: str) -> Tensor:
        return self.signals[name].float()


@dataclass(frozen=True)
class Method:
    """One way to score tokens: higher is kept. All that has to be computed, checked and told follows from this."""

    score: Callable[[Scorable], Tensor] | None
    """→ fp32 [T], anything outside the response; None keeps every response token."""
    needs: frozenset[str] = frozenset()
    """Signals that must be computed beside `loss`; the names are those of `TokenSignals.values`."""
    bounded: bool = False
    """Whether scores lie in [0, 1], so that `rho: auto` can look for a cut among them."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))
        if unknown := self.needs - OPTIONAL_SIGNALS:
            raise ValueError(
                f"a selection method needs {', '.join(sorted(unknown))}, which nobody computes: use "
                f"{', '.join(sorted(OPTIONAL_SIGNALS))}"
            )

    @property
    def selects(self) -> bool:
        """Whether anything is left out."""
        return self.score is not None


def _rho1(x: Scorable) -> Tensor:
    """RHO-1 (arXiv 2404.07965): loss − reference loss, not normalised; the sign is opposite to REL's."""
    return -retrospective_excess_loss(x["loss"], x["history_loss"])


METHODS: dict[str, Method] = {
    "sstoken": Method(
        lambda x: combine(x.rel_norm, x["attention"], x.gamma),
        needs=frozenset({"history_loss", "attention"}),
        bounded=True,
    ),
    "full": Method(None),
    "random": Method(lambda x: random_scores(x.signals.sample, x.signals.position, x.seed, x.step)),
    "rho1": Method(_rho1, needs=frozenset({"history_loss"})),
    "rel": Method(lambda x: x.rel_norm, needs=frozenset({"history_loss"}), bounded=True),
    "attention": Method(lambda x: x["attention"], needs=frozenset({"attention"}), bounded=True),
}
"""Name → method. `rel` and `attention` are ssToken at γ = 1 and γ = 0, sparing the work for the other."""


@functools.cache
def find_method(name: str) -> Method:
    """The method of `METHODS`, or the `Method` that a dotted name imports (`my_package.my_module.my_method`).

    Raises ValueError where there is none.
    """
    if name in METHODS:
        return METHODS[name]
    module, _, attribute = name.rpartition(".")
    if not module:
        raise ValueError(
            f"method={name} is unknown: use one of {', '.join(METHODS)}, or the import path of a Method of your own"
        )
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ImportError as error:
        raise ValueError(f"method={name} cannot be imported ({error}): put its package on PYTHONPATH") from error
    except Exception as error:  # whatever a user's module raises when it runs
        raise ValueError(f"method={name} cannot be imported: mend {module}: {error!r}") from error
    if found is None:
        raise ValueError(f"method={name} does not exist: name a Method that {module} defines, after a dot")
    if not isinstance(found, Method):
        raise ValueError(
            f"method={name} is a {type(found).__name__}: name a Method, as made by "
            "megatron_sstoken.selection.methods.Method(score, needs=…)"
        )
    return found


@dataclass(frozen=True)
class Selection:
    """Which tokens of a micro-batch are trained on, and why."""

    mask: Tensor
    """bool [T]: selected; false outside the response."""
    score: Tensor
    """fp32 [T]; NaN outside the response, and throughout if the method has no score."""
    rel_norm: Tensor
    """fp32 [T]: normalised REL; NaN outside the response, and throughout if the method needs no history."""
    threshold: Tensor
    """fp32 [num_segments]: the lowest selected score among the tokens that a sample's tokens competed with:
    its own in scope sample, those of all ranks otherwise; NaN if there is none."""
    num_selected: int | None = None
    """How many are selected, where the host knows it without asking the device."""
    first_nan: Tensor | None = None
    """int64 []: the lowest token id with a score that is NaN, `NO_TOKEN` if there is none; None where that was refused."""

    def require_numbers(self) -> None:
        """Raise `nan_error` where a score is NaN and nobody has looked yet; waits for the device."""
        if self.first_nan is not None and (token := int(self.first_nan)) != NO_TOKEN:
            raise nan_error(token)

    def with_exempt(self, signals: TokenSignals) -> "Selection":
        """The same with the exempt tokens of `signals` selected, too; they have no score."""
        if signals.exempt is None:
            return self
        number = None
        if self.num_selected is not None and signals.exempt_counts is not None:
            number = self.num_selected + sum(signals.exempt_counts)
        return replace(self, mask=self.mask | (signals.exempt & signals.response), num_selected=number)


def select_tokens(
    signals: TokenSignals,
    method: str,
    rho: Rho,
    scope: str,
    gamma: float,
    rel_floor: float,
    seed: int,
    step: int,
    group: dist.ProcessGroup | None,
) -> Selection:
    """Select the ceil(ρ·n) highest-scoring of the n response tokens that compete, exactly, and all that are exempt.

    method: what `find_method` takes. scope: `sample`, a sample's own tokens compete, ties go to the lower position
    and nothing is communicated; `microbatch`, those of all ranks of `group` compete, ties go to the lower
    sample, then position, and all its ranks must call; `batch`, the same, for signals joined by
    `concatenate_signals`. REL is normalised per sample in every scope. gamma, rel_floor: see
    `selection.signals`. seed, step: random scores depend on them and on a token's sample and position alone.
    group: None is this process alone.

    Raises ValueError for an unknown method or scope, a ρ or γ outside its range, and, in scopes other than sample, for a
    score that is NaN, naming its sample and position, the same on every rank. In scope sample nothing waits for the device:
    a NaN counts as the lowest score, and `Selection.first_nan` tells of it.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope} is unknown: use one of {', '.join(SCOPES)}")
    everything, signals = signals, signals.competing()
    score, rel_norm = score_tokens(signals, method, gamma=gamma, rel_floor=rel_floor, seed=seed, step=step)
    if not find_method(method).selects:
        threshold = score.new_full((signals.num_segments,), torch.nan)
        number = None if signals.response_counts is None else sum(signals.response_counts)
        return Selection(signals.response.clone(), score, rel_norm, threshold, number).with_exempt(everything)
    if scope == "sample":
        return _select_per_sample(signals, score, rel_norm, rho).with_exempt(everything)
    mask, threshold = _select_across(signals, score, rho, group)
    return Selection(mask, score, rel_norm, threshold).with_exempt(everything)


def score_tokens(
    signals: TokenSignals, method: str, *, gamma: float, rel_floor: float, seed: int, step: int
) -> tuple[Tensor, Tensor]:
    """(score, rel_norm) as in `Selection`. `signals` must have what the method needs.

    Raises ValueError for an unknown method or a γ not in [0, 1].
    """
    chosen = find_method(method)
    assert chosen.needs <= signals.values.keys(), (method, chosen.needs, set(signals.values))
    undefined = torch.full_like(signals["loss"], torch.nan, dtype=torch.float32)
    rel_norm = undefined
    if "history_loss" in chosen.needs:
        rel = retrospective_excess_loss(signals["loss"], signals["history_loss"])
        rel_norm = normalize_per_sample(rel, signals.response, signals.segment, signals.num_segments, rel_floor)
    if chosen.score is None:
        return undefined, rel_norm
    score = chosen.score(Scorable(signals, rel_norm, gamma, seed, step))
    return torch.where(signals.response, score, torch.nan), rel_norm


def _select_per_sample(signals: TokenSignals, score: Tensor, rel_norm: Tensor, rho: Rho) -> Selection:
    """Every sample for itself."""
    response, num_segments = signals.response, signals.num_segments
    bad = response & score.isnan()
    ranked = torch.where(bad, -torch.inf, score)
    slot = torch.where(response, signals.segment, num_segments)
    num_selected = count_selected(rho, histogram(slot, num_segments + 1)[:-1])
    mask = segment_topk(ranked, response, signals.segment, num_segments, num_selected)
    lowest = score.new_full((num_segments + 1,), torch.inf)
    lowest.scatter_reduce_(0, torch.where(mask, slot, num_segments), torch.where(mask, ranked, torch.inf), "amin")
    threshold = torch.where(num_selected > 0, lowest[:-1], torch.nan)
    known = signals.response_counts
    number = None if known is None else sum(count_selected(rho, count) for count in known)
    return Selection(mask, score, rel_norm, threshold, number, first_where(bad, signals.sample, signals.position))


def _select_across(
    signals: TokenSignals, score: Tensor, rho: Rho, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(mask, threshold) with the tokens of all ranks together."""
    known = signals.response_counts
    competing = indices_where(signals.response, None if known is None else sum(known))
    ids = token_id(signals.sample[competing], signals.position[competing])
    best = distributed_topk(score[competing], ids, group, rho=rho)
    mask = torch.zeros_like(signals.response).index_copy_(0, competing, best.mask)
    return mask, score.new_full((signals.num_segments,), best.threshold)


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


def random_scores(sample: Tensor, position: Tensor, seed: int, step: int) -> Tensor:
    """Uniform in [0, 1): a hash of (seed, step, sample, position), equal in any layout, order and device.

    sample, position: int64 [T]. Returns fp32 [T], multiples of 2^-24.
    """
    state = torch.zeros((), dtype=torch.int64)
    for part in (seed, step, sample, position):
        state = _splitmix64(state ^ part)
    return _shift_right(state, 40).float() * 2.0**-24


def _splitmix64(state: Tensor) -> Tensor:
    """One output of SplitMix64 (Steele et al., OOPSLA 2014) from a 64-bit state; int64 arithmetic wraps."""
    z = state + _GOLDEN
    z = (z ^ _shift_right(z, 30)) * _MIX[0]
    z = (z ^ _shift_right(z, 27)) * _MIX[1]
    return z ^ _shift_right(z, 31)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift as if unsigned: int64 `>>` repeats the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
