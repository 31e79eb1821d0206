"""Safetensors files of known size, written tensor by tensor in any order.

The format (huggingface/safetensors, README): 8 bytes little-endian length of the header; the header, JSON: name → type,
shape and place; then the bytes of the tensors without gaps. All of the header follows from names and shapes.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_sstoken.conversion.runs import Run, RunCopier
from megatron_sstoken.files import begin_sync_of_much, write_at
from megatron_sstoken.model.dtypes import SAFETENSORS_NAMES

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardPlan:
    """One file: its header and where each tensor's bytes go."""

    file_name: str
    header: bytes
    places: dict[str, tuple[int, int]]
    """Tensor → first byte in the file and number of bytes."""

    @property
    def size(self) -> int:
        return len(self.header) + sum(length for _, length in self.places.values())


def plan_shards(tensors: Mapping[str, torch.Tensor], shard_size: int) -> list[ShardPlan]:
    """Deal tensors (name → one of that shape and type, meta) out to files of at most `shard_size` bytes, in order.

    The files have the usual names; a tensor larger than that has one of its own.
    """
    groups: list[dict[str, torch.Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.nbytes > shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    if len(groups) == 1:
        return [_plan("model.safetensors", groups[0])]
    return [
        _plan(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    ]


def _plan(file_name: str, tensors: dict[str, torch.Tensor]) -> ShardPlan:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        kind = SAFETENSORS_NAMES[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
        places[name] = (start, end - start)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    first = len(text) + 8
    places = {name: (first + start, length) for name, (start, length) in places.items()}
    return ShardPlan(file_name, len(text).to_bytes(8, "little") + text, places)


def index_text(shards: list[ShardPlan]) -> str:
    """Content of the index file that goes with several shards."""
    total = sum(length for shard in shards for _, length in shard.places.values())
    weight_map = {name: shard.file_name for shard in shards for name in shard.places}
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )


class ShardWriter:
    """Writes one planned file; several threads may write different tensors at once."""

    def __init__(self, folder: Path, plan: ShardPlan):
        self.plan = plan
        self._missing = {name: length for name, (_, length) in plan.places.items()}
        """Bytes that are not there yet."""
        self._guard = threading.Lock()
        self.descriptor = os.open(folder / plan.file_name, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        os.ftruncate(self.descriptor, plan.size)
        self._write(plan.header, 0)

    def write(self, name: str, tensor: torch.Tensor, *, part: int | None = None) -> bool:
        """Write a contiguous tensor of the planned type to its place; True for the last one that was missing.

        `part`: it is that one of the equal parts along the first axis.
        """
        start, length = self.plan.places[name]
        content = tensor.detach().view(torch.uint8).reshape(-1).numpy()
        fits = length == content.nbytes if part is None else length % content.nbytes == 0
        assert fits, f"{name}: {content.nbytes} bytes, planned {length}"
        self._write(content.data, start + (part or 0) * content.nbytes)
        return self._is_whole(name, content.nbytes)

    def copy(self, name: str, runs: Sequence[Run], copier: RunCopier) -> bool:
        """Write a tensor whose bytes are `runs`; True as `write`."""
        start, length = self.plan.places[name]
        copied = copier.copy(runs, self.descriptor, start)
        assert copied == length, f"{name}: {copied} bytes, planned {length}"
        return self._is_whole(name, length)

    def _is_whole(self, name: str, written: int) -> bool:
        with self._guard:
            self._missing[name] -= written
            if not self._missing[name]:
                del self._missing[name]
            return not self._missing

    def _write(self, content: bytes | memoryview, start: int) -> None:
        begin_sync_of_much(self.descriptor, start, write_at(self.descriptor, content, start))

    def close(self) -> None:
        os.close(self.descriptor)
