"""Samples ranked by how much of them is dropped, drifts or is not learnt, with their input rows: for cleaning data."""

import json
import tempfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_sstoken.files import partial_path, publish_file
from megatron_sstoken.report.figures import COLUMNS, SAMPLE, sample_figures
from megatron_sstoken.report.gather import significant
from megatron_sstoken.report.prepared import PreparedData
from megatron_sstoken.report.record_files import RecordFile, token_ids, whole_samples, without_repeats
from megatron_sstoken.report.texts import Texts, joined

ORDERS = {"dropped": "dropped_share", "drift": "drift", "loss": "mean_loss"}
"""Name of an order → the figure that ranks, highest first."""
NO_DATA = "the prepared data is not known: --data names its folder"
_FIGURES = ("dropped_share", "drift", "mean_loss", "top_score")


class _Spool:
    """JSON objects that are not empty, in a file without a name, by number."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._ends = array("q", [0])

    def add(self, piece: bytes) -> None:
        self._file.write(piece)
        self._ends.append(self._ends[-1] + len(piece))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        start, stop = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return self._file.read(stop - start)


def export(
    files: Sequence[RecordFile], texts: Texts, data: PreparedData | None, target: str | Path, order: str = "dropped"
) -> tuple[int, int]:
    """Write `target`, a line of JSON for each sample, ranked; returns how many, and how many have their input row.

    A sample has the figures of the last step at which it was recorded. Texts and rows wait on the disk for their rank, so
    that memory holds some 200 bytes a sample. `row` is None, and `note` says why, where the input cannot tell.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(target)
    with tempfile.TemporaryFile(dir=target.parent) as first, tempfile.TemporaryFile(dir=target.parent) as second:
        figures, places, spooled = _read(files, texts, _Spool(first))
        rows = _Spool(second)
        samples = figures["sample"]  # ascending
        wanted = data.input_rows(samples) if data else ((one, None, NO_DATA) for one in samples.tolist())
        found = 0
        for _, row, problem in wanted:
            found += problem is None
            rows.add(_encoded({"row": row} if problem is None else {"row": None, "note": problem}))
        sources = data.sources(samples) if data else [None] * len(samples)
        keys = figures[ORDERS[order]]
        ranked = np.lexsort((samples, -figures["num_response"], np.where(np.isnan(keys), np.inf, -keys)))
        try:
            with open(partial, "wb") as output:
                for number in ranked.tolist():
                    told = _encoded(_described(figures[number], sources[number]))
                    parts = (told, spooled[int(places[number])], rows[number])
                    output.write(b"{" + b", ".join(part[1:-1] for part in parts) + b"}\n")
            publish_file(partial, target)
        finally:
            partial.unlink(missing_ok=True)
    return len(figures), found


def _read(files: Sequence[RecordFile], texts: Texts, spool: _Spool) -> tuple[np.ndarray, np.ndarray, _Spool]:
    """Figures of each sample at its last step, ascending by sample; which piece of the spool is its text; the spool."""
    parts: list[np.ndarray] = [np.empty(0, dtype=SAMPLE)]
    texts.of(token_ids(files))  # all at once, in one reading of the records
    for file in files:  # ascending by step
        for columns, starts in whole_samples(file, COLUMNS):
            figures = sample_figures(columns, starts, file.step)
            parts.append(figures)
            wanted = set(figures["sample"].tolist())
            tokens = texts.of(columns["token"])
            stops = [*starts[1:].tolist(), len(tokens)]
            for start, stop in zip(starts.tolist(), stops, strict=True):
                if int(columns["sample"][start]) in wanted:
                    one = {"position": columns["position"][start:stop], "sample": columns["sample"][start:stop]}
                    places = without_repeats(one | {"at": np.arange(start, stop)})["at"]
                    text = joined(tokens[place] for place in places.tolist()) if texts.is_known else None
                    spool.add(_encoded({"text": text}))
    every = np.concatenate(parts)
    latest = len(every) - 1 - np.unique(every["sample"][::-1], return_index=True)[1]
    return every[latest], latest, spool


def _described(figures: np.void, source: str | None) -> dict[str, Any]:
    whole = {name: int(figures[name]) for name in ("sample", "step", "num_tokens", "num_response")}
    return whole | {"source": source} | {name: significant(float(figures[name])) for name in _FIGURES}


def _encoded(content: dict[str, Any]) -> bytes:
    """JSON as UTF-8; what UTF-8 has no form for (half of a pair of surrogates) is escaped."""
    try:
        return json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return json.dumps(content, default=str).encode()
