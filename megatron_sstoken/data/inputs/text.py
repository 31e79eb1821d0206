"""Rows that are JSON texts: one a line, the elements of one array, or objects one after another in any layout."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from megatron_sstoken.data.inputs import chunks
from megatron_sstoken.data.inputs.chunks import Chunk
from megatron_sstoken.data.rows.formats import decode_line

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_READ = 1 << 18
_QUOTE, _COMMA = b'",'
# A string (whole, or as far as it is there), or what gives JSON its structure
_STRUCTURE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*("?)|[\[\]{},]', re.DOTALL)


@dataclass(frozen=True)
class TextChunk(Chunk):
    """Consecutive JSON texts, `content` a list of them, or lines as they lie in the file; the first has the place `first`."""

    first: int
    content: list[bytes] | bytes

    def rows(self) -> Iterator[tuple[int, bytes]]:
        content = self.content
        # Lines are cut where they are read: whoever hands them on need not touch each.
        texts = content.split(b"\n") if isinstance(content, bytes) else content
        for place, text in enumerate(texts, start=self.first):
            if not text.isspace() and (text or texts is content):  # an array with an empty element is a mistake
                yield place, text

    def decode(self, raw: bytes) -> dict[str, Any]:
        return decode_line(raw)

    def text(self, raw: bytes) -> str:
        return raw.decode("utf-8", errors="backslashreplace").rstrip("\r\n")


def read_lines(stream: BinaryIO, file: str) -> Iterator[TextChunk]:
    """JSON lines."""
    first = 1
    while content := stream.read(chunks.CHUNK_BYTES) + stream.readline():
        yield TextChunk(file, "line", first, content.removeprefix(BYTE_ORDER_MARK) if first == 1 else content)
        first += content.count(b"\n")


def read_array(stream: BinaryIO, file: str) -> Iterator[TextChunk]:
    """The elements of one JSON array."""
    return _in_chunks(split_json(stream, file, array=True), file)


def read_objects(stream: BinaryIO, file: str) -> Iterator[TextChunk]:
    """JSON objects one after another, each over as many lines as it likes."""
    return _in_chunks(split_json(stream, file, array=False), file)


def _in_chunks(values: Iterator[bytes], file: str) -> Iterator[TextChunk]:
    first, size = 1, 0
    held: list[bytes] = []
    for value in values:
        held.append(value)
        size += len(value)
        if size >= chunks.CHUNK_BYTES:
            yield TextChunk(file, "element", first, held)
            first, held, size = first + len(held), [], 0
    if held:
        yield TextChunk(file, "element", first, held)


def split_json(stream: BinaryIO, file: str, *, array: bool) -> Iterator[bytes]:
    """The elements of one array, or objects one after another, cut by brackets and strings; whoever gets them decodes them.

    Holds one value at a time, and about as much again of what follows. Raises ValueError where the file ends inside a value,
    or has something else between or after them.
    """
    data = b""
    at = start = level = number = 0
    over = False  # the array has ended
    while more := stream.read(max(_READ, len(data))):
        data += more
        stop = len(data)
        for found in _STRUCTURE.finditer(data, at):
            mark, here = data[found.start()], found.start()
            if mark == _QUOTE:
                if not found[1]:  # goes on in what is still to be read
                    stop = here
                    break
            elif mark in b"[{":
                level += 1
                if level == 1:
                    _require_blank(data[start : here + over], file, number, over)
                    start = here + 1 if array else here
            elif mark == _COMMA:
                if array and level == 1:
                    yield data[start:here].strip()
                    start, number = here + 1, number + 1
            else:
                level -= 1
                if level == 0:
                    value = data[start:here].strip() if array else data[start : here + 1]
                    if value or number:
                        yield value
                        number += 1
                    start, over = here + 1, array
                elif level < 0:
                    _require_blank(data[here : here + 1], file, number, over)
        data, at, start = data[start:], stop - start, 0
    if level:
        raise ValueError(f"--input: {file} ends inside element {number + 1}: it is cut off, fetch or make it again")
    _require_blank(data, file, number, over)


def _require_blank(between: bytes, file: str, number: int, over: bool) -> None:
    text = between.removeprefix(BYTE_ORDER_MARK) if number == 0 else between
    if text.strip():
        shown = text.strip()[:20].decode("utf-8", errors="backslashreplace")
        after = f"after its array of {number} elements" if over else f"after element {number}"
        raise ValueError(f"--input: {file} has {shown!r} {after}: give JSON lines, or one JSON array")
