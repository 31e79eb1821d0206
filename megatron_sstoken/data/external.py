"""Scores, masks and weights of tokens from Parquet files, as token records hold them, made into token columns.

A row speaks of one token: `sample` (row number of the input), `position` in it, and any of `score`, `selected` and `weight`.
Where there is a `token`, it must be that of the data. Null says nothing; other columns are not read.
"""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sstoken.data.store import SampleStore
from megatron_sstoken.files import naming
from megatron_sstoken.integrity import checksum_of

DATA_KEY = b"megatron_sstoken.data"
"""Key of the Parquet metadata under which token records say of which data they are: its fingerprint."""
VALUES = ("score", "selected", "weight")
"""What a row may tell of its token."""
BATCH_ROWS = 1 << 18
_Rows: TypeAlias = dict[str, np.ndarray]
"""Columns of one length."""
_KINDS: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "sample": (pa.types.is_integer, "whole numbers"),
    "position": (pa.types.is_integer, "whole numbers"),
    "token": (pa.types.is_integer, "whole numbers"),
    "score": (lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind), "numbers"),
    "selected": (pa.types.is_boolean, "true or false"),
    "weight": (lambda kind: pa.types.is_floating(kind) or pa.types.is_integer(kind), "numbers"),
}


@dataclass(frozen=True)
class ExternalFiles:
    """Parquet files whose columns have been looked at, and none of their rows."""

    paths: tuple[Path, ...]
    values: frozenset[str]
    """Which of `VALUES` all of them have."""

    def checksums(self) -> list[str]:
        """Of the files, in order; reads them whole."""
        return [str(checksum_of(path)["xxh3_128"]) for path in self.paths]

    @property
    def num_rows(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.paths)


def open_external(name: str, data_fingerprint: str) -> ExternalFiles:
    """A Parquet file, all those of a folder, or those of a pattern.

    Raises ValueError where there are none, where one is no Parquet file, lacks a column or has one of another type, or says
    that it is of other data than that with this fingerprint.
    """
    if os.path.isdir(name):
        paths = sorted(Path(name).glob("*.parquet"))
    else:
        paths = [Path(name)] if os.path.isfile(name) else sorted(map(Path, glob.glob(name)))
    if not paths:
        problem = "holds no *.parquet file" if os.path.isdir(name) else "does not exist"
        raise ValueError(
            f"{name} {problem}: name a Parquet file, a folder of them, or a pattern such as 'runs/*.parquet'"
        )
    values = [_values_of(path, data_fingerprint) for path in paths]
    return ExternalFiles(tuple(paths), frozenset.intersection(*values))


def _values_of(path: Path, data_fingerprint: str) -> frozenset[str]:
    """The columns of `VALUES` that a file has. Raises ValueError as `open_external`."""
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): name another file"
        ) from error
    for column in ("sample", "position"):
        if column not in schema.names:
            raise ValueError(f"{path} has no column {column}: it needs sample and position (README, Token records)")
    for column, (fits, kind) in _KINDS.items():
        if column in schema.names and not fits(schema.field(column).type):
            raise ValueError(f"{path}: column {column} is {schema.field(column).type}: make it {kind}")
    found = frozenset(VALUES) & frozenset(schema.names)
    if not found:
        raise ValueError(f"{path} has neither score nor selected nor weight: it needs one of these columns")
    of_data = (schema.metadata or {}).get(DATA_KEY)
    if of_data is not None and of_data.decode() != data_fingerprint:
        raise ValueError(
            f"{path} is of other data than data.train (by its fingerprint): score this data, or name another"
        )
    return found


class _Faults:
    """Rows that cannot be right: how many of each kind, and the first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def without(self, wrong: np.ndarray, rows: _Rows, kind: str) -> _Rows:
        """The rows that are not wrong (bool [n])."""
        if number := int(np.count_nonzero(wrong)):
            count, example = self._found.get(kind, (0, ""))
            at = int(wrong.argmax())
            example = example or f"sample {rows['sample'][at]}, position {rows['position'][at]}"
            self._found[kind] = (count + number, example)
        return _of(rows, ~wrong)

    def require_none(self, owner: str) -> None:
        """Raise ValueError that tells them all."""
        if self._found:
            told = "; ".join(f"{count:,} {kind} (first: {example})" for kind, (count, example) in self._found.items())
            raise ValueError(f"{owner}: {told}: mend the file, or name the one of this data")


def fill_values(
    files: ExternalFiles, value: str, store: SampleStore, column: np.ndarray, count: Callable[[int], None]
) -> tuple[int, int]:
    """Put one of `VALUES` of all rows where their tokens lie in a column of the store (float32 [num_tokens], all NaN).

    `selected` becomes 1 and 0. Reads the files in batches of rows, telling `count` of their numbers. A row of the input that
    the store holds several times has the values in all places. Returns how many response tokens with a loss have a value,
    and how many values of other tokens were ignored. Raises ValueError for rows of other data (a sample, position or token
    that the store does not hold), tokens named twice, scores that are NaN, weights that are negative or not finite, and
    where no response token has a value.
    """
    faults, roles = _Faults(), store.role_stream
    filled = ignored = 0
    for path in files.paths:
        with naming(path), pq.ParquetFile(path, buffer_size=1 << 20) as file:
            names = ["sample", "position", value, *(["token"] if "token" in file.schema_arrow.names else [])]
            for batch in file.iter_batches(BATCH_ROWS, columns=names, use_threads=False):
                count(len(batch))
                rows = _located(_rows_of(batch, value), store, faults)
                eligible = (rows["position"] > 0) & (roles[rows["place"]] == 1)
                others = rows["value"][~eligible]
                ignored += int(np.count_nonzero(others)) if value == "selected" else len(others)
                filled += _put(_of(rows, eligible), value, column, faults)
    owner = f"selection.external: {files.paths[0]}" + (f" and {len(files.paths) - 1} more" if files.paths[1:] else "")
    faults.require_none(owner)
    if not filled:
        raise ValueError(f"{owner}: no response token of the data has a {value}: name a file that tells it")
    return filled, ignored


def _of(rows: _Rows, index: np.ndarray) -> _Rows:
    """Some of the rows, by a mask or by numbers."""
    return {name: values[index] for name, values in rows.items()}


def _rows_of(batch: pa.RecordBatch, value: str) -> _Rows:
    """The rows of a batch that have the value: `sample`, `position`, `value` and, if there is one, `token`."""
    told = batch.filter(batch.column(value).is_valid())
    rows = {"value": told.column(value).cast(pa.float64()).to_numpy(zero_copy_only=False).astype(np.float32)}
    for name in told.schema.names:
        if name != value:  # null is refused as what the data does not hold
            rows[name] = told.column(name).cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)
    return rows


def _located(rows: _Rows, store: SampleStore, faults: _Faults) -> _Rows:
    """With `place` in the store's token stream and the number of `copies` of their input row there, once for each copy."""
    first = np.searchsorted(store.rows, rows["sample"])
    unknown = store.rows[np.minimum(first, len(store) - 1)] != rows["sample"]
    rows = faults.without(unknown, rows | {"first": first}, "rows name a sample that data.train does not hold")
    outside = (rows["position"] < 0) | (rows["position"] >= store.lengths[rows["first"]])
    rows = faults.without(outside, rows, "rows name a position outside their sample")
    copies = np.searchsorted(store.rows, rows["sample"], side="right") - rows["first"]
    rows = _of(rows | {"copies": copies}, np.repeat(np.arange(len(copies)), copies))
    number = np.arange(int(copies.sum())) - np.repeat(np.cumsum(copies) - copies, copies)
    rows["place"] = store.offsets[rows["first"] + number] + rows["position"]
    if "token" not in rows:
        return rows
    return faults.without(
        store.token_stream[rows["place"]] != rows["token"], rows, "rows hold another token than data.train"
    )


def _put(rows: _Rows, value: str, column: np.ndarray, faults: _Faults) -> int:
    """Write values of response tokens into the column; how many were not there before."""
    values = rows["value"]
    bad = ~np.isfinite(values) | (values < 0) if value == "weight" else np.isnan(values)
    rows = faults.without(bad, rows, "weights are negative or not finite" if value == "weight" else f"{value}s are NaN")
    place = rows["place"]
    order = np.argsort(place, kind="stable")
    again = ~np.isnan(column[place])
    again[order[1:]] |= np.diff(place[order]) == 0
    # Records of a row that the data repeats have it as often.
    faults.without(again & (rows["copies"] == 1), rows, "rows name a token that another row names")
    column[place] = rows["value"]
    return int(np.count_nonzero(~again))
