"""What a run writes of single tokens: records of its batches and of watched samples, and a sample for TensorBoard.

Watched samples are the same ones at every step, so that one sees which of their tokens flip. They are scored forward only,
between steps, as a global batch of their own, and leave no trace in training.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_sstoken import watchdog
from megatron_sstoken.data.batches import BatchLoader, BatchShape
from megatron_sstoken.data.token_text import TokenTexts
from megatron_sstoken.folders import RECORDS, WATCHED
from megatron_sstoken.history.source import HistorySource
from megatron_sstoken.model.build import Model
from megatron_sstoken.parallel import Layout, broadcast_object, writer_rank
from megatron_sstoken.passes.columns import gather_columns
from megatron_sstoken.passes.scoring import sequential_loader
from megatron_sstoken.passes.step import TokenReport
from megatron_sstoken.run_plan import RunPlan
from megatron_sstoken.training.known import Known
from megatron_sstoken.training.logger import StepLogger
from megatron_sstoken.training.records import RecordWriter, texts_for
from megatron_sstoken.training.sample_text import marked_sample
from megatron_sstoken.training.selector import Selector, score_and_select

_Columns = dict[str, np.ndarray]


class TokenLog:
    """Writes token records when they are due. All ranks call its methods; `logging` says what there is to do."""

    def __init__(self, plan: RunPlan, layout: Layout, history: HistorySource, known: Known, logger: StepLogger):
        self._plan, self._layout, self._logger = plan, layout, logger
        logging = plan.settings.logging
        self._every, self._last = logging.records_every, plan.num_steps
        self._watched = watched_loader(plan, layout, history, known) if logging.watch else None
        # Who writes sees the last stage, process 0 writes for TensorBoard.
        self._writer_rank = writer_rank(layout) if logging.watch or self._every else 0

    def before_training(self, model: Model, selector: Selector) -> None:
        """Score the watched samples with the weights that the run begins with."""
        if self._watched is not None:
            self._show(0, self._write(WATCHED, 0, self._score(model, selector)))

    def after_step(self, done: int, reports: list[TokenReport], model: Model, selector: Selector) -> None:
        """`reports` and `selector`: of the step that was done last."""
        is_due = self._every > 0 and done % self._every == 0
        shown = None
        if is_due:
            shown = self._write(RECORDS, done, [gather_columns(reports, self._layout)])
        if self._watched is not None and (is_due or done == self._last):
            shown = self._write(WATCHED, done, self._score(model, selector))
        if is_due or (self._watched is not None and done == self._last):
            self._show(done, shown)

    def _score(self, model: Model, selector: Selector) -> list[_Columns | None]:
        """The columns of the watched samples, on the writer."""
        assert self._watched is not None
        found = []
        with model.evaluating():
            for number in range(self._watched.num_batches):
                watchdog.arrived("watched samples")
                reports = score_and_select(model, self._watched.load(number), selector)
                found.append(gather_columns([*map(_with_nan, reports)], self._layout))
        return found

    def _write(self, folder: str, done: int, parts: list[_Columns | None]) -> _Columns | None:
        """Write a file of records, on the writer; returns what TensorBoard shows of it."""
        columns = [part for part in parts if part is not None]
        if not columns:
            return None
        path = Path(self._plan.settings.logging_directory or "") / folder / f"step_{done:07d}.parquet"
        of_data = self._plan.train.store.manifest.data_fingerprint
        with_text = folder == WATCHED or self._plan.settings.logging.record_text
        with self._logger.outlive(path), RecordWriter(path, of_data, self._texts if with_text else None) as writer:
            for part in columns:
                writer.write(part)
        return columns[0]

    def _show(self, done: int, columns: _Columns | None) -> None:
        """Have TensorBoard show the first sample."""
        text = None
        if columns is not None and len(columns["sample"]) and self._texts is not None:
            text = marked_sample(columns, self._texts)
        text = broadcast_object(text, source=self._writer_rank, group=self._layout.control)
        if text is not None:
            self._logger.text(done, "4 sample", text)

    @cached_property
    def _texts(self) -> TokenTexts | None:
        """On the writer."""
        return texts_for(self._plan, always=True)


def watched_samples(plan: RunPlan) -> np.ndarray:
    """int64, ascending: numbers in the store of the first `logging.watch` samples of the run's order, rows of the input that it
    repeats but once."""
    wanted, found = plan.settings.logging.watch, dict[int, int]()
    for number in range(plan.num_packs):
        for index in plan.train.order.pack(number).tolist():
            if len(found) == wanted:
                return np.sort([*found.values()])
            found.setdefault(int(plan.train.store.rows[index]), index)
    return np.sort([*found.values()])


def watched_loader(plan: RunPlan, layout: Layout, history: HistorySource, known: Known) -> BatchLoader:
    """Loads the watched samples, in global batches no larger than they need be."""
    loader = sequential_loader(
        plan.train,
        plan,
        layout,
        history.token_values(),
        indices=watched_samples(plan),
        weighted=plan.weighted,
        weights=known.weights,
        known=known.values,
    )
    loader.shape = shape_for(loader.num_packs, plan.shape, layout)
    return loader


def shape_for(num_packs: int, shape: BatchShape, layout: Layout) -> BatchShape:
    """As `shape`, with no more micro-batches than the packs fill, as far as the pipeline lets us."""
    step = shape.micro_batch_size * shape.data_size
    multiple = layout.pipeline_size if layout.virtual_pipeline > 1 else 1
    needed = -(-num_packs // (step * multiple)) * multiple
    return replace(shape, global_batch_size=step * min(needed, shape.num_micro_batches))


def _with_nan(report: TokenReport) -> TokenReport:
    """A report whose scores may be no numbers: that ends training, not the log."""
    assert report.selection is not None
    return replace(report, selection=replace(report.selection, first_nan=None))
