"""Samples → rows → the token batches of this rank, in an order that depends on the seed alone and resumes exactly."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch

from megatron_sstoken.data.store import SampleStore


class TokenValues(Protocol):
    """One float32 for every token of a store: what `TokenColumn` reads."""

    def values(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one data-parallel rank: its rows one after another, T tokens in all.

    `tokens` and `labels` are what the model takes, [1, T]. The rest is one-dimensional over T; entry t speaks of
    token t itself, while `labels[t]` is token t + 1 and the loss that the model returns at t belongs to it.
    """

    tokens: torch.Tensor
    """int64 [1, T]; 0 where there is padding."""
    labels: torch.Tensor
    """int64 [1, T]: the next token of the same sample; 0 after its last token."""
    position: torch.Tensor
    """int64 [T]: position in the sample."""
    segment: torch.Tensor
    """int64 [T]: which sample of this batch, from 0; −1 is padding."""
    sample: torch.Tensor
    """int64 [T]: row number in the input; −1 is padding."""
    context: torch.Tensor
    """bool [T]: real tokens that the assistant did not say."""
    response: torch.Tensor
    """bool [T]: response tokens that something precedes: those with a loss, R of the design page."""
    history_loss: torch.Tensor | None
    """fp32 [T], NaN where undefined; None if nobody needs it."""
    lengths: list[int]
    """Lengths of the stretches that do not attend to each other (samples, then each row's padding); their sum is T."""
    num_segments: int
    """Samples in this batch."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same with every tensor on `device`."""
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class SampleSelection:
    """The samples of a store that a run uses, and how long they are in it."""

    indices: np.ndarray
    """int64: their numbers in the store, ascending."""
    lengths: np.ndarray
    """int32, for every sample of the store: its length cut to the sequence length."""
    num_truncated: int
    num_dropped: int
    num_without_response: int
    """Left out because truncation took all their response tokens."""


def choose_samples(store: SampleStore, sequence_length: int, too_long: str) -> SampleSelection:
    """Apply `data.sequence_length` and `data.too_long`. Raises ValueError if no sample is left."""
    long = store.lengths > sequence_length
    keep = ~long if too_long == "drop" else np.ones(len(store), dtype=bool)
    lengths = np.minimum(store.lengths, sequence_length).astype(np.int32)
    without_response = 0
    if too_long == "truncate":
        for index in np.flatnonzero(long):
            if not store.roles(int(index), sequence_length)[1:].any():
                keep[index] = False
                without_response += 1
    if not keep.any():
        raise ValueError(
            f"{store.path}: no sample is left with data.sequence_length={sequence_length} and "
            f"data.too_long={too_long}: the shortest sample has {store.lengths.min()} tokens; use a larger length"
        )
    return SampleSelection(
        indices=np.flatnonzero(keep),
        lengths=lengths,
        num_truncated=int(long.sum()) - without_response if too_long == "truncate" else 0,
        num_dropped=int(long.sum()) if too_long == "drop" else 0,
        num_without_response=without_response,
    )


class RowOrder:
    """The endless sequence of rows of a run: epoch after epoch, each in its own order.

    A row is an array of sample numbers. Row n is a function of (seed, n) alone, so that a run resumes by its number
    of rows, on any layout.
    """

    def __init__(self, samples: SampleSelection, *, seed: int, shuffle: bool):
        self.samples = samples
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = -1
        self._order: np.ndarray = np.empty(0, dtype=np.int64)

    @property
    def rows_per_epoch(self) -> int:
        return len(self.samples.indices)

    def row(self, number: int) -> np.ndarray:
        """Sample numbers of row `number`, counted over all epochs."""
        epoch, within = divmod(number, self.rows_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = self.samples.indices
            if self._shuffle:
                self._order = np.random.default_rng([self._seed, epoch]).permutation(self._order)
        return self._order[within : within + 1]


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided: rows of a micro-batch, of the whole, and over how many ranks."""

    micro_batch_size: int
    global_batch_size: int
    data_size: int
    row_multiple: int
    """Row lengths are multiples of this: what sequence and context parallel divide."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank computes a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)


def row_multiple(tensor: int, context: int, sequence: bool) -> int:
    """What row lengths must be a multiple of; at least 64, so that the number of shapes stays small."""
    return math.lcm(64, 2 * context * (tensor if sequence else 1))


class BatchLoader:
    """Global batches of rows, and this rank's part of each as token batches.

    Batch b holds rows [b·global, (b + 1)·global) of the order, up to `num_rows`; what is missing in the last one are
    empty rows. At micro-step m data rank d computes rows [(m·data_size + d)·micro, … + micro) of the batch.
    """

    def __init__(
        self,
        store: SampleStore,
        order: RowOrder,
        shape: BatchShape,
        *,
        data_rank: int,
        num_rows: int,
        history: TokenValues | None = None,
    ):
        self.store, self.order, self.shape = store, order, shape
        self.data_rank, self.num_rows, self.history = data_rank, num_rows, history

    @property
    def num_batches(self) -> int:
        return -(-self.num_rows // self.shape.global_batch_size)

    def rows(self, batch: int) -> list[np.ndarray]:
        """All rows of a global batch, the same on every rank."""
        first = batch * self.shape.global_batch_size
        last = min(first + self.shape.global_batch_size, self.num_rows)
        return [self.order.row(number) for number in range(first, last)]

    def num_samples_before(self, batch: int) -> int:
        """Samples in all batches before this one."""
        return min(batch * self.shape.global_batch_size, self.num_rows)

    def load(self, batch: int) -> list[TokenBatch]:
        """This rank's micro-batches of a global batch, on the CPU, all of one length T."""
        rows = self.rows(batch)
        length = self._row_length(rows)
        step = self.shape.micro_batch_size * self.shape.data_size
        result = []
        for micro_step in range(self.shape.num_micro_batches):
            first = micro_step * step + self.data_rank * self.shape.micro_batch_size
            mine = rows[first : first + self.shape.micro_batch_size]
            empty = [np.empty(0, dtype=np.int64)] * (self.shape.micro_batch_size - len(mine))
            result.append(self._assemble(mine + empty, length))
        return result

    def _row_length(self, rows: list[np.ndarray]) -> int:
        longest = max((int(self.order.samples.lengths[row].sum()) for row in rows), default=1)
        return -(-longest // self.shape.row_multiple) * self.shape.row_multiple

    def _assemble(self, rows: list[np.ndarray], row_length: int) -> TokenBatch:
        total = len(rows) * row_length
        tokens = np.zeros(total, dtype=np.int64)
        labels = np.zeros(total, dtype=np.int64)
        position = np.zeros(total, dtype=np.int64)
        segment = np.full(total, -1, dtype=np.int64)
        sample = np.full(total, -1, dtype=np.int64)
        role = np.zeros(total, dtype=np.uint8)
        history = np.full(total, np.nan, dtype=np.float32) if self.history is not None else None
        lengths: list[int] = []
        num_segments = 0
        for number, row in enumerate(rows):
            start = number * row_length
            for index in row.tolist():
                length = int(self.order.samples.lengths[index])
                here = slice(start, start + length)
                tokens[here] = self.store.tokens(index, length)
                labels[start : start + length - 1] = tokens[start + 1 : start + length]
                role[here] = self.store.roles(index, length)
                position[here] = np.arange(length)
                segment[here] = num_segments
                sample[here] = self.store.rows[index]
                if history is not None:
                    offset = int(self.store.offsets[index])
                    history[here] = self.history.values(offset, offset + length)
                lengths.append(length)
                num_segments += 1
                start += length
            padding = (number + 1) * row_length - start
            if padding:
                lengths.append(padding)
        real = torch.from_numpy(segment) >= 0
        is_response = torch.from_numpy(role) == 1
        return TokenBatch(
            tokens=torch.from_numpy(tokens).unsqueeze(0),
            labels=torch.from_numpy(labels).unsqueeze(0),
            position=torch.from_numpy(position),
            segment=torch.from_numpy(segment),
            sample=torch.from_numpy(sample),
            context=real & ~is_response,
            response=real & is_response & (torch.from_numpy(position) > 0),
            history_loss=torch.from_numpy(history) if history is not None else None,
            lengths=lengths,
            num_segments=num_segments,
        )


def iterate(loader: BatchLoader, first: int, last: int) -> Iterator[tuple[int, list[TokenBatch]]]:
    """Global batches [first, last) as (number, this rank's micro-batches)."""
    for number in range(first, last):
        yield number, loader.load(number)
