"""How sure a mean over seeds is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

STUDENT_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Number of seeds → two-sided 95 % point of Student's t."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half of its 95 % confidence interval; NaN for a single seed."""

    mean: float
    half: float
    seeds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """By Student's t."""
        number = len(values)
        if number < 2:
            return cls(values[0] if values else math.nan, math.nan, number)
        half = STUDENT_95.get(number, 1.96) * statistics.stdev(values) / math.sqrt(number)
        return cls(statistics.mean(values), half, number)

    def __str__(self) -> str:
        if not self.seeds:
            return ""
        return f"{self.mean:.4f}" if math.isnan(self.half) else f"{self.mean:.4f} ± {self.half:.4f}"
