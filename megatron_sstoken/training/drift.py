"""Drift: tokens that selection drops get worse than they were under the history, so that it never takes them again."""

import math
from dataclasses import asdict, dataclass

from megatron_sstoken.config import SelectionSettings

DECAY = 0.9
"""Of the exponential mean: about the last ten steps count."""


@dataclass
class DriftState:
    """What a resumed run takes up again; plain numbers, for the checkpoint's description."""

    total: float = 0.0
    """Σ (1 − DECAY)·DECAY^age·excess over the steps so far, in nats."""
    weight: float = 0.0
    """The same sum with 1 in place of the excess: what the mean is divided by, so that it has no bias towards 0."""
    steps_above: int = 0
    """Steps in a row after which the mean was above the bound."""
    times: int = 0
    """How often drift has been noticed and acted on."""


class DriftMonitor:
    """Follows mean(loss − history loss) of the dropped tokens, smoothed, and tells when it stays above a bound.

    All ranks observe the same numbers; whether drift is noticed is agreed upon by the caller, since it changes what is
    trained.
    """

    def __init__(self, settings: SelectionSettings, state: dict[str, float] | None = None, *, own_history: bool = True):
        """`state`: as `state_dict` gave it, of the run that goes on. `own_history`: whether history losses are of earlier
        weights of this model; the distance to another one is followed, and says nothing of drift.
        """
        self._settings, self._own_history = settings, own_history
        self._state = DriftState(**(state or {}))  # type: ignore[arg-type]  # counts are whole in JSON, too

    @property
    def value(self) -> float:
        """The smoothed excess in nats, NaN before the first."""
        return self._state.total / self._state.weight if self._state.weight else math.nan

    @property
    def times(self) -> int:
        """How often it was acted on: `SelectionSettings.after_drift` makes settings of it."""
        return self._state.times

    def observe(self, excess: float) -> None:
        """Take up a step's mean of loss − history loss over its dropped tokens, in nats; not finite where there is none."""
        if not math.isfinite(excess):
            return
        state = self._state
        state.total = DECAY * state.total + (1 - DECAY) * excess
        state.weight = DECAY * state.weight + (1 - DECAY)
        state.steps_above = state.steps_above + 1 if self.value > self._settings.drift_bound else 0

    @property
    def is_due(self) -> bool:
        """Whether drift has lasted long enough to be told, and something is left to do about it."""
        lasts = self._state.steps_above >= self._settings.drift_steps
        return lasts and self._own_history and self._settings.can_act(self.times)

    def act(self) -> str:
        """Note that drift was noticed; the message for people. All ranks call it together."""
        before, value = self._settings, self.value
        self._state.times += 1
        self._state.steps_above = 0
        now = before.after_drift(self.times)
        done = {
            "warn": "use a lower optimizer.learning_rate or a higher selection.rho, or let selection.on_drift=raise_rho or "
            "explore see to it (docs/selection.md)",
            "raise_rho": f"selection.rho is {now.rho} from now on",
            "explore": f"{now.explore} of the selected tokens are drawn at random from now on",
        }[before.on_drift]
        return (
            f"selection drifts: the loss of dropped tokens has been above their history loss, by {value:.2f} nats in the mean "
            f"(more than selection.drift_bound={before.drift_bound} for {before.drift_steps} steps), so they are not selected "
            f"again: {done}"
        )

    def state_dict(self) -> dict[str, float]:
        """What `__init__` takes; empty as long as there is nothing to remember."""
        return asdict(self._state) if self._state.weight else {}
