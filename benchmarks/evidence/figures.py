"""From results to figures: a row per run and measure, paired differences with intervals, and how well scores find noise."""

import csv
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.evidence.arms import Task
from benchmarks.evidence.recovery import recovery_of
from benchmarks.evidence.runs import Runs
from benchmarks.intervals import Interval

RIGHT = "answers right"
"""Share of the held-out questions that are asked."""


@dataclass(frozen=True)
class Figure:
    """One number."""

    noise: float
    rate: str
    arm: str
    seed: int
    measure: str
    value: float


class Figures:
    """All numbers of all runs that are done."""

    def __init__(self, rows: Sequence[Figure]):
        self.rows = rows
        self._values: dict[tuple, dict[int, float]] = defaultdict(dict)
        for row in rows:
            self._values[row.noise, row.rate, row.arm, row.measure][row.seed] = row.value

    def by_seed(self, noise: float, rate: str, arm: str, measure: str) -> dict[int, float]:
        """Seed → value, of the runs that are done."""
        return self._values.get((noise, rate, arm, measure), {})

    def mean(self, noise: float, rate: str, arm: str, measure: str) -> Interval:
        """Over the seeds."""
        return Interval.of(list(self.by_seed(noise, rate, arm, measure).values()))

    def difference(self, noise: float, rate: str, arm: str, other: str, measure: str) -> Interval:
        """`arm` − `other`, paired by seed: both have the same data, faults, order and steps."""
        mine, theirs = (self.by_seed(noise, rate, name, measure) for name in (arm, other))
        return Interval.of([mine[seed] - theirs[seed] for seed in sorted(mine.keys() & theirs.keys())])

    def settings(self) -> list[tuple[float, str]]:
        """(noise, rate) of which there are figures, rates of the grid apart."""
        found = {(row.noise, row.rate) for row in self.rows}
        return sorted(one for one in found if one[1] in ("chosen", "large"))

    def to_csv(self, path: Path) -> None:
        """A row per figure."""
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(Figure.__dataclass_fields__))
            writer.writeheader()
            writer.writerows({**asdict(row), "value": f"{row.value:.6g}"} for row in self.rows)

    @classmethod
    def from_csv(cls, path: Path) -> "Figures":
        """What `to_csv` wrote."""
        with open(path, encoding="utf-8", newline="") as file:
            return cls(
                [
                    Figure(float(r["noise"]), r["rate"], r["arm"], int(r["seed"]), r["measure"], float(r["value"]))
                    for r in csv.DictReader(file)
                ]
            )


def collect(runs: Runs, tasks: Sequence[Task]) -> Figures:
    """The figures of the tasks that are done."""
    rows = []
    for task in tasks:
        where = task.noise, task.rate, task.arm.name, task.seed
        rows += [Figure(*where, measure, value) for measure, value in _measures(runs, task)]
    return Figures(rows)


def _measures(runs: Runs, task: Task) -> Iterator[tuple[str, float]]:
    found = runs.result(task)
    if found is None:
        return
    last = str(found["steps"])
    for name, losses in found["measures"][last].items():
        for kind, loss in losses.items():
            yield f"{name} {kind}", loss
            if "0" in found["measures"]:
                yield f"{name} {kind} at the start", found["measures"]["0"][name][kind]
    for step, right in found.get("right", {}).items():
        yield f"{RIGHT} at the start" if step == "0" else RIGHT, right
    steps = found["train"]
    yield "steps", found["steps"]
    yield "seconds", found["seconds"]
    yield "tokens", found["tokens"]
    yield "share", statistics.mean(step["share"] for step in steps)
    if all("dropped_minus_history" in step for step in steps):
        yield "dropped - history at the end", statistics.mean(step["dropped_minus_history"] for step in steps[-5:])
    if task.probes:
        is_tuned = runs.result(task.tuned_on_clean) is not None
        reference = runs.probes(task.tuned_on_clean) if is_tuned else []
        yield from recovery_of(runs.probes(task), reference, runs.folders(task).probe)
