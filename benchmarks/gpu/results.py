"""What a section writes: one JSON line a result, on disk as soon as it is known."""

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class NotHere(Exception):
    """What is to be shown cannot be shown on this machine, for the reason given."""


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a record to a file of JSON lines, so that it is there whatever happens next."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of such a file; a line that a killed process has not finished is left out."""
    records = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
    return records


@dataclass(frozen=True)
class Results:
    """Where one section writes, and what it is told."""

    path: Path
    """The file of JSON lines that all sections share."""
    section: str
    tiny: bool
    """Toy sizes: nothing is learnt of speed."""
    work: Path
    """A folder for models and data, removed at the end."""
    seconds: float
    """How long the section may take."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def folder(self) -> Path:
        """Where files to keep go."""
        return self.path.parent

    @property
    def seconds_left(self) -> float:
        return self.begun + self.seconds - time.monotonic()

    def row(self, table: str, **columns: Any) -> None:
        """A row of a table of the report."""
        self._write({"kind": "row", "table": table, "columns": columns})

    def check(self, what: str, measured: float, limit: float, *, at_least: bool = False) -> None:
        """A figure that must be at most (or at least) `limit`: otherwise the section has failed. NaN fails."""
        ok = measured >= limit if at_least else measured <= limit
        sign = "≥" if at_least else "≤"
        self._write({"kind": "check", "what": what, "measured": measured, "limit": f"{sign} {limit:g}", "ok": ok})

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Within, one part of the section: where it breaks, the others still come, and the section has failed."""
        try:
            yield
        except NotHere as reason:
            self.absent(what, str(reason))
        except Exception as error:
            print(traceback.format_exc(), flush=True)
            lines = str(error).strip().splitlines() or [""]
            self._write({"kind": "failure", "what": what, "error": f"{type(error).__name__}: {lines[0]}"[:400]})

    def absent(self, what: str, why: str) -> None:
        """Something of this section that this machine does not show."""
        self._write({"kind": "absent", "what": what, "why": why})

    def target(self, name: str, measured: float) -> None:
        """The figure of a target (`sections.TARGETS`); of toy sizes none counts."""
        if not self.tiny:
            self._write({"kind": "target", "name": name, "measured": measured})

    def _write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record, default=str, ensure_ascii=False), flush=True)
        append_line(self.path, {"section": self.section} | record)
