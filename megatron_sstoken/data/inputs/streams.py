"""The bytes of a file in order: counted and hashed as they lie on disk, and unpacked."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import pyarrow

CODECS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\x04\x22\x4d\x18": "lz4"}
"""First bytes of a compressed file → Arrow's name of the codec."""
_BUFFER = 1 << 20


class InputBytes:
    """A regular file that is read once; `size` and `sha256` are of the bytes read so far."""

    def __init__(self, path: str):
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Hex."""
        return self._hash.hexdigest()

    @contextmanager
    def unpacked(self) -> Iterator[BinaryIO]:
        """The file's content, decompressed if it is compressed. Raises ValueError where it changes meanwhile or is cut off."""
        with self._open() as raw, io.BufferedReader(raw, _BUFFER) as packed:
            codec = codec_of(packed.peek(4)[:4])
            try:
                if codec is None:
                    yield packed
                else:
                    with io.BufferedReader(_Unpacked(packed, codec), _BUFFER) as stream:
                        yield stream
            except _Damaged as error:
                raise ValueError(
                    f"--input: {self.path} is cut off or damaged ({codec}: {error}): fetch or make it again"
                ) from error

    def read_through(self) -> None:
        """Count and hash the whole file; for kinds that are read out of order afterwards."""
        with self._open() as raw:
            while raw.read(_BUFFER):
                pass

    @contextmanager
    def _open(self) -> Iterator["_Counted"]:
        with open(self.path, "rb", buffering=0) as file:
            before = state_of(file.fileno())
            yield _Counted(file, self)
            if state_of(file.fileno()) != before:
                raise changed(self.path)

    def note_bytes(self, data: memoryview) -> None:
        self.size += len(data)
        self._hash.update(data)


class _Damaged(Exception):
    """Compressed bytes that cannot be unpacked."""


class _Counted(io.RawIOBase):
    def __init__(self, file: io.FileIO, owner: InputBytes):
        super().__init__()
        self._file, self._owner = file, owner

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._owner.note_bytes(memoryview(buffer)[:count])
        return count


class _Unpacked(io.RawIOBase):
    def __init__(self, packed: io.BufferedIOBase, codec: str):
        super().__init__()
        self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(packed, mode="r"), codec)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except OSError as error:
            if error.errno is not None:  # of the disk
                raise
            raise _Damaged(str(error)) from error
        buffer[: len(data)] = data
        return len(data)


def codec_of(head: bytes) -> str | None:
    """How a file that begins so is compressed; None: it is not."""
    return next((codec for magic, codec in CODECS.items() if head.startswith(magic)), None)


def head_of(path: str, size: int = 1 << 16) -> tuple[bytes, str | None]:
    """The first `size` bytes of a file's content, fewer if it has fewer or is damaged, and how it is compressed."""
    with open(path, "rb") as file:
        head = file.read(size)
        codec = codec_of(head)
        if codec is None:
            return head, None
        file.seek(0)
        content = b""
        with suppress(_Damaged), io.BufferedReader(_Unpacked(file, codec), _BUFFER) as stream:
            content = stream.read(size)
        return content, codec


def changed(path: str) -> ValueError:
    """The error for a file that is written to while it is read."""
    return ValueError(f"--input: {path} changed while it was read: wait for whoever writes it, then start again")


def state_of(file: str | int) -> tuple[int, ...]:
    """What changes when a file (its path, or the number of an open one) is written to or replaced."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
