"""Settings of which tokens are trained on, and of the history that they are compared with."""

import math
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

from megatron_sstoken.config.rules import Rules
from megatron_sstoken.selection.rho import parse_rho

_RHO_STEP = Decimal("0.1")
"""By which `on_drift: raise_rho` raises rho."""
_EXPLORE = 0.1
"""What `on_drift: explore` takes where no share is given."""


@dataclass
class SelectionSettings:
    """Selection of the response tokens to train on."""

    method: str = "sstoken"
    """sstoken, full (every response token), random, rel, attention, rho1, probability, history_probability, entropy, cleaning,
    external (docs/selection.md, Methods), or the import path of a method of your own, as `my_package.my_module.my_method`."""

    rho: float | Literal["auto"] = 0.6
    """Share of the response tokens to train on, in (0, 1]; of n tokens the ceil(rho·n) best are taken, exactly.

    auto: chosen for every global batch at the cut that separates its low from its high scores best (Otsu), between
    `rho_min` and `rho_max`; costs a forward pass, as `scope: batch` does.
    """

    rho_min: float = 0.3
    """Smallest share that `rho: auto` may choose."""

    rho_max: float = 0.9
    """Largest share that `rho: auto` may choose."""

    gamma: float = 0.5
    """Weight of the retrospective excess loss in the score; 1 − gamma is the weight of the attention."""

    layer: int | list[int] = -1
    """Layer whose attention is scored, from 0; negative numbers count from the last. The mean over the layers of a list. In
    models with gated delta nets, of layers that have attention."""

    rule: Literal["top", "threshold"] | None = None
    """top: the best share `rho` of the tokens that compete. threshold: every token whose score is `threshold` or more,
    whatever the others'; `rho` and `scope` are not used.

    Default: top; with method external: the tokens that `external` marks as `selected`.
    """

    threshold: float | None = None
    """Lowest score that `rule: threshold` keeps."""

    external: str | None = None
    """Parquet file with a score of each token, the tokens to select, or their weights (a folder of such files, or a pattern):
    columns sample, position, and score, selected or weight, as token records have them. For method external and
    `weights.method: external`."""

    scope: Literal["sample", "microbatch", "batch", "dataset"] = "sample"
    """Which tokens compete: those of one sample (the paper), of one micro-step over all ranks, of the global batch, or of all
    data.

    batch is exact over the whole global batch, and costs one more forward pass: every score is needed before the first
    gradient. dataset is decided once, before training, for methods whose scores are known then.
    """

    loss_average: Literal["token", "sample", "microbatch"] = "token"
    """The loss of a global batch: over its selected tokens, each alike; a mean per sample, then over samples (paper,
    Eq. 11); or a mean per micro-batch of one data-parallel rank, then over those (official code)."""

    rel_floor: float = 1e-3
    """If the excess losses of a sample spread less than this (nat), they count as equal. 0 is what the official code does."""

    warmup_samples: int = 0
    """gamma is 0 for the first N samples: at the start the history model and the model are the same."""

    explore: float = 0.0
    """Share of the selected tokens that is drawn at random from the others, in [0, 1): of k selected tokens the
    ceil((1 − explore)·k) best stay. With `on_drift: explore` from when drift is noticed; there 0 means 0.1."""

    on_drift: Literal["warn", "raise_rho", "explore"] = "warn"
    """What to do once dropped tokens have become worse than under the history: tell it; raise rho by 0.1, again as long as it
    lasts, up to 1; or begin to explore. Nothing is noticed by methods without history losses, and where `history.hf_path` names
    another model."""

    drift_bound: float = 0.2
    """Drift is noticed where dropped tokens' loss − history loss (nats, exponential mean of about 10 steps) is above it."""

    drift_steps: int = 20
    """For how many steps in a row."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("selection", self)
        by_score = self.rule == "threshold"
        rules.require(
            by_score == (self.threshold is not None),
            "selection.rule=threshold needs selection.threshold: set the lowest score to keep"
            if by_score
            else f"selection.threshold={self.threshold} needs selection.rule=threshold: set it, or leave the threshold out",
        )
        rules.require(
            self.threshold is None or not math.isnan(self.threshold),
            "selection.threshold=nan is no number: use a score",
        )
        rules.require(
            not by_score or self.rho == SelectionSettings.rho,
            f"selection.rho={self.rho} is not used by selection.rule=threshold: leave it out, or use rule=top",
        )
        for name in ("rho", "rho_min", "rho_max"):
            value = getattr(self, name)
            try:
                if value != "auto":
                    parse_rho(value)
            except ValueError as error:
                rules.require(False, f"selection.{str(error).replace('rho', name, 1)}")
        rules.require(
            self.rho_min <= self.rho_max,
            f"selection.rho_min={self.rho_min} is above selection.rho_max={self.rho_max}: use a smaller rho_min",
        )
        rules.require(len(self.layers) > 0, "selection.layer=[] names no layer: use -1 for the last")
        rules.in_range("gamma", 0, 1)
        rules.at_least("rel_floor", 0)
        rules.at_least("warmup_samples", 0)
        rules.require(
            0 <= self.explore < 1,
            f"selection.explore={self.explore} is outside [0, 1): use the share to draw at random, as 0.1",
        )
        rules.require(
            10**9 * Decimal(str(self.explore)) % 1 == 0,
            f"selection.explore={self.explore} has more than 9 decimals: round it to 9 or fewer",
        )
        rules.require(
            self.on_drift != "raise_rho" or self.rho != "auto",
            "selection.on_drift=raise_rho needs a number for selection.rho, which is auto: use one, or on_drift=explore",
        )
        rules.at_least("drift_bound", 0)
        rules.at_least("drift_steps", 1)
        return rules.broken

    @property
    def rule_or_default(self) -> str:
        """What is to become of scores, of `selection.methods.RULES`. Raises ValueError for an unknown method."""
        # With torch, which reading settings does not wait for.
        from megatron_sstoken.selection.methods import find_method

        return self.rule or find_method(self.method).rule

    @property
    def rule_in_force(self) -> str:
        """What becomes of scores in a step: what is ranked over all data was chosen before. Raises as `rule_or_default`."""
        from megatron_sstoken.selection.methods import find_method

        rule = self.rule_or_default
        return "chosen" if rule == "top" and self.scope == "dataset" and find_method(self.method).selects else rule

    @property
    def largest_rho(self) -> float:
        """The largest share that a batch may be trained on."""
        if self.rho == "auto":
            return self.rho_max
        return 1.0 if self.on_drift == "raise_rho" else self.rho

    def after_drift(self, times: int) -> "SelectionSettings":
        """What is in force after drift has been noticed `times` times."""
        if self.on_drift == "explore":
            return replace(self, explore=(self.explore or _EXPLORE) if times else 0.0)
        if self.on_drift == "raise_rho" and self.rho != "auto":
            return replace(self, rho=float(min(Decimal(str(self.rho)) + times * _RHO_STEP, Decimal(1))))
        return self

    def can_act(self, times: int) -> bool:
        """Whether there is something to do about drift that has been noticed `times` times before."""
        return times == 0 or self.after_drift(times) != self.after_drift(times + 1)

    @property
    def layers(self) -> list[int]:
        """`layer` as a list."""
        return self.layer if isinstance(self.layer, list) else [self.layer]


@dataclass
class WeightSettings:
    """How much each selected token counts in the loss."""

    method: str | None = None
    """none: all alike. power: p^alpha, p the probability that the model gives the token (alpha 1: DFT). deft: p^(Σ p²), the
    sum over the vocabulary. entropy: (H/3)^alpha, H the entropy in nats of the 20 likeliest words (EAFT). external: by the
    weights that the prepared data holds, of messages, spans or parts of an answer; or, if `selection.external` has a column
    weight, by that one (tokens that it does not name count 1). Or the import path of a weight of your own, as
    `my_package.my_module.my_weight`. Where the data holds weights, all but `none` are multiplied onto them.

    Default: external where `data.train` holds weights.
    """

    alpha: float | None = None
    """Exponent of `power` and `entropy`. Default: 1."""

    divisor: Literal["selected", "response", "weight"] = "selected"
    """What the sum of weighted losses is divided by: the number of selected tokens, of all response tokens, or the sum of
    the selected tokens' weights; in the global batch, or within what `selection.loss_average` takes the mean of."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("weights", self)
        rules.require(
            self.alpha is None or 0 <= self.alpha < math.inf,
            f"weights.alpha={self.alpha} is no exponent of a weight: use a number of 0 or more",
        )
        return rules.broken


@dataclass
class HistorySettings:
    """History losses and where they come from."""

    source: str = "frozen"
    """frozen: fixed weights score what the run visits once, before training, into a store beside the data, which later runs
    use and add to.

    adapters_off: the model that is trained scores each batch with its adapters switched off, one forward pass a step; no
    store, no second model. Needs lora.rank > 0.

    previous_visit: the loss that a token had when its sample was last trained on, one epoch ago; no pass at all, and
    `first_visit` for the first epoch. Needs checkpoint.directory.

    snapshot: a copy of the weights that are trained, renewed every `every` steps. ema: their exponential moving average
    (`decay`). Both begin at the starting weights, score each batch in one forward pass a step, and keep 4 bytes a trained
    parameter, dealt out as the optimizer's state.
    """

    first_visit: Literal["frozen", "full"] = "frozen"
    """What previous_visit does with samples that it has not seen yet. frozen: history of frozen weights, scored once; full: it
    trains on all of their response tokens."""

    every: int = 100
    """With snapshot: steps from one copy to the next."""

    decay: float = 0.999
    """With ema: share of the average that stays in each step; 1 − decay is that of the new weights."""

    hf_path: str | None = None
    """Hugging Face folder of the history model; default: the starting weights."""

    reference_hf_path: str | None = None
    """Hugging Face folder of the reference model, for methods that compare two models (`cleaning`). It scores the data once,
    before training, into a store beside the data."""

    store: str | None = None
    """Folder of the history losses; default: a folder under `data.train`/history named by the fingerprint."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("history", self)
        rules.at_least("every", 2)
        rules.require(
            0 < self.decay < 1,
            f"history.decay={self.decay} is outside (0, 1): use 0.99 to 0.9999, or history.source=frozen for weights that stay",
        )
        return rules.broken
