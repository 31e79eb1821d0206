"""Files of token records, read batch by batch: what is held at once does not grow with the number of tokens."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sstoken.data.external import DATA_KEY

Columns: TypeAlias = dict[str, np.ndarray]
"""Columns of one length, a row per token; undefined numbers are NaN."""

BATCH_ROWS = 1 << 16
LONGEST = 1 << 20
"""Rows in a row that can be one sample: what goes on is taken for another, so that no file fills the memory."""
LARGEST_TOKEN = 1 << 24
TEXT = "text"

_WHOLE = ("sample", "position", "token", "role")
_NUMBERS = ("loss", "history_loss", "rel_norm", "attention", "score", "weight", "entropy", "top1")
_REQUIRED = (*_WHOLE, "loss", "selected")
_STEP = re.compile(r"step_(\d+)\.parquet")


@dataclass(frozen=True)
class RecordFile:
    """A Parquet file whose columns have been looked at, and none of its rows."""

    path: Path
    step: int
    """Of its name; 0 where the name has none."""
    columns: frozenset[str]
    num_rows: int
    data_fingerprint: str | None
    names_step: bool = True
    watched: bool = False
    """Holds the same samples as the files of other steps beside it."""


def find_records(path: str | Path, *, watched: bool = False) -> list[RecordFile]:
    """A Parquet file, or those of a folder, ascending by step and name. ValueError for what holds no token records."""
    place = Path(path)
    paths = sorted(place.glob("*.parquet")) if place.is_dir() else [place]
    if not paths or not paths[0].is_file():
        problem = "holds no *.parquet file" if place.is_dir() else "is not there"
        raise ValueError(f"token records: {place} {problem}: name a file of them, or a folder of such files")
    return sorted((_open(one, watched) for one in paths), key=lambda one: (one.step, one.path.name))


def _open(path: Path, watched: bool) -> RecordFile:
    try:
        metadata = pq.read_metadata(path)
        schema = metadata.schema.to_arrow_schema()
    except pa.ArrowInvalid as error:
        raise ValueError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}): name another file"
        ) from error
    if missing := [name for name in _REQUIRED if name not in schema.names]:
        raise ValueError(f"{path} has no column {missing[0]}: it does not hold token records (docs/report.md)")
    for name in schema.names:
        if name in (*_WHOLE, *_NUMBERS, "selected") and not _fits(name, schema.field(name).type):
            raise ValueError(f"{path}: column {name} is {schema.field(name).type}: it does not hold token records")
    names = frozenset(schema.names)
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    if TEXT in names and (not _is_text(schema.field(TEXT).type) or all(_is_null(group, TEXT) for group in groups)):
        names -= {TEXT}
    number = _STEP.fullmatch(path.name)
    of_data = (schema.metadata or {}).get(DATA_KEY)
    return RecordFile(
        path=path,
        step=int(number[1]) if number else 0,
        names_step=number is not None,
        columns=names,
        num_rows=metadata.num_rows,
        data_fingerprint=of_data.decode() if of_data else None,
        watched=watched,
    )


def _chunk(group: pq.RowGroupMetaData, name: str) -> pq.ColumnChunkMetaData:
    columns = map(group.column, range(group.num_columns))
    return next(one for one in columns if one.path_in_schema == name)


def _is_null(group: pq.RowGroupMetaData, name: str) -> bool:
    """Whether the statistics say that a row group has no value in a column."""
    chunk = _chunk(group, name)
    statistics = chunk.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == chunk.num_values


def _fits(name: str, kind: pa.DataType) -> bool:
    if name == "selected":
        return pa.types.is_boolean(kind)
    return pa.types.is_integer(kind) or (name in _NUMBERS and pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def data_fingerprint(files: Iterable[RecordFile]) -> str | None:
    """Of the data that the records are of; None if they do not say. ValueError where they are of different data."""
    found = {one.data_fingerprint: one.path for one in files if one.data_fingerprint is not None}
    if len(found) > 1:
        first, second, *_ = found.values()
        raise ValueError(f"token records: {first} and {second} are of different data: name those of one")
    return next(iter(found), None)


def batches(file: RecordFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """The columns of `names` that the file has, `BATCH_ROWS` rows at a time. ValueError for a damaged file."""
    wanted = [name for name in names if name in file.columns]
    with open(file.path, "rb") as stream:
        try:
            # A buffer of its own for each column: a row group may be larger than the memory.
            reader = pq.ParquetFile(stream, buffer_size=1 << 16, read_dictionary=[TEXT] if TEXT in wanted else None)
            yield from reader.iter_batches(batch_size=BATCH_ROWS, columns=wanted, use_threads=False)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # of the disk
                raise
            raise ValueError(
                f"{file.path} is damaged ({str(error).splitlines()[0]}): fetch or make it again"
            ) from error


def token_ids(files: Iterable[RecordFile]) -> np.ndarray:
    """All ids that occur, ascending."""
    found: np.ndarray = np.empty(0, dtype=np.int32)
    for file in files:
        for batch in batches(file, ["token"]):
            found = np.union1d(found, _columns(batch, ["token"], file.path)["token"])
    return found


def whole_samples(file: RecordFile, names: Sequence[str]) -> Iterator[tuple[Columns, np.ndarray]]:
    """Rows in order, no sample cut, and where each sample begins (int64, ascending from 0).

    The columns are those of `names`, absent ones as NaN.
    """
    held: Columns = {}
    for batch in batches(file, names):
        if not batch.num_rows:
            continue
        columns = _columns(batch, names, file.path)
        if held:
            columns = {name: np.concatenate([held[name], columns[name]]) for name in columns}
        starts = starts_of(columns)
        last = int(starts[-1]) if len(columns["sample"]) - starts[-1] < LONGEST else len(columns["sample"])
        held = {name: values[last:] for name, values in columns.items()}
        if last:
            yield {name: values[:last] for name, values in columns.items()}, starts[starts < last]
    if held and len(held["sample"]):
        yield held, starts_of(held)


def starts_of(columns: Columns) -> np.ndarray:
    """Where samples begin, int64, ascending from 0: where `sample` changes or `position` goes back."""
    sample, position = columns["sample"], columns["position"]
    begins = (sample[1:] != sample[:-1]) | (position[1:] < position[:-1])
    return np.concatenate([[0], np.flatnonzero(begins) + 1])


def _columns(batch: pa.RecordBatch, names: Sequence[str], path: Path) -> Columns:
    found: Columns = {}
    for name in names:
        if name not in batch.schema.names:
            found[name] = np.full(batch.num_rows, np.nan, dtype=np.float32)
            continue
        values: Any = batch.column(name)
        if name in (*_WHOLE, "selected") and values.null_count:
            raise ValueError(f"{path}: column {name} has a null: it does not hold token records")
        array = values.to_numpy(zero_copy_only=False)
        found[name] = array.astype(np.float32) if name in _NUMBERS else array
    tokens = found.get("token", np.empty(0))
    if tokens.size and (tokens.min() < 0 or tokens.max() >= LARGEST_TOKEN):
        wrong = int(tokens.min()) if tokens.min() < 0 else int(tokens.max())
        raise ValueError(f"{path}: token {wrong} is no token id: it does not hold token records")
    return found


def without_repeats(columns: Columns) -> Columns:
    """The rows without those of a sample that one batch holds twice: in the file they stand beside each other."""
    sample, position = columns["sample"], columns["position"]
    again = np.concatenate([[False], (sample[1:] == sample[:-1]) & (position[1:] == position[:-1])])
    return {name: values[~again] for name, values in columns.items()} if again.any() else columns


def response_of(columns: Columns) -> np.ndarray:
    """bool [n]: the tokens that selection is about: of responses, with a loss (a first token has none)."""
    return (columns["role"] == 1) & ~np.isnan(columns["loss"])


def score_range(files: Iterable[RecordFile]) -> tuple[float, float] | None:
    """Lowest and highest finite score of all files; None: there is none.

    From the statistics that Parquet keeps, or from the rows.
    """
    low, high = np.inf, -np.inf
    for file in files:
        if "score" not in file.columns:
            continue
        known = _range_in_statistics(file)
        for first, last in known if known is not None else _range_in_rows(file):
            low, high = min(low, first), max(high, last)
    return (float(low), float(high)) if low <= high else None


def _range_in_statistics(file: RecordFile) -> list[tuple[float, float]] | None:
    metadata = pq.read_metadata(file.path)
    found = []
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        if _is_null(group, "score"):
            continue
        statistics = _chunk(group, "score").statistics
        if statistics is None or not statistics.has_min_max:
            return None
        if not np.isfinite([statistics.min, statistics.max]).all():
            return None
        found.append((statistics.min, statistics.max))
    return found


def _range_in_rows(file: RecordFile) -> Iterator[tuple[float, float]]:
    for batch in batches(file, ["score"]):
        values = batch.column("score").to_numpy(zero_copy_only=False)
        finite = values[np.isfinite(values)]
        if finite.size:
            yield finite.min(), finite.max()
