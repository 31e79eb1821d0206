"""Checksums: `checksums.json` in a folder says what its files held when they were written.

It is written once, with the folder. `FileCheck` compares in the background while work goes on; `damage` compares at once.
xxh3 is as fast as memory, so that reading the files is what takes time.

A file that grows has a list of its stretches beside it, each with a checksum of its own: what is written once never changes.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_sstoken.files import json_text, write_json

CHECKSUMS = "checksums.json"
_ALGORITHM = "xxh3_128"
_BLOCK = 1 << 20

Checksums = dict[str, dict[str, Any]]
"""Name of a file relative to its folder → `size` in bytes and `xxh3_128` in hex; or, of a file that grows within that size,
`stretches`: the name of the list of its stretches."""

STRETCH = np.dtype([("start", "<i8"), ("stop", "<i8"), ("xxh3_64", "<u8")])
"""Bytes [start, stop) of a file, and their checksum."""


def read_stretches(path: Path) -> np.ndarray:
    """The list of stretches in a file, in the order in which they were written, as `STRETCH`.

    Half an entry at the end, which a kill has left, does not count.
    """
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) - len(data) % STRETCH.itemsize], STRETCH)


def keep_stretches(path: Path, number: int) -> None:
    """Cut a list of stretches to its first `number`, durably."""
    with open(path, "r+b") as file:
        file.truncate(number * STRETCH.itemsize)
        os.fsync(file.fileno())


def stretch_of(start: int, data: bytes) -> np.ndarray:
    """The `STRETCH` of the bytes that begin at `start`."""
    return np.array((start, start + len(data), xxhash.xxh3_64_intdigest(data)), STRETCH)


def differing_stretches(
    path: Path, stretches: np.ndarray, count: Callable[[int], None] = lambda size: None
) -> list[str]:
    """A line, if there is a stretch of a file whose bytes are not those that were written; `count` as in `checksum_of`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        for one in np.sort(stretches, order="start"):
            start, stop = int(one["start"]), int(one["stop"])
            digest, intact = xxhash.xxh3_64(), 0 <= start <= stop <= size
            while intact and start < stop and (block := os.pread(descriptor, min(_BLOCK, stop - start), start)):
                digest.update(block)
                start += len(block)
                count(len(block))
            if not intact or digest.intdigest() != int(one["xxh3_64"]):
                return [f"{path} is damaged: its bytes {int(one['start'])} to {stop} are not those that were written"]
    finally:
        os.close(descriptor)
    return []


def checksum_of(path: Path, count: Callable[[int], None] = lambda size: None) -> dict[str, Any]:
    """Size and checksum of a file as it is on disk; `count` is told of every block of bytes that was read."""
    digest, size = xxhash.xxh3_128(), 0
    block = memoryview(bytearray(_BLOCK))  # one for all: to get new memory takes longer than to read into it
    with open(path, "rb", buffering=0) as file:
        while length := file.readinto(block):
            digest.update(block[:length])
            size += length
            count(length)
    return {"size": size, _ALGORITHM: digest.hexdigest()}


def checksum_of_text(text: str) -> dict[str, Any]:
    """What `checksum_of` gives for a file that holds `text` in UTF-8."""
    data = text.encode()
    return {"size": len(data), _ALGORITHM: xxhash.xxh3_128(data).hexdigest()}


def write_checksums(folder: Path, checksums: Checksums) -> None:
    """Say what the files of a folder hold."""
    files = dict(sorted(checksums.items()))
    write_json(folder / CHECKSUMS, {"of_this_list": _of_list(files), "files": files})


def read_checksums(folder: Path) -> Checksums | None:
    """What the files of a folder should hold; None where nothing says so. Raises ValueError where that itself is damaged."""
    path = folder / CHECKSUMS
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        files: Checksums = content["files"]
        intact = content["of_this_list"] == _of_list(files) and text == json_text(content)
        intact &= all(isinstance(one["size"], int) and isinstance(_means(one), str) for one in files.values())
        names = [*files, *(one["stretches"] for one in files.values() if "stretches" in one)]
        outside = [name for name in names if Path(name).is_absolute() or ".." in Path(name).parts]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__})") from error
    if not intact or outside:
        raise ValueError(f"{path} is damaged")
    return files


def _means(checksum: dict[str, Any]) -> Any:
    """What a file is compared with: its checksum, or the list of its stretches."""
    return checksum["stretches"] if "stretches" in checksum else checksum[_ALGORITHM]


def _of_list(files: Checksums) -> str:
    return xxhash.xxh3_128(json.dumps(files, sort_keys=True).encode()).hexdigest()


def damage(folder: Path) -> list[str]:
    """What is wrong with the files of a folder that have a checksum, one line each."""
    try:
        return differing(folder, read_checksums(folder) or {})
    except ValueError as error:
        return [str(error)]


def differing(folder: Path, checksums: Checksums, count: Callable[[int], None] = lambda size: None) -> list[str]:
    """Which of these files of a folder are not as they were written, one line each; `count` as in `checksum_of`."""
    found = []
    for name, expected in checksums.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                found.append(f"{path} has {size} bytes, and had {expected['size']} when it was written")
            elif "stretches" in expected:
                found += differing_stretches(path, read_stretches(folder / expected["stretches"]), count)
            elif checksum_of(path, count) != expected:
                found.append(f"{path} is damaged: its bytes are not those that were written")
        except FileNotFoundError:
            found.append(f"{path} is missing")
        except OSError as error:
            found.append(f"{path} cannot be read ({error.strerror})")
    return found


@dataclass(frozen=True)
class Checked:
    """Files of one folder that are to be compared."""

    owner: str
    """The setting that names the folder, for messages."""
    folder: Path
    remedy: str
    """What to do where a file is damaged."""
    checksums: Checksums

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.checksums)

    @property
    def size(self) -> int:
        """Bytes of all of them."""
        return sum(one["size"] for one in self.checksums.values())

    def damage(self) -> list[str]:
        """One message for each file that is not as it was written."""
        return [f"{self.owner}: {problem}: {self.remedy}" for problem in differing(self.folder, self.checksums)]


def files_to_check(
    owner: str,
    folder: Path,
    remedy: str,
    *,
    share: tuple[int, int] = (0, 1),
    wanted: Callable[[str], bool] = lambda name: True,
) -> Checked:
    """The files of a folder that have a checksum, or the share (number, of how many) that this process compares.

    Of a folder without checksums there are none. Raises ValueError where `checksums.json` is damaged.
    """
    try:
        checksums = read_checksums(folder) or {}
    except ValueError as error:
        raise ValueError(f"{owner}: {error}: {remedy}") from error
    by_size = sorted((name for name in checksums if wanted(name)), key=lambda name: (-checksums[name]["size"], name))
    return Checked(owner, folder, remedy, {name: checksums[name] for name in by_size[share[0] :: share[1]]})


class FileCheck:
    """Compares files in a thread of its own; `problems` grows while it does."""

    def __init__(self, parts: Sequence[Checked], *, known: Sequence[str] = ()):
        """`known`: problems that were found before."""
        self.problems: list[str] = list(known)
        self._parts = parts
        self._thread = threading.Thread(target=self._compare, name="checksums", daemon=True)
        self._thread.start()

    def _compare(self) -> None:
        for part in self._parts:
            self.problems += part.damage()

    def wait(self) -> list[str]:
        """All problems, once every file has been compared."""
        self._thread.join()
        return self.problems
