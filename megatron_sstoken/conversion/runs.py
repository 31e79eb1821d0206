"""Bytes that a conversion moves and does not change: found by number, copied from file to file through one buffer.

A parameter mostly consists of rows of Hugging Face tensors, whole and in some order. In which, the rules of the weights say
themselves, when they are given numbers of rows in place of rows. To put such a parameter together in memory takes longer
than to read and write it, for a system that has to find new memory for each.
"""

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from megatron_sstoken.files import begin_sync_of_much, write_at

_BUFFER = 4 << 20


@dataclass(frozen=True)
class Run:
    """Consecutive bytes of a file."""

    path: str | None
    """None: zeros."""
    start: int
    length: int


def cut(runs: Sequence[Run], start: int, stop: int) -> Iterator[Run]:
    """Bytes [start, stop) of what the runs hold one after another."""
    ends = list(accumulate(run.length for run in runs))
    for index in range(bisect_right(ends, start), len(runs)):
        begins = ends[index] - runs[index].length
        if max(begins, start) >= stop:
            return
        skipped = max(0, start - begins)
        length = min(ends[index], stop) - begins - skipped
        yield replace(runs[index], start=runs[index].start + skipped, length=length)


class NumberedRows:
    """Tensors whose rows, along the first axis, are numbers; what is made of them says where its bytes are."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Sequence[Run], int]] = []
        """Runs and number of bytes of a row of each tensor."""
        self._first: list[int] = []
        """Number of its first row. A row 0, which functions add that fill up, is zeros."""
        self._next = 2

    def of(self, shape: Sequence[int], runs: Sequence[Run]) -> torch.Tensor:
        """Numbers, int64 [rows, 1, …], of a tensor of this shape whose bytes are `runs`."""
        rows = shape[0]
        self._tensors.append((runs, sum(run.length for run in runs) // rows))
        self._first.append(self._next)
        numbers = torch.arange(self._next, self._next + rows).reshape(rows, *(1 for _ in shape[1:]))
        self._next += rows + 1  # a number between keeps the last row of a tensor and the first of the next apart
        return numbers

    def runs(self, numbers: torch.Tensor) -> list[Run]:
        """The bytes of rows of any of the tensors, in the order of `numbers`."""
        order = numbers.flatten().numpy()
        steps = np.diff(order)
        begins = [0, *(np.flatnonzero(steps != 1) + 1).tolist()]
        found: list[Run] = []
        for begin, end in zip(begins, [*begins[1:], len(order)], strict=True):
            first, count = int(order[begin]), end - begin
            index = bisect_right(self._first, first) - 1
            if index < 0:
                found.append(Run(None, 0, count * self._tensors[0][1]))
                continue
            runs, size = self._tensors[index]
            start = (first - self._first[index]) * size
            found += cut(runs, start, start + count * size)
        return found


class RunCopier:
    """Writes runs into files; several threads may at once. A context manager: at its end the files read are closed."""

    def __init__(self, largest: int) -> None:
        self.cost = max(1, min(_BUFFER, largest))
        """Bytes of a thread's buffer."""
        self._descriptors: dict[str, int] = {}
        self._guard = threading.Lock()
        self._mine = threading.local()

    def __enter__(self) -> "RunCopier":
        return self

    def __exit__(self, *error: Any) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def copy(self, runs: Sequence[Run], target: int, place: int) -> int:
        """Write the runs one after another into the open file `target`, from byte `place` on; returns how many bytes they are.

        Raises ValueError where a file has become shorter.
        """
        begin = place
        for run in runs:
            if run.path is None:
                place = write_at(target, bytes(run.length), place)
                continue
            source = self._opened(run.path)
            if hasattr(os, "posix_fadvise"):  # the system reads on while this thread writes
                os.posix_fadvise(source, run.start, run.length, os.POSIX_FADV_WILLNEED)
            done = 0
            while done < run.length:
                part = self._buffer[: run.length - done]
                length = os.preadv(source, [part], run.start + done)
                if length == 0:
                    raise ValueError(f"{run.path} has become shorter while it was read: start again")
                place = write_at(target, part[:length], place)
                done += length
        begin_sync_of_much(target, begin, place)
        return place - begin

    @property
    def _buffer(self) -> memoryview:
        if not hasattr(self._mine, "buffer"):
            self._mine.buffer = memoryview(bytearray(self.cost))
        buffer: memoryview = self._mine.buffer
        return buffer

    def _opened(self, path: str) -> int:
        with self._guard:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]
