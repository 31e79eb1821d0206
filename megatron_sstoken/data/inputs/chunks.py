"""Rows on their way to a worker process: as bytes, cells or Arrow, for the parent to spend no time on them."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 1 << 20
"""Bytes of the rows of a chunk, about; one row may be larger. Handing smaller ones to workers takes longer."""


@dataclass(frozen=True)
class Chunk(ABC):
    """Consecutive rows of one file. A row has a place there, a number from 1, which `unit` names."""

    file: str
    unit: str
    """line, row or element."""

    @abstractmethod
    def rows(self) -> Iterator[tuple[int, Any]]:
        """Place of each row that is not blank, and the row as it lies in the chunk."""

    @abstractmethod
    def decode(self, raw: Any) -> dict[str, Any]:
        """A row of `rows` → columns. Raises `BadRow`."""

    @abstractmethod
    def text(self, raw: Any) -> str:
        """A row of `rows` for people."""

    def where(self, place: int) -> str:
        """`file:line` as editors take it, or `file, row 3`."""
        return f"{self.file}:{place}" if self.unit == "line" else f"{self.file}, {self.unit} {place}"


def as_text(row: Any) -> str:
    """A row as one line of JSON; what JSON has no form for (dates, bytes) as Python writes it."""
    return json.dumps(row, ensure_ascii=False, default=str)
