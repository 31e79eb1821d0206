"""Scores and selection straight from the definitions, in float64 with dictionaries and loops.

Written without looking at the package's arithmetic: it is what the package is judged by.
"""

from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal

import torch

from megatron_sstoken.selection.signals import TokenSignals

Key = tuple[int, int]
"""(sample, position)"""


@dataclass(frozen=True)
class Token:
    """One real token."""

    sample: int
    position: int
    response: bool
    loss: float
    history_loss: float
    attention: float

    @property
    def key(self) -> Key:
        return self.sample, self.position


def rel_norms(tokens: list[Token], rel_floor: float) -> dict[Key, float]:
    """(rel − min) / (max − min + 1e-8) over each sample's response; 0 where max − min < rel_floor."""
    by_sample: dict[int, dict[Key, float]] = {}
    for token in tokens:
        if token.response:
            by_sample.setdefault(token.sample, {})[token.key] = token.history_loss - token.loss
    result = {}
    for rels in by_sample.values():
        low, high = min(rels.values()), max(rels.values())
        for key, rel in rels.items():
            result[key] = 0.0 if high - low < rel_floor else (rel - low) / (high - low + 1e-8)
    return result


def scores(tokens: list[Token], gamma: float, rel_floor: float) -> dict[Key, float]:
    """γ·rel_norm + (1 − γ)·attention."""
    rel_norm = rel_norms(tokens, rel_floor)
    return {t.key: gamma * rel_norm[t.key] + (1 - gamma) * t.attention for t in tokens if t.response}


def best(score: dict[Key, float], rho: str) -> set[Key]:
    """The ceil(ρ·n) highest of all; ties: lower sample, then lower position."""
    count = int((Decimal(rho) * len(score)).to_integral_value(ROUND_CEILING))
    return set(sorted(score, key=lambda key: (-score[key], key))[:count])


def best_per_sample(score: dict[Key, float], rho: str) -> set[Key]:
    """`best`, each sample for itself."""
    chosen: set[Key] = set()
    for sample in {key[0] for key in score}:
        chosen |= best({key: value for key, value in score.items() if key[0] == sample}, rho)
    return chosen


def signals_of(tokens: list[Token], garbage: float = float("nan"), num_padding: int = 2) -> TokenSignals:
    """Tokens in the order of their samples, as the package takes them; `garbage` where undefined."""
    samples = list(dict.fromkeys(token.sample for token in tokens))

    def column(name: str) -> torch.Tensor:
        values = [getattr(token, name) if token.response else garbage for token in tokens]
        return torch.tensor(values + [garbage] * num_padding, dtype=torch.float32)

    def integers(values: list[int], padding: int) -> torch.Tensor:
        return torch.tensor(values + [padding] * num_padding, dtype=torch.int64)

    return TokenSignals(
        segment=integers([samples.index(token.sample) for token in tokens], -1),
        num_segments=len(samples),
        response=integers([token.response for token in tokens], 0).bool(),
        sample=integers([token.sample for token in tokens], -1),
        position=integers([token.position for token in tokens], 0),
        values={name: column(name) for name in ("loss", "history_loss", "attention")},
    )


def by_key(tokens: list[Token], values: torch.Tensor) -> dict[Key, float]:
    """The values of the response tokens, by token."""
    return {t.key: value for t, value in zip(tokens, values.tolist(), strict=False) if t.response}


def keys_of(tokens: list[Token], mask: torch.Tensor) -> set[Key]:
    """The tokens where the mask is true; the mask must be false on padding."""
    assert not mask[len(tokens) :].any()
    return {token.key for token, chosen in zip(tokens, mask.tolist(), strict=False) if chosen}
