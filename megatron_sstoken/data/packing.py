"""Samples → packs: one each, several in their order, or several by first-fit decreasing."""

import numpy as np

WINDOW = 2048
"""Samples that first-fit decreasing sees at once: larger packs tighter, smaller shuffles better."""


def one_per_pack(order: np.ndarray) -> list[np.ndarray]:
    """Every sample in a pack of its own."""
    return list(order[:, None])


def next_fit(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Fill pack after pack and keep the order: a sample that does not fit opens the next pack.

    `order`: sample numbers; `lengths`: int, of every sample of the store, at most `capacity` each.
    """
    cumulative = np.cumsum(lengths[order], dtype=np.int64)
    packs, start = [], 0
    while start < len(order):
        filled = int(cumulative[start - 1]) if start else 0
        stop = int(np.searchsorted(cumulative, filled + capacity, side="right"))
        assert stop > start, f"sample {order[start]} has {lengths[order[start]]} tokens, a pack {capacity}"
        packs.append(order[start:stop])
        start = stop
    return packs


def first_fit_decreasing(
    order: np.ndarray, lengths: np.ndarray, capacity: int, generator: np.random.Generator | None
) -> list[np.ndarray]:
    """Within each window of the order the longest samples first, each into the first pack that has room for it.

    A function of its arguments alone, so that every rank packs alike and a run resumes by its pack number. The packs of a
    window are shuffled by `generator`, since the method puts the full ones first; None keeps them.
    """
    packs: list[np.ndarray] = []
    for start in range(0, len(order), WINDOW):
        packed = _pack_window(order[start : start + WINDOW], lengths, capacity)
        if generator is not None:
            packed = [packed[place] for place in generator.permutation(len(packed))]
        packs += packed
    return packs


def _pack_window(order: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    room = np.full(len(order), capacity, dtype=np.int64)
    members: list[list[int]] = []
    for sample in order[np.argsort(-lengths[order], kind="stable")].tolist():
        pack = int(np.argmax(room[: len(members) + 1] >= lengths[sample]))
        if pack == len(members):
            members.append([])
        members[pack].append(sample)
        room[pack] -= lengths[sample]
    return [np.array(pack, dtype=np.int64) for pack in members]
