"""`metrics.jsonl`: what a run was told by, a JSON object a line for each step."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sstoken.files import timestamp, write_durably


class MetricsFile:
    """Appends to the file; what is said of one step becomes one line."""

    def __init__(self, path: str | Path, *, resumed: int | None = None):
        """`resumed`: the step that the run goes on from: later lines are cut, and all of them where it begins anew."""
        self.path = Path(path)
        self._line: dict[str, Any] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            kept = [] if resumed is None else [line for line in read_metrics(self.path) if line["step"] <= resumed]
            write_durably(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def add(self, step: int, points: dict[str, float]) -> None:
        """Points of a step; those that are undefined or not finite are left out. Writes the line of a step before."""
        if self._line and self._line["step"] != step:
            self.write()
        if not self._line:
            self._line = {"step": step, "time": timestamp("milliseconds")}
        self._line |= {name: value for name, value in points.items() if math.isfinite(value)}

    def write(self) -> None:
        """Append the line of the newest step, which is over."""
        line, self._line = self._line, {}
        if line:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines but those that are not whole, as a killed run may leave its last."""
    return [line for line in metrics_lines(path) if line is not None]


def metrics_lines(path: str | Path) -> Iterator[dict[str, Any] | None]:
    """The lines, one at a time; None for one that is not whole."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                content = json.loads(line)
            except ValueError:
                content = None
            yield content if isinstance(content, dict) and isinstance(content.get("step"), int) else None
