"""Token records made by hand, as files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sstoken.data.external import DATA_KEY
from megatron_sstoken.training.records import SCHEMA

UNDEFINED = float("nan")


@dataclass(frozen=True)
class Token:
    """One row, but for sample and position."""

    token: int = 0
    role: int = 1
    loss: float = 1.0
    history_loss: float = UNDEFINED
    score: float = UNDEFINED
    selected: bool = True
    text: str | None = None


def write_file(
    path: Path,
    samples: Sequence[tuple[int, Sequence[Token]]],
    *,
    fingerprint: str | None = None,
    row_group_size: int | None = None,
) -> Path:
    """Records of samples, (number, tokens from position 0), in this order; context and a first token have no loss."""
    rows = [(sample, place, token) for sample, tokens in samples for place, token in enumerate(tokens)]
    return write_rows(path, rows, fingerprint=fingerprint, row_group_size=row_group_size)


def write_rows(
    path: Path,
    rows: Sequence[tuple[int, int, Token]],
    *,
    fingerprint: str | None = None,
    row_group_size: int | None = None,
) -> Path:
    """Records of rows (sample, position, token)."""
    response = np.array([token.role == 1 and place > 0 for _, place, token in rows], dtype=bool)
    columns: dict[str, np.ndarray] = {
        "sample": np.array([sample for sample, _, _ in rows], dtype=np.int64),
        "position": np.array([place for _, place, _ in rows], dtype=np.int32),
        **{
            name: np.array([getattr(token, name) for _, _, token in rows])
            for name in ("token", "role", "loss", "history_loss", "score")
        },
    }
    for name in ("loss", "history_loss", "score"):
        columns[name] = np.where(response, columns[name], np.nan)
    columns["selected"] = response & np.array([token.selected for _, _, token in rows], dtype=bool)
    undefined = np.full(len(rows), np.nan)
    arrays = [
        pa.array([token.text for _, _, token in rows], pa.string()).dictionary_encode().cast(field.type)
        if field.name == "text"
        else pa.array(columns.get(field.name, undefined), from_pandas=True).cast(field.type)
        for field in SCHEMA
    ]
    schema = SCHEMA.with_metadata({DATA_KEY: fingerprint} if fingerprint else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, row_group_size=row_group_size)
    return path
