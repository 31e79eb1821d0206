"""Token columns on disk: one float32 per token of a store, memory-mapped; they may grow, and need not be complete.

A column folder holds `values.bin` (float32 [num_tokens], sparse), `written.bin` (which stretches of it have values, each with a
checksum, as `integrity.STRETCH`; a stretch is there once its values are on disk, and never changes), `checksums.json` and
`manifest.json`, written first of all. Version 1, which is still read, has no stretches and is complete.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sstoken.files import json_text, read_json, require_size, write_json
from megatron_sstoken.integrity import STRETCH, checksum_of_text, read_stretches, stretch_of, write_checksums

MANIFEST, VALUES, WRITTEN = "manifest.json", "values.bin", "written.bin"
COLUMN_FORMAT, COLUMN_VERSION = "megatron_sstoken.token_column", 2
FIRST_VERSION = 1
_AGAIN = "delete the folder and compute the column again"


COLUMN_FOLDERS = ("history", "external", "chosen")
"""Beside prepared data, of columns of its tokens: losses, values of files, a choice over all data."""


def column_path(data: Path, folder: str, identity: dict[str, Any]) -> str:
    """Where in one of `COLUMN_FOLDERS` a column of prepared data lies that is named by its identity."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return str(data / folder / digest[:16])


def is_column(path: str | Path) -> bool:
    """Whether there is a column."""
    return (Path(path) / MANIFEST).is_file()


class TokenColumn:
    """One float32 per token of a store, in the order of its flat token stream; memory-mapped, as it is when it is opened.

    `manifest` is the identity its writer gave (any JSON object). Raises `ValueError` if the column is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(
                f"token column: {path} is missing or incomplete (no manifest.json): let its writer begin it"
            )
        content = read_json(file)
        self.version = _version_of(file, content)
        self.manifest: dict[str, Any] = content["identity"]
        self._num_values: int = content["num_values"]
        # What is written first is read last: no stretch is read without its values.
        stretches = np.array([(0, 4 * self._num_values, 0)], STRETCH)
        if self.version != FIRST_VERSION:
            require_size(self.path / WRITTEN, None, _AGAIN)
            stretches = np.sort(read_stretches(self.path / WRITTEN), order="start")
        self._starts, self._stops = stretches["start"] // 4, stretches["stop"] // 4
        require_size(self.path / VALUES, 4 * self._num_values, _AGAIN)
        # an empty file cannot be mapped
        empty = np.empty(0, dtype=np.float32)
        self._values = np.memmap(self.path / VALUES, np.float32, mode="r") if self._num_values else empty

    def __len__(self) -> int:
        return self._num_values

    def holds(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """bool [n]: whether flat tokens [start, stop), int64 [n] each, were written, all of them at once."""
        if not len(self._starts):
            return np.zeros(len(start), dtype=bool)
        last = np.searchsorted(self._starts, start, side="right") - 1
        return (last >= 0) & (self._stops[last] >= stop)

    def values(self, start: int, stop: int) -> np.ndarray:
        """Values float32 [stop - start] of the flat tokens [start, stop), read-only; NaN where none was written."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"values [{start}, {stop}) of a column of {len(self)}: {self.path}")
        first = int(np.searchsorted(self._stops, start, side="right"))
        last = int(np.searchsorted(self._starts, stop, side="left"))
        known = np.asarray(self._values)
        if last - first == 1 and self._starts[first] <= start and stop <= self._stops[first]:
            found = known[start:stop]
        else:
            found = np.full(stop - start, np.nan, dtype=np.float32)
            for a, b in zip(self._starts[first:last], self._stops[first:last], strict=True):
                a, b = max(int(a), start), min(int(b), stop)
                found[a - start : b - start] = known[a:b]
        found.flags.writeable = False
        return found

    def require(self, identity: dict[str, Any]) -> None:
        """ValueError naming what differs, with both values, if the column's identity is another one."""
        if mismatch := describe_mismatch(identity, self.manifest):
            raise ValueError(f"token column: {self.path} does not match: {mismatch}: move it away to compute it again")


class TokenColumnWriter:
    """Writes values to a token column from one process, the first or some more; they count from `commit` on.

    `identity` is any JSON object that tells this column from others; `num_values` is its length. Raises `ValueError`
    naming what differs if a column with another identity is in the way. A context manager.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], num_values: int):
        self.path = Path(path)
        self._num_values = num_values
        header = {
            "format": COLUMN_FORMAT,
            "format_version": COLUMN_VERSION,
            "num_values": num_values,
            "identity": identity,
        }
        self._header = json.loads(json.dumps(header))
        if (self.path / MANIFEST).exists():
            self._require_same()
        else:
            self._create()
        self._pending: list[np.ndarray] = []
        self._values = open(self.path / VALUES, "r+b")  # noqa: SIM115 (open until `close`)
        self._written = open(self.path / WRITTEN, "ab")  # noqa: SIM115
        size = os.fstat(self._written.fileno()).st_size
        self._written.truncate(size - size % STRETCH.itemsize)

    def _create(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        if (self.path / "progress.json").exists():
            raise ValueError(
                f"token column: {self.path} was left unfinished by an earlier version, which wrote from start to end: {_AGAIN}"
            )
        with open(self.path / VALUES, "wb") as values:
            values.truncate(4 * self._num_values)
        (self.path / WRITTEN).write_bytes(b"")
        described = checksum_of_text(json_text(self._header))
        grows = {"size": 4 * self._num_values, "stretches": WRITTEN}
        write_checksums(self.path, {VALUES: grows, MANIFEST: described})
        write_json(self.path / MANIFEST, self._header)

    def _require_same(self) -> None:
        file = self.path / MANIFEST
        content = read_json(file)
        _version_of(file, content)
        if mismatch := describe_mismatch(self._header, content):
            raise ValueError(
                f"token column: {self.path} holds another column: {mismatch}: move it or take another path"
            )
        for name, size in ((VALUES, 4 * self._num_values), (WRITTEN, None)):
            require_size(self.path / name, size, _AGAIN)

    def write(self, start: int, values: np.ndarray) -> None:
        """Write values float32 [n] of the flat tokens from `start` on; ValueError beyond the column. Each token once."""
        assert values.dtype == np.float32 and values.ndim == 1, (values.dtype, values.shape)
        if not 0 <= start <= start + values.size <= self._num_values:
            raise ValueError(
                f"token column: {self.path} takes {self._num_values} values, and {values.size} are given from {start} on"
            )
        data = values.tobytes()
        self._values.seek(4 * start)
        self._values.write(data)
        self._pending.append(stretch_of(4 * start, data))

    def commit(self) -> None:
        """Make everything written so far durable: the values, then which they are."""
        self._values.flush()
        os.fsync(self._values.fileno())
        self._written.write(b"".join(one.tobytes() for one in self._pending))
        self._written.flush()
        os.fsync(self._written.fileno())
        self._pending.clear()

    def close(self) -> None:
        """Release the files; values written after the last `commit` do not count."""
        self._values.close()
        self._written.close()

    def __enter__(self) -> "TokenColumnWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def describe_mismatch(expected: dict[str, Any], found: dict[str, Any]) -> str | None:
    """The keys in which two JSON objects differ, with both values (nested keys dotted); None if equal."""
    absent = object()

    def differences(left: dict[str, Any], right: dict[str, Any], prefix: str) -> list[str]:
        lines = []
        for key in dict.fromkeys([*left, *right]):
            ours, theirs = left.get(key, absent), right.get(key, absent)
            if isinstance(ours, dict) and isinstance(theirs, dict):
                lines += differences(ours, theirs, f"{prefix}{key}.")
            elif ours != theirs:
                shown = ["absent" if value is absent else repr(value) for value in (ours, theirs)]
                lines.append(f"{prefix}{key} is {shown[1]}, must be {shown[0]}")
        return lines

    return "; ".join(differences(expected, found, "")) or None


def _version_of(file: Path, content: dict[str, Any]) -> int:
    """The version of a column; ValueError if this is none that is read."""
    found = (content.get("format"), content.get("format_version"))
    if found[0] != COLUMN_FORMAT or found[1] not in (FIRST_VERSION, COLUMN_VERSION):
        raise ValueError(
            f"token column: {file} has format {found[0]} version {found[1]}, this version reads "
            f"{COLUMN_FORMAT} versions {FIRST_VERSION} and {COLUMN_VERSION}: move the folder away and compute the column again"
        )
    return int(found[1])
