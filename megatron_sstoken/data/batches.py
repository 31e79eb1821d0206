"""Samples → packs → the token batches of this rank, in an order that depends on the seed alone and resumes exactly."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch

from megatron_sstoken.data.packing import first_fit_decreasing, next_fit, one_per_pack
from megatron_sstoken.data.store import SampleStore


class TokenValues(Protocol):
    """One float32 for every token of a store: what `TokenColumn` reads."""

    def values(self, start: int, stop: int) -> np.ndarray: ...


@dataclass(frozen=True)
class BatchFacts:
    """What the host knows of a micro-batch, so that it need not ask the device."""

    sample_lengths: list[int]
    """Real tokens of each sample."""
    response_counts: list[int]
    """Response tokens with a loss of each sample."""
    response: np.ndarray
    """bool [T]: as `TokenBatch.response`."""
    follows: np.ndarray
    """bool [T]: real tokens that something precedes in their sample."""
    num_chosen: int | None = None
    """Response tokens that were selected before training, where that is so."""
    exempt_counts: list[int] | None = None
    """Response tokens of each sample that `TokenBatch.exempt` names; None: as that."""


@dataclass(frozen=True)
class Visits:
    """Which samples of the store a micro-batch holds, and in which epochs; on the host."""

    index: list[int]
    """Their numbers in the store."""
    epoch: list[int]
    """Of each: in which pass over the data it is there, from 0."""
    epochs: tuple[int, int]
    """The first and the last epoch of the whole global batch."""


@dataclass(frozen=True)
class TokenBatch:
    """One micro-batch of one data-parallel rank: its packs one after another, T tokens in all.

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
    """bool [T]: response tokens that something precedes: those with a loss."""
    history_loss: torch.Tensor | None
    """fp32 [T], NaN where undefined; None if nobody needs it."""
    lengths: list[int]
    """Lengths of the stretches that do not attend to each other; their sum is T.

    In each pack its samples (with the padding that aligns them) and then the pack's padding.
    """
    num_segments: int
    """Samples in this batch."""
    weight: torch.Tensor | None = None
    """fp32 [T]: how much the loss of each token counts, 0 outside the response; None: all alike."""
    known: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What else was known of tokens before training, by the names of `TokenSignals`: fp32 [T], NaN where undefined."""
    exempt: torch.Tensor | None = None
    """bool [T]: response tokens that are trained on without competing, for want of history; None: there are none."""
    visits: Visits | None = None
    """None in batches that no loader made."""
    facts: BatchFacts = None  # type: ignore[assignment]  # made here, from tensors that lie on the host
    """The same on the host, wherever the tensors are."""

    def __post_init__(self) -> None:
        if self.facts is None:
            object.__setattr__(self, "facts", _facts_of(self))

    def mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "TokenBatch":
        """The same with `function` applied to every tensor: a copy to another place."""
        values: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            values[entry.name] = function(value) if isinstance(value, torch.Tensor) else value
        values["known"] = {name: function(value) for name, value in self.known.items()}
        return TokenBatch(**values)


def _facts_of(batch: TokenBatch) -> BatchFacts:
    segment, response = batch.segment.numpy(), batch.response.numpy()
    real = segment >= 0
    chosen = batch.known.get("chosen")
    return BatchFacts(
        sample_lengths=np.bincount(segment[real], minlength=batch.num_segments).tolist(),
        response_counts=np.bincount(segment[response], minlength=batch.num_segments).tolist(),
        response=response,
        follows=real & (batch.position.numpy() > 0),
        num_chosen=None if chosen is None else int(((chosen.numpy() == 1) & response).sum()),
    )


@dataclass(frozen=True)
class SampleFilter:
    """The samples of a store that a run uses, and how long they are in it."""

    indices: np.ndarray
    """int64: their numbers in the store, ascending."""
    lengths: np.ndarray
    """int32, for every sample of the store: its length cut to the sequence length."""
    num_truncated: int
    num_dropped: int
    num_without_response: int
    """Left out because truncation took all their response tokens."""


def filter_samples(store: SampleStore, sequence_length: int, too_long: str) -> SampleFilter:
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
            f"data.too_long={too_long}: the shortest sample has {store.lengths.min()} tokens: use a larger length"
        )
    return SampleFilter(
        indices=np.flatnonzero(keep),
        lengths=lengths,
        num_truncated=int(long.sum()) - without_response if too_long == "truncate" else 0,
        num_dropped=int(long.sum()) if too_long == "drop" else 0,
        num_without_response=without_response,
    )


Packing = Literal["none", "next_fit", "first_fit"]


class PackOrder:
    """The endless sequence of packs of a run: epoch after epoch, each in its own order.

    A pack is an array of sample numbers whose lengths sum to at most `capacity`. Pack n is a function of the arguments
    here and n alone, never of the layout, so that a run resumes by its number of packs.
    """

    def __init__(
        self, samples: SampleFilter, *, seed: int, shuffle: bool, packing: Packing = "none", capacity: int = 0
    ):
        self.samples = samples
        self._seed, self._shuffle, self._packing, self._capacity = seed, shuffle, packing, capacity
        self._first_pack = [0]  # of each epoch so far, and of the one after
        self._first_sample = [0]
        self._epoch = -1
        self._packs: list[np.ndarray] = []
        self._samples_before: np.ndarray = np.zeros(1, dtype=np.int64)

    def num_packs(self, epochs: int) -> int:
        """Packs of the first `epochs` epochs; with packing they differ from epoch to epoch."""
        while len(self._first_pack) <= epochs:
            self._load(len(self._first_pack) - 1)
        return self._first_pack[epochs]

    def pack(self, number: int) -> np.ndarray:
        """Sample numbers of pack `number`, counted over all epochs."""
        self._seek(number)
        return self._packs[number - self._first_pack[self._epoch]]

    def epoch(self, number: int) -> int:
        """The epoch, from 0, of pack `number`."""
        while self._first_pack[-1] <= number:
            self._load(len(self._first_pack) - 1)
        return bisect_right(self._first_pack, number) - 1

    def samples_before(self, number: int) -> np.ndarray:
        """int64, ascending: the samples that the packs before pack `number` hold, each once."""
        if number >= self.num_packs(1):
            return self.samples.indices
        return np.sort(np.concatenate([self.samples.indices[:0], *map(self.pack, range(number))]))

    def num_samples_before(self, number: int) -> int:
        """Samples in the packs before pack `number`."""
        self._seek(number)
        within = number - self._first_pack[self._epoch]
        return self._first_sample[self._epoch] + int(self._samples_before[within])

    def _seek(self, number: int) -> None:
        """Load the epoch that holds pack `number`."""
        epoch = self.epoch(number)
        if epoch != self._epoch:
            self._load(epoch)

    def _load(self, epoch: int) -> None:
        order, generator = self.samples.indices, None
        if self._shuffle:
            generator = np.random.default_rng([self._seed, epoch])
            order = generator.permutation(order)
        if self._packing == "first_fit":
            self._packs = first_fit_decreasing(order, self.samples.lengths, self._capacity, generator)
        elif self._packing == "next_fit":
            self._packs = next_fit(order, self.samples.lengths, self._capacity)
        else:
            self._packs = one_per_pack(order)
        self._epoch = epoch
        self._samples_before = np.cumsum([0, *map(len, self._packs)])
        if epoch == len(self._first_pack) - 1:
            self._first_pack.append(self._first_pack[epoch] + len(self._packs))
            self._first_sample.append(self._first_sample[epoch] + len(order))


@dataclass(frozen=True)
class BatchShape:
    """How a global batch is divided: packs of a micro-batch, of the whole, and over how many ranks."""

    micro_batch_size: int
    global_batch_size: int
    data_size: int
    pack_multiple: int = 64
    """Pack lengths are multiples of this: what sequence and context parallel divide."""
    sample_multiple: int = 1
    """Samples are padded to multiples of this: 2 chunks for every context parallel rank."""

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches that each data-parallel rank computes a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_size)

    def pack_length(self, tokens: int) -> int:
        """Length of a pack that holds this many tokens, with the padding at its end."""
        return -(-tokens // self.pack_multiple) * self.pack_multiple


def batch_shape(
    micro_batch_size: int,
    global_batch_size: int,
    data_size: int,
    *,
    tensor: int,
    context: int,
    sequence: bool,
    tokens_multiple: int = 1,
) -> BatchShape:
    """The shape for a layout. Rows are multiples of 64 at least, so that the number of shapes stays small.

    What one rank holds of a pack is a multiple of `tokens_multiple`.
    """
    parts = context * (tensor if sequence else 1)
    return BatchShape(
        micro_batch_size,
        global_batch_size,
        data_size,
        pack_multiple=math.lcm(64, 2 * parts, tokens_multiple * parts),
        sample_multiple=2 * context if context > 1 else 1,
    )


class BatchLoader:
    """Global batches of packs, and this rank's part of each as token batches.

    Batch b holds packs [b·global, (b + 1)·global) of the order, up to `num_packs`; what is missing in the last one are
    empty packs. At micro-step m data rank d computes packs [(m·data_size + d)·micro, … + micro) of the batch.

    `lag`: by how many packs every batch begins earlier, for a run that goes on from a shorter one whose last batch held so
    many empty ones.
    """

    def __init__(
        self,
        store: SampleStore,
        order: PackOrder,
        shape: BatchShape,
        *,
        data_rank: int,
        num_packs: int,
        lag: int = 0,
        history: TokenValues | None = None,
        weighted: bool = False,
        weights: TokenValues | None = None,
        known: Mapping[str, TokenValues] | None = None,
    ):
        """`weighted`: batches carry the weights of the store, or those of `weights`, which are 1 where it has none.

        `known`: goes into the batches' `known`.
        """
        self.weighted, self.weights, self.known = weighted, weights, dict(known or {})
        self.store, self.order, self.shape = store, order, shape
        self.data_rank, self.num_packs, self.lag, self.history = data_rank, num_packs, lag, history

    @property
    def num_batches(self) -> int:
        return -(-(self.num_packs + self.lag) // self.shape.global_batch_size)

    def packs(self, batch: int) -> list[np.ndarray]:
        """All packs of a global batch, the same on every rank."""
        return [self.order.pack(number) for number in self._pack_numbers(batch)]

    def _pack_numbers(self, batch: int) -> range:
        first = batch * self.shape.global_batch_size - self.lag
        return range(first, min(first + self.shape.global_batch_size, self.num_packs))

    def num_samples_before(self, batch: int) -> int:
        """Samples in all batches before this one."""
        return self.order.num_samples_before(min(batch * self.shape.global_batch_size - self.lag, self.num_packs))

    def load(self, batch: int) -> list[TokenBatch]:
        """This rank's micro-batches of a global batch, on the CPU, all of one length T."""
        packs, numbers = self.packs(batch), self._pack_numbers(batch)
        epochs = [self.order.epoch(number) for number in numbers]
        length = self._pack_length(packs)
        step = self.shape.micro_batch_size * self.shape.data_size
        result = []
        for micro_step in range(self.shape.num_micro_batches):
            first = micro_step * step + self.data_rank * self.shape.micro_batch_size
            here = slice(first, first + self.shape.micro_batch_size)
            mine = packs[here]
            empty = [np.empty(0, dtype=np.int64)] * (self.shape.micro_batch_size - len(mine))
            visits = Visits(
                index=[int(index) for pack in mine for index in pack],
                epoch=[epoch for pack, epoch in zip(mine, epochs[here], strict=True) for _ in pack],
                epochs=(epochs[0], epochs[-1]) if epochs else (0, 0),
            )
            result.append(self._assemble(mine + empty, length, visits))
        return result

    def _aligned(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths rounded up to what context parallel cuts evenly."""
        multiple = self.shape.sample_multiple
        return -(-lengths // multiple) * multiple

    def _pack_length(self, packs: list[np.ndarray]) -> int:
        longest = max((int(self._aligned(self.order.samples.lengths[pack]).sum()) for pack in packs), default=1)
        return self.shape.pack_length(longest)

    def _read(self, column: TokenValues, index: int, length: int) -> np.ndarray:
        """Values of the first `length` tokens of a sample."""
        offset = int(self.store.offsets[index])
        return column.values(offset, offset + length)

    def _assemble(self, packs: list[np.ndarray], pack_length: int, visits: Visits) -> TokenBatch:
        total = len(packs) * pack_length
        tokens = np.zeros(total, dtype=np.int64)
        labels = np.zeros(total, dtype=np.int64)
        position = np.zeros(total, dtype=np.int64)
        segment = np.full(total, -1, dtype=np.int64)
        sample = np.full(total, -1, dtype=np.int64)
        role = np.zeros(total, dtype=np.uint8)
        history = np.full(total, np.nan, dtype=np.float32) if self.history is not None else None
        weight = np.zeros(total, dtype=np.float32) if self.weighted else None
        known = {name: np.full(total, np.nan, dtype=np.float32) for name in self.known}
        lengths: list[int] = []
        num_segments = 0
        for number, pack in enumerate(packs):
            start = number * pack_length
            for index in pack.tolist():
                length = int(self.order.samples.lengths[index])
                here = slice(start, start + length)
                tokens[here] = self.store.tokens(index, length)
                labels[start : start + length - 1] = tokens[start + 1 : start + length]
                role[here] = self.store.roles(index, length)
                position[here] = np.arange(length)
                segment[here] = num_segments
                sample[here] = self.store.rows[index]
                if history is not None and self.history is not None:
                    history[here] = self._read(self.history, index, length)
                for name, values in known.items():
                    values[here] = self._read(self.known[name], index, length)
                if weight is not None and self.weights is not None:
                    weight[here] = role[here] * np.nan_to_num(self._read(self.weights, index, length), nan=1.0)
                elif weight is not None:
                    weight[here] = self.store.weights(index, length)
                aligned = int(self._aligned(np.array(length)))
                lengths.append(aligned)
                num_segments += 1
                start += aligned
            padding = (number + 1) * pack_length - start
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
            weight=torch.from_numpy(weight) if weight is not None else None,
            known={name: torch.from_numpy(values) for name, values in known.items()},
            visits=visits,
        )
