"""Token records: what selection saw and did, one row per token, as Parquet."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.data.external import DATA_KEY
from megatron_sstoken.data.token_text import TEXT_TYPE, TokenTexts, texts_of_data
from megatron_sstoken.files import naming, partial_path, publish_file
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout
from megatron_sstoken.passes.columns import gather_columns
from megatron_sstoken.passes.scoring import scored_batches, sequential_loader
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.training.known import NOTHING, Known
from megatron_sstoken.training.selector import Selector, score_and_select

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
        pa.field("weight", pa.float32()),
        pa.field("entropy", pa.float32()),
        pa.field("top1", pa.float32()),
        pa.field("text", TEXT_TYPE),
    ]
)
"""`sample` is the row number in the input, `role` 0 context and 1 response; NaN never appears: undefined is null.

`text` is as `TokenTexts` writes it; null where a file is without.
"""


class RecordWriter:
    """Writes a Parquet file of token records; it appears under its name when closed without an error.

    Used as a context manager by one process.
    """

    def __init__(self, path: str | Path, data_fingerprint: str | None = None, texts: TokenTexts | None = None):
        """`data_fingerprint`: of the data that the tokens are of, so that the file is not taken for one of other data.
        `texts`: those of its tokens, to be written as well."""
        self.path, self._texts = Path(path), texts
        self._schema = SCHEMA.with_metadata({DATA_KEY: data_fingerprint} if data_fingerprint else None)
        self._partial = partial_path(self.path)

    def __enter__(self) -> "RecordWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer = pq.ParquetWriter(self._partial, self._schema, compression="zstd")
        return self

    def write(self, columns: dict[str, np.ndarray]) -> None:
        """Append columns as `gather_columns` returns them; one row group."""
        tokens = columns["token"]
        arrays = [
            pa.array(columns[field.name], field.type, from_pandas=True)  # from_pandas: NaN becomes null
            for field in SCHEMA
            if field.name != "text"
        ]
        arrays.append(pa.nulls(len(tokens), TEXT_TYPE) if self._texts is None else self._texts.of(tokens))
        with naming(self._partial):
            self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))

    def __exit__(self, error_type, error, traceback) -> None:
        try:
            with naming(self._partial):
                self._writer.close()
            if error_type is None:
                publish_file(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def texts_for(plan: RunPlan, *, always: bool) -> TokenTexts | None:
    """The texts that go into a file of a run's tokens, by `logging.record_text`; None: they are left out.

    `always`: of a file that has them where nothing is set, if there is a tokenizer to take them from; else it says so. To be
    called by the process that writes.
    """
    wanted = plan.settings.logging.record_text
    if not (always if wanted is None else wanted):
        return None
    try:
        return texts_of_data(plan.train.store.manifest, [plan.settings.model.hf_path])
    except ValueError as error:
        print(f"note: texts of tokens are left out: {error}", flush=True)
        return None


def read_records(path: str | Path) -> dict[str, np.ndarray]:
    """Records back as numpy columns; nulls are NaN, and None in `text`."""
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names}
    if "text" in columns:
        columns["text"] = columns["text"].cast(pa.string())
    return {name: column.to_numpy(zero_copy_only=False) for name, column in columns.items()}


def write_records(
    model: Model,
    plan: RunPlan,
    layout: Layout,
    selector: Selector,
    path: str,
    known: Known = NOTHING,
    texts: TokenTexts | None = None,
    before_publishing: Callable[[], None] = lambda: None,
) -> None:
    """Score all samples of `plan.train` in their order and write their token records to `path`, with `texts` on the writer.

    All ranks call `before_publishing` at the end; where it raises, no file appears.
    """
    loader = sequential_loader(
        plan.train,
        plan,
        layout,
        selector.history.token_values(),
        weighted=plan.weighted,
        weights=known.weights,
        known=known.values,
    )

    def score(number: int, batches: list[TokenBatch]) -> list[TokenReport]:
        return score_and_select(model, batches, replace(selector, step=number))

    of_data = plan.train.store.manifest.data_fingerprint
    with RecordWriter(path, of_data, texts) if layout.is_writer else nullcontext() as writer:
        for _, reports in scored_batches(model, loader, layout, title="token records", score=score):
            columns = gather_columns(reports, layout)
            if writer is not None and columns is not None:
                writer.write(columns)
        before_publishing()
