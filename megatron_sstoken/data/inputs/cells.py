"""Rows of a table that is text: comma- or tab-separated values, whose first row names the columns."""

import csv
import io
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.inputs.chunks import Chunk, as_text
from megatron_sstoken.data.rows.row_values import decode_json, decoded

JSON_COLUMNS = frozenset(
    ("messages", "conversations", "conversation", "tools", "functions", "chat_template_kwargs", "history")
)
"""Columns whose cells hold JSON."""
VALUE_COLUMNS = frozenset(("weight", "loss_weight", "train", "label"))
"""Columns whose cells hold a number, or true or false in any case of letters. A cell of any other column is a text."""


@dataclass(frozen=True)
class CellChunk(Chunk):
    """Consecutive rows of cells, each with the line where it begins."""

    header: list[str]
    lines: list[tuple[int, list[str]]]

    def rows(self) -> Iterator[tuple[int, list[str]]]:
        return iter(self.lines)

    def decode(self, raw: list[str]) -> dict[str, Any]:
        if len(raw) != len(self.header):
            raise BadRow(
                f"the row has {len(raw)} cells, and the header {len(self.header)}: quote cells that hold commas"
            )
        for name, cell in zip(self.header, raw, strict=True):
            if not cell.isascii() and any("\udc80" <= letter <= "\udcff" for letter in cell):
                raise BadRow(f"the cell `{name}` is not UTF-8")
        return {name: _value(name, cell) for name, cell in zip(self.header, raw, strict=True)}

    def text(self, raw: list[str]) -> str:
        text = as_text(dict(zip(self.header, raw, strict=False)))
        return text.encode("utf-8", errors="backslashreplace").decode()


def _value(name: str, cell: str) -> Any:
    if name not in JSON_COLUMNS | VALUE_COLUMNS:
        return cell
    if not cell.strip():
        return None
    if name in VALUE_COLUMNS:
        with suppress(BadRow):
            return decode_json(cell.lower(), "")
        return cell
    return decoded(cell, f"the cell `{name}`")


def read_cells(stream: BinaryIO, file: str, delimiter: str) -> Iterator[CellChunk]:
    """The rows below the header. ValueError where there is none that names the columns."""
    csv.field_size_limit(1 << 40)
    # bytes that are not UTF-8 stay what they are, so that their row alone is a bad one
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter)
    try:
        header = _header(next(reader, []), file)
        held: list[tuple[int, list[str]]] = []
        size, line = 0, reader.line_num + 1
        for cells in reader:
            if cells:
                held.append((line, cells))
                size += sum(map(len, cells))
            line = reader.line_num + 1
            if size >= chunks.CHUNK_BYTES:
                yield CellChunk(file, "line", header, held)
                held, size = [], 0
        if held:
            yield CellChunk(file, "line", header, held)
    except csv.Error as error:
        raise ValueError(
            f"--input: {file}:{reader.line_num}: {error}: it is not a table of separated values"
        ) from error
    finally:
        text.detach()  # the stream is its owner's to close


def _header(names: list[str], file: str) -> list[str]:
    names = [name.strip() for name in names]
    wrong = "has no header" if not names else "has a column without a name" if not all(names) else None
    if len(names) == 1 and ";" in names[0]:
        wrong = "is separated by semicolons, not commas"
    if twice := [name for name in names if names.count(name) > 1]:
        wrong = f"has two columns `{twice[0]}`"
    if wrong:
        raise ValueError(f"--input: {file} {wrong}: give commas, and a first row that names each column once")
    return names
