"""Token records: what selection saw and did, one row per token, as Parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from megatron_sstoken.files import partial_path, publish_file
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.step import TokenReport

SCHEMA = pa.schema(
    [
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("position", pa.int32(), nullable=False),
        pa.field("token", pa.int32(), nullable=False),
        pa.field("role", pa.int8(), nullable=False),
        pa.field("loss", pa.float32()),
        pa.field("history_loss", pa.float32()),
        pa.field("rel_norm", pa.float32()),
        pa.field("attention", pa.float32()),
        pa.field("score", pa.float32()),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("entropy", pa.float32()),
        pa.field("top1", pa.float32()),
    ]
)
"""`sample` is the row number in the input, `role` 0 context and 1 response; NaN never appears: undefined is null."""


def columns_of(report: TokenReport) -> dict[str, np.ndarray]:
    """The real tokens of one micro-batch as numpy columns, in the batch's order; undefined values are NaN."""
    batch, selection = report.batch, report.selection
    undefined = torch.full_like(report.loss, torch.nan)

    def of_response(values: torch.Tensor | None) -> torch.Tensor:
        return undefined if values is None else torch.where(batch.response, values, torch.nan)

    role = torch.where(batch.context, 0, 1)
    columns = {
        "sample": batch.sample,
        "position": batch.position.int(),
        "token": batch.tokens[0].int(),
        "role": role.to(torch.int8),
        "loss": report.loss,
        "history_loss": undefined if report.history_loss is None else report.history_loss,
        "rel_norm": of_response(selection.rel_norm if selection else None),
        "attention": of_response(report.attention),
        "score": of_response(selection.score if selection else None),
        "selected": selection.mask if selection else torch.zeros_like(batch.response),
        "entropy": undefined if report.entropy is None else report.entropy,
        "top1": undefined if report.top1 is None else report.top1,
    }
    real = batch.segment >= 0
    return {name: values[real].cpu().numpy() for name, values in columns.items()}


def gather_columns(reports: list[TokenReport], layout: Layout) -> dict[str, np.ndarray] | None:
    """The columns of all data-parallel ranks, sorted by sample and position, on the process that writes results.

    All ranks may call it; only one process of each replica takes part, and all others get None at once.
    """
    if not layout.is_replica_leader:
        return None
    mine = [columns_of(report) for report in reports]
    gathered: list | None = [None] * layout.data_size if layout.is_writer else None
    dist.gather_object(mine, gathered, dst=dist.get_global_rank(layout.data, 0), group=layout.data)
    if gathered is None:
        return None
    parts = [columns for rank in gathered for columns in rank]
    whole = {name: np.concatenate([part[name] for part in parts]) for name in SCHEMA.names}
    order = np.lexsort((whole["position"], whole["sample"]))
    return {name: values[order] for name, values in whole.items()}


class RecordWriter:
    """Writes a Parquet file of token records; it appears under its name when closed without an error.

    Used as a context manager by one process.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._partial = partial_path(self.path)

    def __enter__(self) -> "RecordWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, SCHEMA, compression="zstd")
        return self

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append columns as `gather_columns` returns them; one row group."""
        arrays = [
            pa.array(columns[field.name], field.type, from_pandas=True)  # from_pandas: NaN becomes null
            for field in SCHEMA
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))

    def __exit__(self, error_type, error, traceback) -> None:
        self._writer.close()
        if error_type is None:
            publish_file(self._partial, self.path)
        else:
            self._partial.unlink()


def read_records(path: str | Path) -> dict[str, np.ndarray]:
    """Records back as numpy columns; nulls are NaN."""
    table = pq.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
