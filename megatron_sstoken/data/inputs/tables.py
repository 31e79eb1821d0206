"""Rows of Parquet and Arrow files. They travel as Arrow; the worker makes Python objects of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.inputs.chunks import Chunk, as_text

ARROW_FILE = b"ARROW1"
"""First bytes of a file in Arrow's file format."""


@dataclass(frozen=True)
class TableChunk(Chunk):
    """Consecutive rows as an Arrow stream; the first has the place `first`."""

    first: int
    stream: bytes

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with ipc.open_stream(self.stream) as reader:
            yield from enumerate((row for batch in reader for row in batch.to_pylist()), start=self.first)

    def decode(self, raw: dict[str, Any]) -> dict[str, Any]:
        return {name: plain(value) for name, value in raw.items()}

    def text(self, raw: dict[str, Any]) -> str:
        return as_text(raw)


def plain(value: Any) -> Any:
    """What JSON would have held: a map is an object, and an object has no key that is null.

    A struct of Arrow has every key of its column, also those that the row had left out.
    """
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items() if one is not None}
    if not isinstance(value, list):
        return value
    if value and all(isinstance(one, tuple) for one in value):  # a map
        if len(dict(value)) < len(value):
            raise BadRow(f"a map has a key twice: {', '.join(str(key) for key, _ in value)}: keep one")
        return plain(dict(value))
    return [plain(one) for one in value]


def read_parquet(path: str) -> Iterator[tuple[float, TableChunk]]:
    """Chunks, each with the share of the file that is read by then. Raises ValueError for a damaged file."""
    with _readable(path), pyarrow.OSFile(path) as source, parquet.ParquetFile(source, buffer_size=1 << 20) as file:
        # page by page, as a row group may be larger than the memory
        metadata = file.metadata
        size = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
        rows = max(1, metadata.num_rows)
        at_once = min(1024, max(1, chunks.CHUNK_BYTES * rows // max(1, size)))
        done = 0
        for batch in file.iter_batches(batch_size=at_once):
            yield from ((done / rows, chunk) for chunk in _chunks(batch, path, done + 1))
            done += batch.num_rows


def read_arrow(path: str) -> Iterator[tuple[float, TableChunk]]:
    """As `read_parquet`, of a file in Arrow's file format (Feather) or its stream format (`datasets`)."""
    with _readable(path), pyarrow.OSFile(path) as source:
        size = source.size()
        reader: Any
        if source.read(6) == ARROW_FILE:
            reader = ipc.open_file(source)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            source.seek(0)
            batches = reader = ipc.open_stream(source)
        done = 0
        for batch in batches:
            share = source.tell() / size
            yield from ((share, chunk) for chunk in _chunks(batch, path, done + 1))
            done += batch.num_rows


def _chunks(batch: pyarrow.RecordBatch, path: str, first: int) -> Iterator[TableChunk]:
    if batch.num_rows > 1 and batch.nbytes > 2 * chunks.CHUNK_BYTES:
        half = batch.num_rows // 2
        yield from _chunks(batch.slice(0, half), path, first)
        yield from _chunks(batch.slice(half), path, first + half)
    elif batch.num_rows:
        sink = pyarrow.BufferOutputStream()
        with ipc.new_stream(sink, batch.schema) as writer:
            writer.write_batch(batch)
        yield TableChunk(path, "row", first, sink.getvalue().to_pybytes())


@contextmanager
def _readable(path: str) -> Iterator[None]:
    """Within, what Arrow says of a file's content is an error of the user."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0].rstrip(".:")
        raise ValueError(f"--input: {path} is cut off or damaged ({reason}): fetch or make it again") from error
