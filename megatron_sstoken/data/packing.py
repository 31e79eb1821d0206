"""Samples → rows: one a row, several in their order, or several by first-fit decreasing."""

import numpy as np

WINDOW = 2048
"""Samples that first-fit decreasing sees at once: larger packs tighter, smaller shuffles better."""


def one_per_pack(order: np.ndarray) -> list[np.ndarray]:
    """Every sample in a row of its own."""
    return list(order[:, None])


def next_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Fill row after row and keep the order: a sample that does not fit opens the next row.

    `order`: sample numbers; `lengths`: int, of every sample of the store, at most `capacity` each.
    """
    cumulative = np.cumsum(lengths[order], dtype=np.int64)
    rows, start = [], 0
    while start < len(order):
        filled = int(cumulative[start - 1]) if start else 0
        stop = int(np.searchsorted(cumulative, filled + capacity, side="right"))
        assert stop > start, f"sample {order[start]} has {lengths[order[start]]} tokens, a row {capacity}"
        rows.append(order[start:stop])
        start = stop
    return rows


def first_fit_decreasing(
    order: np.ndarray, lengths: np.ndarray, capacity: int, generator: np.random.Generator | None
) -> list[np.ndarray]:
    """Within each window of the order the longest samples first, each into the first row that has room for it.

    A function of its arguments alone, so that every rank packs alike and a run resumes by its row number. The rows of a
    window are shuffled by `generator`, since the method puts the full ones first; None keeps them.
    """
    rows: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        packed = _pack_window(order[start : start + WINDOW], lengths, capacity)
        if generator is not None:
            packed = [packed[place] for place in generator.permutation(len(packed))]
        rows += packed
    return rows


def _pack_window(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    room = np.full(len(order), capacity, dtype=np.int64)
    members: list[list[int]] = []
    for sample in order[np.argsort(-lengths[order], kind="stable")].tolist():
        row = int(np.argmax(room[: len(members) + 1] >= lengths[sample]))
        if row == len(members):
            members.append([])
        members[row].append(sample)
        room[row] -= lengths[sample]
    return [np.array(row, dtype=np.int64) for row in members]
