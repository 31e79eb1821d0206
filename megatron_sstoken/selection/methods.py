"""The methods of token selection: what each scores, in one registry, and the selection itself.

To add a method, write its score and enter it in `METHODS`; outside the package, name its import path in the settings.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sstoken.selection.registry import named
from megatron_sstoken.selection.rho import Rho
from megatron_sstoken.selection.signals import (
    PREDICTION_SIGNALS,
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

SCOPES = ("sample", "microbatch", "batch", "dataset")
RULES = ("top", "threshold", "chosen")
"""What becomes of scores: the best share ρ of those that compete, those of a threshold τ and above, or nothing, as it was
chosen before training."""
KNOWN_BEFORE = frozenset({"history_loss", "reference_loss", "external"})
"""Signals that may be known of all data before training."""
OPTIONAL_SIGNALS = KNOWN_BEFORE | {"attention", *PREDICTION_SIGNALS}
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
    """Whether scores lie in [0, 1]: there `rho: auto` looks for a cut, else between the lowest and the highest score."""
    before_training: bool = False
    """Whether scores depend on nothing that training changes (no `loss`, no `rel_norm`), so that the scope `dataset` can rank
    them before it."""
    rule: str = "top"
    """What becomes of the scores unless the settings say it; of `RULES`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))
        if self.rule not in RULES:
            raise ValueError(
                f"a selection method has rule={self.rule}, which is unknown: use one of {', '.join(RULES)}"
            )
        if self.before_training and (late := self.needs - KNOWN_BEFORE):
            raise ValueError(
                f"a selection method needs {', '.join(sorted(late))}, which nobody knows before training: leave out "
                "before_training"
            )
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
    "random": Method(
        lambda x: random_scores(x.signals.sample, x.signals.position, x.seed, x.step),
        bounded=True,
        before_training=True,
    ),
    "rho1": Method(_rho1, needs=frozenset({"history_loss"})),
    "rel": Method(lambda x: x.rel_norm, needs=frozenset({"history_loss"}), bounded=True),
    "attention": Method(lambda x: x["attention"], needs=frozenset({"attention"}), bounded=True),
    # ProFit (arXiv 2601.09195): the probability of the token under the weights of this step.
    "probability": Method(lambda x: torch.exp(-x["loss"]), bounded=True),
    # STM (arXiv 2501.14315): the same under the history weights; a perplexity of at most 2.5 is a score of at least 0.4.
    "history_probability": Method(
        lambda x: torch.exp(-x["history_loss"]),
        needs=frozenset({"history_loss"}),
        bounded=True,
        before_training=True,
    ),
    # Forking tokens (arXiv 2506.01939): the entropy of the prediction.
    "entropy": Method(lambda x: x["entropy"], needs=frozenset({"entropy"})),
    # TokenCleaning with fixed models (arXiv 2502.01968): by how much the reference knows the token better than the base.
    "cleaning": Method(
        lambda x: x["history_loss"] - x["reference_loss"],
        needs=frozenset({"history_loss", "reference_loss"}),
        before_training=True,
    ),
    "external": Method(lambda x: x["external"], needs=frozenset({"external"}), before_training=True, rule="chosen"),
}
"""Name → method. `rel` and `attention` are ssToken at γ = 1 and γ = 0, sparing the work for the other."""


@functools.cache
def find_method(name: str) -> Method:
    """The method of `METHODS`, or the `Method` that a dotted name imports (`my_package.my_module.my_method`).

    Raises ValueError where there is none.
    """
    return named("method", name, METHODS, Method)


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
    its own in scope sample, those of all ranks otherwise; NaN if there is none. τ where that is the rule."""
    num_selected: int | None = None
    """How many are selected, or at most, where the host knows it without asking the device."""
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
    rule: str = "top",
    tau: float | None = None,
) -> Selection:
    """Select the ceil(ρ·n) highest-scoring of the n response tokens that compete, exactly, or what another rule says; and all
    that are exempt.

    method: what `find_method` takes. scope: `sample`, a sample's own tokens compete, ties go to the lower position
    and nothing is communicated; `microbatch`, those of all ranks of `group` compete, ties go to the lower
    sample, then position, and all its ranks must call; `batch`, the same, for signals joined by
    `concatenate_signals`; `dataset` selects before training, and here the rule is `chosen`. REL is normalised per sample in
    every scope. rule: `top`; `threshold`, a token is selected if its score is `tau` (rounded to fp32) or more; or `chosen`,
    where that signal is 1. Neither of these two communicates or waits, whatever the scope. gamma, rel_floor: see
    `selection.signals`. seed, step: random scores depend on them and on a token's sample and position alone.
    group: None is this process alone.

    Raises ValueError for an unknown method or scope, a ρ or γ outside its range, and, in scopes other than sample, for a
    score that is NaN, naming its sample and position, the same on every rank. In scope sample, and with a threshold, nothing
    waits for the device: a NaN counts as the lowest score, and `Selection.first_nan` tells of it.
    """
    for name, value, known in (("scope", scope, SCOPES), ("rule", rule, RULES)):
        if value not in known:
            raise ValueError(f"{name}={value} is unknown: use one of {', '.join(known)}")
    if rule == "chosen":
        return _select_chosen(signals, method, gamma=gamma, rel_floor=rel_floor, seed=seed, step=step)
    everything, signals = signals, signals.competing()
    score, rel_norm = score_tokens(signals, method, gamma=gamma, rel_floor=rel_floor, seed=seed, step=step)
    if not find_method(method).selects:
        threshold = score.new_full((signals.num_segments,), torch.nan)
        number = None if signals.response_counts is None else sum(signals.response_counts)
        return Selection(signals.response.clone(), score, rel_norm, threshold, number).with_exempt(everything)
    if rule == "threshold":
        assert tau is not None, "the rule `threshold` has a τ"
        return _select_above(signals, score, rel_norm, tau).with_exempt(everything)
    assert scope != "dataset", "what is ranked over all data is chosen before training"
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


def _select_chosen(signals: TokenSignals, method: str, **options: Any) -> Selection:
    """What was selected before training; scores where there is what they are made of, to be told alone."""
    score = rel_norm = torch.full_like(signals["loss"], torch.nan, dtype=torch.float32)
    if find_method(method).needs <= signals.values.keys():
        score, rel_norm = score_tokens(signals, method, **options)
    mask = signals.response & (signals["chosen"] == 1)
    return Selection(mask, score, rel_norm, score.new_full((signals.num_segments,), torch.nan), signals.num_chosen)


def _select_above(signals: TokenSignals, score: Tensor, rel_norm: Tensor, tau: float) -> Selection:
    """Every token for itself."""
    bad = signals.response & score.isnan()
    threshold = score.new_full((signals.num_segments,), tau)
    mask = signals.response & (score >= float(np.float32(tau)))
    at_most = None if signals.response_counts is None else sum(signals.response_counts)
    first_nan = first_where(bad, signals.sample, signals.position)
    return Selection(mask, score, rel_norm, threshold, at_most, first_nan)


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
