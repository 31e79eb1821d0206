"""What prepared data says of its samples: sources, and the rows of the input that they were made of."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sstoken.data.conversation import BadRow
from megatron_sstoken.data.inputs.files import InputFile
from megatron_sstoken.data.store import StoreManifest


@dataclass(frozen=True)
class PreparedData:
    """A prepared folder: manifest, rows and labels, without the tokens."""

    path: Path
    manifest: StoreManifest
    _rows: np.ndarray
    _labels: np.ndarray | None

    @classmethod
    def open(cls, path: str | Path) -> "PreparedData":
        """Read a prepared folder. ValueError for one that is missing or damaged."""
        place = Path(path)
        manifest = StoreManifest.load(place)
        labels = place / "labels.npy"
        try:
            rows = np.load(place / "rows.npy", mmap_mode="r", allow_pickle=False)
            numbers = np.load(labels, mmap_mode="r", allow_pickle=False) if labels.is_file() else None
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"prepared data: {place} cannot be read ({error}): prepare the data again") from error
        return cls(place, manifest, rows, numbers)

    def sources(self, samples: np.ndarray) -> list[str | None]:
        """Label of each sample (a row of the input, int64 [n]); None where it has none."""
        names, labels = self.manifest.labels, self._labels
        if not names or labels is None or not len(self._rows):
            return [None] * len(samples)
        at = np.minimum(np.searchsorted(self._rows, samples), len(self._rows) - 1)  # rows ascend, as the input is read
        found = np.where(self._rows[at] == samples, labels[at], -1)
        return [names[one] if 0 <= one < len(names) else None for one in found.tolist()]

    def input_rows(self, wanted: np.ndarray) -> Iterator[tuple[int, Any, str | None]]:
        """Rows of the input by number (int64 [n], ascending): number, row, and why it is None.

        Rows count from 0 over all files, blank ones left out, as preparation counts them. Where a file is gone or has changed,
        its rows, and those of the files after it, whose numbers it decides, are None.
        """
        waiting = iter(wanted.tolist())
        number, number_wanted, problem = 0, next(waiting, None), None
        for source in self.manifest.sources:
            if number_wanted is None:
                return
            problem = _problem(source)
            if problem is not None:
                break
            for chunk in InputFile(source["path"], "").chunks():
                for place, raw in chunk.rows():
                    if number == number_wanted:
                        try:
                            yield number, chunk.decode(raw), None
                        except BadRow as error:
                            yield number, None, f"{chunk.where(place)}: {error}"
                        number_wanted = next(waiting, None)
                    number += 1
        while number_wanted is not None:
            yield number_wanted, None, problem or "the input has fewer rows than that"
            number_wanted = next(waiting, None)


def _problem(source: dict[str, Any]) -> str | None:
    """Why a file is not the one that the data was prepared of."""
    path = Path(source["path"])
    if not path.is_file():
        return f"{path} is not there any more"
    digest = hashlib.sha256()
    if path.stat().st_size == source["size"]:
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return None if digest.hexdigest() == source["sha256"] else f"{path} has changed since the data was prepared"
