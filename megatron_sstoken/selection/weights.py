"""How much each selected token counts in the loss: soft weights, in one registry. Pure functions on tensors.

To add a weight, enter it in `WEIGHTS`; outside the package, name its import path in the settings.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sstoken.selection.registry import named
from megatron_sstoken.selection.signals import PREDICTION_SIGNALS

Weigh = Callable[[Mapping[str, Tensor]], Tensor]
"""Signal → fp32 [T], as in `TokenReport.values`, to weights fp32 [T]."""


@dataclass(frozen=True)
class TokenWeight:
    """One way to weigh tokens. All that has to be computed, checked and told follows from this."""

    weigh: Callable[[Mapping[str, Tensor], float], Tensor] | None
    """(signals fp32 [T] by name, alpha) → fp32 [T], 0 or more, anything for tokens without a loss; None: all alike. `loss`
    is always there: p, the probability of the token under the weights of this step, is exp(−loss)."""
    needs: frozenset[str] = frozenset()
    """Signals that must be computed beside `loss`, of `PREDICTION_SIGNALS`."""
    alpha: float | None = None
    """Where `weights.alpha` is not set; None: there is no such exponent, and NaN is handed in."""
    data: Literal["ignored", "multiplied", "required"] = "multiplied"
    """What becomes of the weights that prepared data holds: both are multiplied, unless they are ignored."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(self.needs))
        if unknown := self.needs - set(PREDICTION_SIGNALS):
            raise ValueError(
                f"a weight of tokens needs {', '.join(sorted(unknown))}, which is not told where weights are made: use "
                f"{', '.join(PREDICTION_SIGNALS)}"
            )

    def exponent(self, alpha: float | None) -> float | None:
        """What `weights.alpha` comes to."""
        return self.alpha if alpha is None else alpha

    def at(self, alpha: float | None) -> Weigh | None:
        """The weights for `weights.alpha`; None: all alike."""
        exponent, weigh = self.exponent(alpha), self.weigh
        if weigh is None:
            return None
        return lambda values: weigh(values, math.nan if exponent is None else exponent)


def _power(values: Mapping[str, Tensor], alpha: float) -> Tensor:
    """p^α. α = 1: DFT (arXiv 2508.05629); other exponents: Beyond log-likelihood (arXiv 2510.00526)."""
    return torch.exp(-alpha * values["loss"])


def _deft(values: Mapping[str, Tensor], _alpha: float) -> Tensor:
    """p^(Σ_v p_v²): the surer the prediction, the nearer to DFT. DEFT (arXiv 2602.11424)."""
    return torch.exp(-values["sum_p2"] * values["loss"])


def _entropy(values: Mapping[str, Tensor], alpha: float) -> Tensor:
    """(H_20 / 3)^α: 3 nats are about ln 20, the largest there is. EAFT (arXiv 2601.02151)."""
    return (values["entropy_top20"] / 3).pow(alpha)


WEIGHTS: dict[str, TokenWeight] = {
    "none": TokenWeight(None, data="ignored"),
    "power": TokenWeight(_power, alpha=1.0),
    "deft": TokenWeight(_deft, needs=frozenset({"sum_p2"})),
    "entropy": TokenWeight(_entropy, needs=frozenset({"entropy_top20"}), alpha=1.0),
    "external": TokenWeight(None, data="required"),
}
"""Name → weight."""


@functools.cache
def find_weight(name: str) -> TokenWeight:
    """The weight of `WEIGHTS`, or the `TokenWeight` that a dotted name imports. Raises ValueError where there is none."""
    return named("method", name, WEIGHTS, TokenWeight)
