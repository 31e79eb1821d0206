"""Which samples go where: shares of sources, train and validation, each sample once.

Nothing here depends on the number of workers: samples come in the order of the input, and chance has a seed.
"""

import hashlib
import math
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_sstoken.data.output import TRAIN, VALIDATION
from megatron_sstoken.data.store import Samples, StoreManifest, StoreWriter

DUPLICATES = "duplicates left out by --deduplicate"


@dataclass(frozen=True)
class Plan:
    """What the user wants of the samples as a whole."""

    shares: Mapping[str, float] | None = None
    """Of the samples in the result, by label; any positive scale. None: all samples."""
    repeat: bool = False
    """Sources may repeat, so that all of every source is used; else the scarcest source decides how many there are."""
    split: float = 0.0
    """Share of samples for validation."""
    deduplicate: bool = False
    seed: int = 0
    """Of what is drawn."""

    def __post_init__(self) -> None:
        for label, share in (self.shares or {}).items():
            if not (share >= 0 and math.isfinite(share)):
                raise ValueError(f"--mix: {label}={share} must be at least 0")
        if self.shares is not None and not any(self.shares.values()):
            raise ValueError("--mix: no share is above 0: give at least one source a share")
        if self.repeat and self.shares is None:
            raise ValueError("--mix_repeat: needs --mix, the shares that sources repeat for")
        if not 0 <= self.split < 1:
            raise ValueError(f"--split: {self.split} must be at least 0 and below 1")
        if self.seed < 0:
            raise ValueError(f"--seed: {self.seed} must be at least 0")

    @classmethod
    def parse_shares(cls, texts: list[str]) -> dict[str, float]:
        """`name=share …` → shares; `ValueError` for anything else."""
        shares: dict[str, float] = {}
        for text in texts:
            name, equals, share = text.rpartition("=")
            try:
                value = float(share)
            except ValueError:
                equals = ""
            if not equals or not name or name in shares:
                raise ValueError(f"--mix: {text!r} must read name=share, each name once")
            shares[name] = value
        return shares


def draw(labels: np.ndarray, names: list[str], plan: Plan) -> np.ndarray:
    """How often each sample is taken, int64 [num_samples], from `labels` int32 [num_samples], which count in `names`.

    Without `repeat` the source with the fewest samples for its share gives all of them, and the others are drawn from at
    random. With it the source with the most gives all of them once, and the others repeat: whole passes, the rest drawn.
    Raises ValueError for a label without a share, and for a share without samples.
    """
    assert plan.shares is not None, "asked for"
    counts = {name: int((labels == number).sum()) for number, name in enumerate(names)}
    found = ", ".join(f"{name} ({count:,})" for name, count in counts.items())
    if unnamed := [name for name in counts if name not in plan.shares]:
        raise ValueError(f"--mix: no share for {', '.join(unnamed)} (0 leaves it out); there is {found}")
    wanted = {name: share for name, share in plan.shares.items() if share > 0}
    if missing := [name for name in wanted if not counts.get(name)]:
        twice = ", or, if all of its samples are duplicates, name its --input first" if plan.deduplicate else ""
        raise ValueError(
            f"--mix: there is no sample of {', '.join(missing)}; there is {found}: correct the names{twice}"
        )
    totals = [counts[name] / share for name, share in wanted.items()]
    total = max(totals) if plan.repeat else min(totals)
    times = np.zeros(labels.size, dtype=np.int64)
    for number, name in enumerate(names):
        if name not in wanted:
            continue
        whole, rest = divmod(max(1, round(total * wanted[name])), counts[name])
        members = np.flatnonzero(labels == number)
        own = np.random.default_rng([plan.seed, *hashlib.sha256(name.encode()).digest()[:8]])
        times[members] = whole
        times[own.permutation(members)[:rest]] += 1
    return times


class Placer:
    """Takes every sample of the input and writes those that are wanted into folders below `path`. A context manager."""

    def __init__(self, path: Path, plan: Plan):
        self._plan, self._stack = plan, ExitStack()
        self._folders = [path / TRAIN, path / VALIDATION] if plan.split else [path]
        path.mkdir(parents=True, exist_ok=True)
        self._writers = [self._stack.enter_context(StoreWriter(folder)) for folder in self._folders]
        self._seen: set[bytes] = set()
        self._shelf = self._stack.enter_context(_Shelf(path)) if plan.shares is not None else None
        self._samples = [0 for _ in self._folders]
        self._notes: Counter[str] = Counter()

    def extend(self, samples: Samples, rows: Sequence[int], labels: Sequence[str]) -> None:
        """The next samples of the input, in order; `rows` and `labels` have an entry for each."""
        if self._plan.deduplicate or self._plan.split or self._shelf is not None:
            for sample, row, label in zip(samples.each(), rows, labels, strict=True):
                self._add(sample, row, label)
        else:  # all go into one folder
            self._samples[0] += len(rows)
            self._writers[0].extend(samples, rows, labels)

    def _add(self, sample: Samples, row: int, label: str) -> None:
        if self._plan.deduplicate:
            digest = hashlib.blake2b(sample.tokens.tobytes() + sample.roles.tobytes(), digest_size=16).digest()
            if digest in self._seen:
                self._notes[DUPLICATES] += 1
                return
            self._seen.add(digest)
        if self._shelf is not None:
            self._shelf.add(sample, row, label)
        else:
            self._write(sample, row, label)

    def finalize(self, notes: Mapping[str, int], **manifest: Any) -> StoreManifest:
        """Complete the folders; returns the manifest of the first. ValueError where one of them has no sample."""
        if self._shelf is not None:
            for sample, row, label, times in self._shelf.drawn(self._plan, self._notes):
                for _ in range(times):
                    self._write(sample, row, label)
        if self._plan.split and not all(self._samples):
            empty = self._folders[self._samples.index(0)].name
            raise ValueError(
                f"--split: {self._plan.split} of {sum(self._samples)} samples leaves none for {empty}: change the share"
            )
        every = {**notes, **self._notes}
        return [writer.finalize(notes=every, **manifest) for writer in self._writers][0]

    def _write(self, sample: Samples, row: int, label: str) -> None:
        place = int(self._plan.split > 0 and _fraction(sample.tokens) < self._plan.split)
        self._samples[place] += 1
        self._writers[place].extend(sample, [row], [label])

    def __enter__(self) -> "Placer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)


def _fraction(tokens: np.ndarray) -> float:
    """In [0, 1), of the tokens alone: equal conversations lie on the same side, whatever the order."""
    return int.from_bytes(hashlib.blake2b(tokens.tobytes(), digest_size=8).digest(), "big") / 2.0**64


class _Shelf:
    """Keeps samples in a file without a name, until it is known how many there are of each label. A context manager."""

    def __init__(self, folder: Path):
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 – `__exit__` closes it
        self._names: dict[str, int] = {}
        self._labels, self._rows, self._lengths, self._weighted = array("i"), array("q"), array("q"), array("b")

    def add(self, sample: Samples, row: int, label: str) -> None:
        for part in (sample.tokens, sample.roles, sample.weights):
            if part is not None:
                self._file.write(part.tobytes())
        self._labels.append(self._names.setdefault(label, len(self._names)))
        self._rows.append(row)
        self._lengths.append(sample.tokens.size)
        self._weighted.append(sample.weights is not None)

    def drawn(self, plan: Plan, notes: Counter[str]) -> Iterator[tuple[Samples, int, str, int]]:
        """Sample, row, label and how often, of each that is taken, in the order of the input; `notes` get what is not."""
        if not self._rows:
            return
        names = list(self._names)
        labels = np.array(self._labels, dtype=np.int32)
        times = draw(labels, names, plan)
        for number, name in enumerate(names):
            own = times[labels == number]
            notes[f"samples of `{name}` left out by --mix"] += int((own == 0).sum())
            notes[f"repetitions of samples of `{name}` by --mix_repeat"] += int(np.maximum(own - 1, 0).sum())
        for text in [text for text, count in notes.items() if not count]:
            del notes[text]
        self._file.seek(0)
        for index, (label, row, length, weighted) in enumerate(
            zip(self._labels, self._rows, self._lengths, self._weighted, strict=True)
        ):
            tokens = np.frombuffer(self._file.read(4 * length), dtype=np.int32)
            roles = np.frombuffer(self._file.read(length), dtype=np.uint8)
            weights = np.frombuffer(self._file.read(4 * length), dtype=np.float32) if weighted else None
            if times[index]:
                yield Samples(tokens, roles, np.array([length]), weights), row, names[label], int(times[index])

    def __enter__(self) -> "_Shelf":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
