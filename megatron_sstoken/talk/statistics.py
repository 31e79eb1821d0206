"""How sure a share of right answers is, and a difference between two models on the same questions."""

import math

_Z = 1.959963984540054
"""Standard normal quantile of 97.5 %."""


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927): it stays within 0 and 1, and holds for few questions, too."""
    if not 0 <= right <= total or not total:
        raise ValueError(f"{right} of {total} is no share")
    share, more = right / total, _Z**2 / total
    centre = (share + more / 2) / (1 + more)
    half = _Z / (1 + more) * math.sqrt(share * (1 - share) / total + more / (4 * total))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(only_first: int, only_second: int) -> float:
    """The exact two-sided p value of McNemar's test: the questions that one model alone gets right, as throws of a coin."""
    num = only_first + only_second
    tail = sum(math.comb(num, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**num)
