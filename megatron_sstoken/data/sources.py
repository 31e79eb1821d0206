"""Which source each sample of prepared data is from, so that losses can be told for each."""

from dataclasses import dataclass, field

import numpy as np

from megatron_sstoken.data.store import SampleStore

MOST = 32
"""Sources that are told apart: those with the most response tokens."""
OTHERS = "other"
"""The name of all others together."""


@dataclass(frozen=True)
class Sources:
    """The sources of a store by name, and of each sample which of them it is from."""

    names: tuple[str, ...] = ()
    """Empty where the data names no more than one: then nothing is told apart."""
    of_sample: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """int64 [num_samples]: a number of `names`."""

    @classmethod
    def of(cls, store: SampleStore) -> "Sources":
        """Those that the labels of its samples name."""
        labels = store.manifest.labels
        if len(labels) < 2:
            return NO_SOURCES
        tokens = np.bincount(store.labels, store.response_counts, len(labels))
        largest = [int(number) for number in np.argsort(-tokens, kind="stable") if labels[number] != OTHERS]
        kept = sorted(range(len(labels)) if len(labels) <= MOST else largest[:MOST])
        numbers = np.full(len(labels), len(kept), dtype=np.int64)
        numbers[kept] = np.arange(len(kept))
        names = [labels[number] or "unnamed" for number in kept]
        return cls(tuple(names if len(kept) == len(labels) else [*names, OTHERS]), numbers[store.labels])


NO_SOURCES = Sources()
