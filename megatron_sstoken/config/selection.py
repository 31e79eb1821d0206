"""Settings of which tokens are trained on, and of the history that they are compared with."""

from dataclasses import dataclass
from typing import Literal

from megatron_sstoken.config.rules import Rules
from megatron_sstoken.selection.rho import parse_rho


@dataclass
class SelectionSettings:
    """Selection of the response tokens to train on."""

    method: str = "sstoken"
    """sstoken, full (every response token), random, another name of `selection/methods.py`, or the import path of a method of
    your own, as `my_package.my_module.my_method`."""

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
    """Layer whose attention is scored, from 0; negative numbers count from the last. The mean over the layers of a list."""

    scope: Literal["sample", "microbatch", "batch"] = "sample"
    """Which tokens compete: those of one sample (the paper), of one micro-step over all ranks, or of the global batch.

    batch is exact over the whole global batch, and costs one more forward pass: every score is needed before the first
    gradient.
    """

    loss_average: Literal["token", "sample", "microbatch"] = "token"
    """The loss of a global batch: over its selected tokens, each alike; a mean per sample, then over samples (paper,
    Eq. 11); or a mean per micro-batch of one data-parallel rank, then over those (official code)."""

    rel_floor: float = 1e-3
    """If the excess losses of a sample spread less than this (nat), they count as equal. 0 is what the official code does."""

    warmup_samples: int = 0
    """gamma is 0 for the first N samples: at the start the history model and the model are the same."""

    def problems(self) -> list[str]:
        """Rules that need this section alone."""
        rules = Rules("selection", self)
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
        return rules.broken

    @property
    def layers(self) -> list[int]:
        """`layer` as a list."""
        return self.layer if isinstance(self.layer, list) else [self.layer]


@dataclass
class WeightSettings:
    """How much each selected token counts in the loss."""

    method: Literal["none", "external"] | None = None
    """none: all alike. external: by the weights that the prepared data holds, of messages, spans or parts of an answer.

    Default: external where `data.train` holds weights.
    """

    divisor: Literal["selected", "response", "weight"] = "selected"
    """What the sum of weighted losses is divided by: the number of selected tokens, of all response tokens, or the sum of
    the selected tokens' weights; in the global batch, or within what `selection.loss_average` takes the mean of."""


@dataclass
class HistorySettings:
    """History losses and where they come from."""

    source: str = "frozen"
    """frozen: fixed weights score the data once, before training, into a store beside the data.

    adapters_off: the model that is trained scores each batch with its adapters switched off, one forward pass a step; no
    store, no second model. Needs lora.rank > 0.

    snapshot: a copy of the weights that are trained, renewed every `every` steps. ema: their exponential moving average
    (`decay`). Both begin at the starting weights, score each batch in one forward pass a step, and keep 4 bytes a trained
    parameter, dealt out as the optimizer's state.
    """

    every: int = 100
    """With snapshot: steps from one copy to the next."""

    decay: float = 0.999
    """With ema: share of the average that stays in each step; 1 − decay is that of the new weights."""

    hf_path: str | None = None
    """Hugging Face folder of the history model; default: the starting weights."""

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
