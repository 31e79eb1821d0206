"""Which samples a page shows, and their tokens: watched ones, then those that stand out, then some drawn at random."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from megatron_sstoken.report.figures import SAMPLE
from megatron_sstoken.report.record_files import Columns, RecordFile, whole_samples, without_repeats

KEYS = ("dropped_share", "drift", "top_score")
"""By what samples stand out: a quarter of those shown by each."""
_ALL = tuple("sample position token role loss history_loss attention score entropy selected weight".split())
_CONTEXT_SHARE = 4
"""One part in so many of what is shown of a long sample may stand before its first response token."""
_MOST_STEPS = 8
"""At which a sample is shown that is not watched: it is recorded where its batch happens to be."""


class _Best:
    """The `number` samples with the highest key, each once, of all that are offered."""

    def __init__(self, number: int):
        self._number = number
        self.figures = np.empty(0, dtype=SAMPLE)
        self._keys = np.empty(0)

    def offer(self, figures: np.ndarray, keys: np.ndarray) -> None:
        known = ~np.isnan(keys)
        figures = np.concatenate([self.figures, figures[known]])
        keys = np.concatenate([self._keys, keys[known]])
        order = np.lexsort((figures["sample"], -figures["num_response"], -keys))
        figures, keys = figures[order], keys[order]
        first = np.sort(np.unique(figures["sample"], return_index=True)[1])[: self._number]
        self.figures, self._keys = figures[first], keys[first]


class Choice:
    """Takes the figures of all samples, batch by batch, and holds as many as may be shown."""

    def __init__(self, number: int, seed: int):
        self._number, self._seed = number, seed
        self._best = {key: _Best(number) for key in KEYS}
        self._drawn = _Best(number)
        self._watched = np.empty(0, dtype=SAMPLE)

    def offer(self, figures: np.ndarray, *, watched: bool) -> None:
        """`SAMPLE` [n] of samples at one step; of those that are watched the last offer counts."""
        if watched:
            earlier = self._watched[~np.isin(self._watched["sample"], figures["sample"])]
            together = np.concatenate([earlier, figures])
            self._watched = together[np.argsort(together["sample"], kind="stable")[: self._number]]
            return
        for key, best in self._best.items():
            best.offer(figures, figures[key])
        self._drawn.offer(figures, _chance(figures["sample"], self._seed))

    @property
    def num_watched(self) -> int:
        """Watched samples among those shown."""
        return len(self._watched)

    def shown(self) -> np.ndarray:
        """`SAMPLE` [at most the number]: each sample once, in the order in which they are taken."""
        taken = self._watched
        each = max(1, (self._number - len(taken)) // (len(KEYS) + 1))
        for best in self._best.values():
            taken = self._with(taken, best.figures, each)
        return self._with(taken, self._drawn.figures, self._number)

    def _with(self, taken: np.ndarray, more: np.ndarray, most: int) -> np.ndarray:
        new = more[~np.isin(more["sample"], taken["sample"])]
        return np.concatenate([taken, new[: min(most, self._number - len(taken))]])


def _chance(samples: np.ndarray, seed: int) -> np.ndarray:
    """In [0, 1), of sample and seed alone (splitmix64's finalizer): what is drawn does not depend on the order of files."""
    mixed = samples.astype(np.uint64) + np.uint64((1 + seed) * 0x9E3779B97F4A7C15 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def window_of(figures: np.void, longest: int) -> tuple[int, int]:
    """Which tokens [start, stop) of a sample are shown: all, or `longest` of them from shortly before its first response."""
    length = int(figures["num_tokens"])
    start = int(figures["first_response"]) - longest // _CONTEXT_SHARE
    start = max(0, min(start, length - longest))
    return start, min(length, start + longest)


def load(
    files: Iterable[RecordFile], shown: np.ndarray, longest: int, steps: Sequence[int]
) -> dict[int, dict[int, Columns]]:
    """Sample → step → columns of its window; `shown` is `SAMPLE` [n], `steps` those of watched files to read.

    Each sample has the step that its figures are of. Where a step has a watched file and another one, the watched one counts,
    which comes first in `files`.
    """
    windows = {int(one["sample"]): window_of(one, longest) for one in shown}
    own_steps = {int(one["sample"]): int(one["step"]) for one in shown}
    loaded: dict[int, dict[int, Columns]] = {sample: {} for sample in windows}
    most = max(_MOST_STEPS, len(steps))
    for file in files:
        left_out = file.watched and file.step not in steps
        if left_out and file.step not in own_steps.values():
            continue
        for columns, starts in whole_samples(file, _ALL):
            stops = np.append(starts[1:], len(columns["sample"]))
            for place in np.flatnonzero(np.isin(columns["sample"][starts], shown["sample"])).tolist():
                sample = int(columns["sample"][starts[place]])
                found = loaded[sample]
                enough = left_out or len(found) >= most
                if file.step in found or (enough and file.step != own_steps[sample]):
                    continue
                whole = {name: values[starts[place] : stops[place]] for name, values in columns.items()}
                low, high = windows[sample]
                # copies: a view would keep the whole batch
                found[file.step] = {name: values[low:high].copy() for name, values in without_repeats(whole).items()}
    return loaded


def as_lists(columns: Columns) -> dict[str, Any]:
    """The values of a sample at one step, as the page takes them: None for context."""
    of_response = {
        name: np.where(columns["role"] == 1, columns[name], np.nan)
        for name in ("loss", "history_loss", "attention", "score", "entropy", "weight")
    }
    of_response["rel"] = of_response["history_loss"] - of_response["loss"]
    found: dict[str, Any] = {name: numbers(values) for name, values in of_response.items()}
    for name in ("entropy", "weight"):
        if np.isnan(of_response[name]).all():
            found[name] = None
    return found | {"selected": columns["selected"].astype(int).tolist()}


def numbers(values: np.ndarray) -> list[float | None]:
    """Numbers for people: 4 significant digits and 4 decimals at most; None where undefined."""
    return [
        round(float(f"{value:.4g}"), 4) if finite else None
        for value, finite in zip(values.tolist(), np.isfinite(values).tolist(), strict=True)
    ]
