"""Sums over token records, in one pass: of samples, of steps, and of kinds of tokens."""

from dataclasses import dataclass, field

import numpy as np

from megatron_sstoken.report.record_files import Columns, response_of, starts_of, without_repeats

BINS = 40
COLUMNS = ("sample", "position", "token", "role", "loss", "history_loss", "score", "selected")
"""What the sums need of the records."""

SAMPLE = np.dtype(
    [
        ("sample", np.int64),
        ("step", np.int64),
        ("num_tokens", np.int64),
        ("first_response", np.int64),  # its place among the tokens
        ("num_response", np.int64),
        ("dropped_share", np.float64),
        ("drift", np.float64),  # mean of loss − history loss over the dropped tokens, in nats
        ("mean_loss", np.float64),  # over the response tokens, in nats
        ("top_score", np.float64),
    ]
)
"""Figures of one sample at one step; NaN where undefined."""


def sample_figures(columns: Columns, starts: np.ndarray, step: int) -> np.ndarray:
    """`SAMPLE` [number of samples] of whole samples, which begin at `starts`; those without a response token are left out."""
    once = without_repeats(columns)
    if once is not columns:
        columns, starts = once, starts_of(once)
    response = response_of(columns)
    dropped = response & ~columns["selected"]
    change = columns["loss"].astype(np.float64) - columns["history_loss"]
    drifting = dropped & ~np.isnan(change)
    score = np.where(response & ~np.isnan(columns["score"]), columns["score"], -np.inf)
    place = np.arange(len(response)) - np.repeat(starts, np.diff([*starts, len(response)]))

    def total(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts)

    found = np.zeros(len(starts), dtype=SAMPLE)
    found["sample"], found["step"] = columns["sample"][starts], step
    found["num_tokens"] = np.diff([*starts, len(response)])
    found["first_response"] = np.minimum.reduceat(np.where(response, place, len(response)), starts)
    found["num_response"] = total(response.astype(np.int64))
    found["top_score"] = np.maximum.reduceat(score, starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        found["dropped_share"] = total(dropped.astype(np.int64)) / found["num_response"]
        found["drift"] = total(np.where(drifting, change, 0.0)) / total(drifting.astype(np.int64))
        found["mean_loss"] = total(np.where(response, columns["loss"], 0.0).astype(np.float64)) / found["num_response"]
    found["top_score"][found["top_score"] == -np.inf] = np.nan
    return found[found["num_response"] > 0]


@dataclass
class StepFigures:
    """Sums over the response tokens of one step; losses in nats."""

    num_selected: int = 0
    num_dropped: int = 0
    loss_selected: float = 0.0
    loss_dropped: float = 0.0
    change_dropped: float = 0.0
    """Sum of loss − history loss over the `num_changed` dropped tokens that have both."""
    num_changed: int = 0
    lowest_selected: float = np.inf
    highest_dropped: float = -np.inf
    selected: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    """Tokens by score, in the bins of the edges that `add` is given."""
    dropped: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, columns: Columns, edges: np.ndarray | None) -> None:
        """Take up tokens; `edges` float64 [BINS + 1] of scores (None: there is no score)."""
        response = response_of(columns)
        for chosen, name in (
            (response & columns["selected"], "selected"),
            (response & ~columns["selected"], "dropped"),
        ):
            loss, score = columns["loss"][chosen].astype(np.float64), columns["score"][chosen]
            setattr(self, f"num_{name}", getattr(self, f"num_{name}") + len(loss))
            setattr(self, f"loss_{name}", getattr(self, f"loss_{name}") + float(loss.sum()))
            score = score[~np.isnan(score)]
            if name == "dropped":
                change = loss - columns["history_loss"][chosen]
                known = change[~np.isnan(change)]
                self.change_dropped += float(known.sum())
                self.num_changed += len(known)
                self.highest_dropped = max(self.highest_dropped, float(score.max(initial=-np.inf)))
            else:
                self.lowest_selected = min(self.lowest_selected, float(score.min(initial=np.inf)))
            if edges is not None and len(score):
                bins = np.clip(np.searchsorted(edges, score, side="right") - 1, 0, BINS - 1)
                setattr(self, name, getattr(self, name) + np.bincount(bins, minlength=BINS))

    @property
    def num_response(self) -> int:
        return self.num_selected + self.num_dropped

    @property
    def dropped_share(self) -> float:
        return self.num_dropped / self.num_response if self.num_response else np.nan

    @property
    def drift(self) -> float:
        """Mean of loss − history loss over the dropped tokens."""
        return self.change_dropped / self.num_changed if self.num_changed else np.nan

    @property
    def threshold(self) -> float:
        """The lowest selected score where no dropped token has a higher one, else NaN: then each sample has its own."""
        single = np.isfinite(self.lowest_selected) and self.highest_dropped <= self.lowest_selected
        return self.lowest_selected if single else np.nan


def edges_of(scores: tuple[float, float] | None) -> np.ndarray | None:
    """float64 [BINS + 1] from the lowest to the highest score."""
    if scores is None:
        return None
    low, high = scores
    return np.linspace(low, high if high > low else low + 1.0, BINS + 1)


class KindFigures:
    """Sums over the response tokens of each kind, that is: of each token id. Takes 56 bytes for every id up to the highest."""

    NAMES = ("count", "selected", "loss", "with_history", "history_loss", "change", "dropped_change")

    def __init__(self) -> None:
        self._sums = np.zeros((len(self.NAMES), 0))

    def add(self, columns: Columns) -> None:
        """Take up tokens."""
        response = response_of(columns)
        tokens = columns["token"][response]
        if not tokens.size:
            return
        selected = columns["selected"][response]
        loss, history = (columns[name][response].astype(np.float64) for name in ("loss", "history_loss"))
        known = ~np.isnan(history)
        change = np.where(known, loss - history, 0.0)
        size = max(self._sums.shape[1], int(tokens.max()) + 1)
        if size > self._sums.shape[1]:
            self._sums = np.pad(self._sums, ((0, 0), (0, size - self._sums.shape[1])))
        added = (None, selected, loss, known, np.where(known, history, 0.0), change, np.where(selected, 0.0, change))
        for sums, weights in zip(self._sums, added, strict=True):
            sums += np.bincount(tokens, weights, minlength=size)

    def __getitem__(self, name: str) -> np.ndarray:
        """float64 [ids]: one of `NAMES`; `loss` and `history_loss` are sums in nats, `change` of loss − history loss."""
        return self._sums[self.NAMES.index(name)]

    def notable(self, number: int) -> np.ndarray:
        """Ids that occur, the most frequent first: `number` of those, and the most dropped and most drifted of the others."""
        count, dropped = self["count"], self["count"] - self["selected"]
        values = ((count, number), (dropped, number // 4), (self["dropped_change"], number // 4))
        chosen = [_highest(one, share) for one, share in values]
        ids = np.unique(np.concatenate(chosen))
        return ids[np.lexsort((ids, -count[ids]))]

    def frequent(self, number: int) -> np.ndarray:
        """The `number` most frequent ids that occur."""
        return _highest(self["count"], number)


def _highest(values: np.ndarray, number: int) -> np.ndarray:
    """Indices of the `number` highest values above 0, the lower index first among equals."""
    above = np.flatnonzero(values > 0)
    return above[np.argsort(-values[above], kind="stable")][:number]
