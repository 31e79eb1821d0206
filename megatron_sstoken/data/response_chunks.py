"""The response tokens of a data set, chunk by chunk: for what is worked out of all tokens in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_sstoken.data.batches import SampleFilter, TokenValues
from megatron_sstoken.data.store import SampleStore

CHUNK_TOKENS = 1 << 20


@dataclass(frozen=True)
class ResponseChunk:
    """Response tokens with a loss, in the order of the store."""

    index: np.ndarray
    """int64 [n]: number of the token's sample in the store."""
    position: np.ndarray
    """int64 [n]: in the sample."""
    place: np.ndarray
    """int64 [n]: in the store's token stream, ascending."""

    def read(self, values: TokenValues) -> np.ndarray:
        """float32 [n]: their values in a column."""
        if not len(self.place):
            return np.empty(0, dtype=np.float32)
        first = int(self.place[0])
        return values.values(first, int(self.place[-1]) + 1)[self.place - first]


def response_chunks(store: SampleStore, samples: SampleFilter, size: int = CHUNK_TOKENS) -> Iterator[ResponseChunk]:
    """Of all samples that a run uses, cut to their lengths in it; a chunk has whole samples, of `size` tokens or one sample."""
    roles = store.role_stream
    lengths = samples.lengths[samples.indices].astype(np.int64)
    ends, first = np.cumsum(lengths), 0
    while first < len(lengths):
        done = int(ends[first - 1]) if first else 0
        stop = max(int(np.searchsorted(ends, done + size, side="right")), first + 1)
        counts, indices = lengths[first:stop], samples.indices[first:stop]
        position = np.arange(int(counts.sum())) - np.repeat(np.cumsum(counts) - counts, counts)
        place = position + np.repeat(store.offsets[indices], counts)
        kept = (roles[place] == 1) & (position > 0)
        yield ResponseChunk(np.repeat(indices, counts)[kept], position[kept], place[kept])
        first = stop
