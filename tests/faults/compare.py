"""What a run leaves, and how another run differs from it: checkpoints, token records, curves, folders."""

import io
import json
import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.serialization import safe_globals

from megatron_sstoken.checkpoint.harmless import read_metadata
from megatron_sstoken.checkpoint.manifest import checkpoint_steps
from megatron_sstoken.training.records import read_records
from tests.helpers.cli import scalars

CURVES = ("loss/selected", "loss/all", "loss/dropped")
_OWN_NAME = re.compile(r"events\.out\.tfevents\..*")
"""TensorBoard's files: one for each start, with its time in the name."""


@dataclass
class Difference:
    """How a run differs from the undisturbed one."""

    problems: list[str] = field(default_factory=list)
    """What is not equal bit for bit, one line each."""
    samples: int = 0
    """How often a sample was seen too seldom or too often."""
    left: list[str] = field(default_factory=list)
    """Files and folders that an undisturbed run does not leave."""


def compare(reference: Path, run: Path) -> Difference:
    """Compare two run folders (`run` and `data/history` below each)."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # points of starts before are purged, as is right
    found = Difference()
    expected, present = _names(reference), _names(run)
    found.left = sorted(present - expected)
    found.problems += [f"{name} is missing" for name in sorted(expected - present)]
    for step, folder in checkpoint_steps(str(reference / "run")).items():
        if (other := run / "run" / folder.name).is_dir():
            found.problems += [f"step {step}: {name} differs" for name in _unequal(_parts(folder), _parts(other))]
    for path in sorted((reference / "data" / "history").glob("*/values.bin")):
        if path.read_bytes() != (run / path.relative_to(reference)).read_bytes():
            found.problems.append("the history losses differ")
    records, others = _records(reference), _records(run)
    found.problems += [f"records: {name} differs" for name in _unequal(records, others)]
    counts, seen = _times_seen(records), _times_seen(others)
    found.samples = sum(abs(counts[sample] - seen[sample]) for sample in counts | seen)
    for name in CURVES:
        wanted, points = scalars(reference / "run" / "logs", name), scalars(run / "run" / "logs", name)
        steps = sorted(step for step in wanted | points if wanted.get(step) != points.get(step))
        if steps:
            missing = len(wanted.keys() - points.keys())
            found.problems.append(
                f"curve {name}: {missing} points missing of {len(wanted)}; not equal at steps {steps}"
            )
    return found


def _names(folder: Path) -> set[str]:
    """All files and folders below the checkpoint directory and beside the history, those with names of their own left out."""
    roots = (folder / "run", folder / "data")
    paths = [path for root in roots for path in root.rglob("*")]
    return {str(path.relative_to(folder)) for path in paths if not _OWN_NAME.fullmatch(path.name)}


def _parts(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name and place: tensors, objects, and the run's state."""
    metadata = read_metadata(folder)
    found: dict[str, Any] = {"sstoken.json": json.loads((folder / "sstoken.json").read_text(encoding="utf-8"))}
    for index, place in (metadata.storage_data or {}).items():
        with open(folder / place.relative_path, "rb") as file:
            file.seek(place.offset)
            found[f"{index.fqn}{tuple(index.offset or ())}"] = _load(file.read(place.length))
    if (common := folder / "common.pt").exists():
        found["common.pt"] = _load(common.read_bytes())
    return found


def _load(content: bytes) -> Any:
    with safe_globals([io.BytesIO]):
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _records(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Token records of every step, by file."""
    return {path.name: read_records(path) for path in sorted((folder / "run" / "logs" / "records").glob("*.parquet"))}


def _times_seen(records: dict[str, dict[str, np.ndarray]]) -> Counter[int]:
    """Sample → how often it is in the records of all steps."""
    first = [columns["sample"][columns["position"] == 0] for columns in records.values()]
    return Counter(np.concatenate(first).tolist() if first else [])


def _unequal(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Names whose values are not the same in both, or in one of them alone."""
    names = dict.fromkeys([*ours, *theirs])
    return [name for name in names if name not in ours or name not in theirs or not _same(ours[name], theirs[name])]


def _same(a: Any, b: Any) -> bool:
    """Whether two values are equal in type, shape and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _same(_bytes(a), _bytes(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, io.BytesIO):
        return _same(_load(a.getvalue()), _load(b.getvalue()))
    return bool(a == b)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
