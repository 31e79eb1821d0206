"""Token columns on disk: one float32 per token of a store, memory-mapped.

A column folder holds `values.bin` (float32 [num_tokens]), `checksums.json`, and `manifest.json`, written last.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sstoken.files import json_text, read_json, require_size, write_json
from megatron_sstoken.integrity import checksum_of, checksum_of_text, write_checksums

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
COLUMN_FORMAT, COLUMN_VERSION = "megatron_sstoken.token_column", 1


class TokenColumn:
    """One float32 per token of a store, in the order of its flat token stream; memory-mapped.

    `manifest` is the identity its writer gave (any JSON object). Raises `ValueError` if the column is
    missing, incomplete or truncated.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        file = self.path / MANIFEST
        if not file.is_file():
            raise ValueError(
                f"token column: {path} is missing or incomplete (no manifest.json): let its writer finish it"
            )
        content = read_json(file)
        _check_column_format(file, content)
        self.manifest: dict[str, Any] = content["identity"]
        self._num_values: int = content["num_values"]
        require_size(self.path / "values.bin", 4 * self._num_values, "delete the folder and compute the column again")
        # an empty file cannot be mapped
        empty = np.empty(0, dtype=np.float32)
        self._values = np.memmap(self.path / "values.bin", np.float32, mode="r") if self._num_values else empty

    def __len__(self) -> int:
        return self._num_values

    def values(self, start: int, stop: int) -> np.ndarray:
        """Values float32 [stop - start] of the flat tokens [start, stop), a read-only view."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"values [{start}, {stop}) of a column of {len(self)}: {self.path}")
        view = np.asarray(self._values)[start:stop]
        view.flags.writeable = False
        return view

    def require(self, identity: dict[str, Any]) -> None:
        """ValueError naming what differs, with both values, if the column's identity is another one."""
        if mismatch := describe_mismatch(identity, self.manifest):
            raise ValueError(f"token column: {self.path} does not match: {mismatch}: move it away to compute it again")


class TokenColumnWriter:
    """Appends values to a token column from one process; if stopped, it resumes at the last `commit`.

    `identity` is any JSON object that tells this column from others; `num_values` is how many values it will
    have. Raises `ValueError` naming what differs if a column with another identity is in the way.
    `num_written` is the number of values that are durable. A context manager.
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
        self.path.mkdir(parents=True, exist_ok=True)
        self._finished = (self.path / MANIFEST).exists()
        self.num_written = self._resume()
        self._num_appended = self.num_written
        self._file = open(self.path / "values.bin", "ab")  # noqa: SIM115 (open until `close`)
        self._file.truncate(4 * self.num_written)

    def _resume(self) -> int:
        """Values of an earlier writer that count."""
        file = self.path / (MANIFEST if self._finished else PROGRESS)
        if not file.exists():
            return 0
        content = read_json(file)
        _check_column_format(file, content)
        found = {key: value for key, value in content.items() if key != "num_written"}
        if mismatch := describe_mismatch(self._header, found):
            raise ValueError(
                f"token column: {self.path} holds another column: {mismatch}: move it or take another path"
            )
        num_written = self._num_values if self._finished else content["num_written"]
        values = self.path / "values.bin"
        size = values.stat().st_size if values.exists() else 0
        if size < 4 * num_written:
            raise ValueError(
                f"token column: {values} has {size} bytes where {4 * num_written} were committed: "
                "delete the folder and compute the column again"
            )
        return num_written

    def append(self, values: np.ndarray) -> None:
        """Append values float32 [n]; durable after the next `commit`. ValueError beyond `num_values`."""
        assert values.dtype == np.float32 and values.ndim == 1, (values.dtype, values.shape)
        if self._num_appended + values.size > self._num_values:
            raise ValueError(
                f"token column: {self.path} takes {self._num_values} values, "
                f"{self._num_appended} are there and {values.size} more are given"
            )
        self._file.write(values.tobytes())
        self._num_appended += values.size

    def commit(self) -> None:
        """Make everything appended so far durable."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if not self._finished:
            write_json(self.path / PROGRESS, {**self._header, "num_written": self._num_appended})
        self.num_written = self._num_appended

    def finish(self) -> None:
        """Complete the column; it can be opened from now on. ValueError if values are missing."""
        self.commit()
        if self.num_written != self._num_values:
            raise ValueError(
                f"token column: {self.path} has {self.num_written} of {self._num_values} values: append more"
            )
        self.close()
        values = self.path / "values.bin"
        described = checksum_of_text(json_text(self._header))
        write_checksums(self.path, {values.name: checksum_of(values), MANIFEST: described})
        write_json(self.path / MANIFEST, self._header)
        (self.path / PROGRESS).unlink(missing_ok=True)
        self._finished = True

    def close(self) -> None:
        """Release the file without finishing; values appended after the last `commit` do not count."""
        self._file.close()

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


def _check_column_format(file: Path, content: dict[str, Any]) -> None:
    found = (content.get("format"), content.get("format_version"))
    if found != (COLUMN_FORMAT, COLUMN_VERSION):
        raise ValueError(
            f"token column: {file} has format {found[0]} version {found[1]}, this version reads "
            f"{COLUMN_FORMAT} version {COLUMN_VERSION}: move the folder away and compute the column again"
        )
