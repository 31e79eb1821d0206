"""One rank of a world that does not exist, for checking estimates: torch's fake process group answers every collective at
once with whatever lies in memory. Shapes, counts, and what is kept for the backward pass are real; values are not.

A process can be one rank once: call these in a process of their own.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from megatron_sstoken.config import Settings
from megatron_sstoken.data.batches import TokenBatch
from megatron_sstoken.device import adapt_megatron_to_cpu, compute_device
from megatron_sstoken.model import delta_net
from megatron_sstoken.model.build import Model, build_model
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.parallel import Layout, create_groups


def fake_layout(settings: Settings, rank: int, world_size: int) -> Layout:
    """The layout of `rank` among `world_size` processes, of which only this one exists."""
    adapt_megatron_to_cpu()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    groups = create_groups(settings.parallel, seed=0)
    return Layout(groups, data=groups.dp, control=groups.dp, virtual_pipeline=settings.parallel.virtual_pipeline)


def fake_model(architecture: Architecture, settings: Settings, rank: int, world_size: int) -> Model:
    """This rank's model, wrapped for training. With SSTOKEN_DEVICE=meta it needs no memory."""
    layout = fake_layout(settings, rank, world_size)
    os.environ["LOCAL_RANK"] = "0"
    with torch.device("meta") if compute_device().type == "meta" else nullcontext():
        model = build_model(architecture, settings, layout, trainable=True)
    if compute_device().type == "cpu":
        for chunk in model.unwrapped:
            for parameter in chunk.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_batch(num_tokens: int, rows: int = 1, vocabulary: int = 99) -> TokenBatch:
    """A micro-batch of `rows` samples of `num_tokens` random tokens; all but the first of each are response."""
    position = torch.arange(num_tokens).repeat(rows)
    segment = torch.arange(rows).repeat_interleave(num_tokens)
    tokens = torch.randint(vocabulary, (1, rows * num_tokens))
    return TokenBatch(
        tokens,
        tokens.roll(-1),
        position,
        segment,
        segment,
        position == 0,
        position > 0,
        None,
        [num_tokens] * rows,
        rows,
    )


@dataclass
class SavedBytes:
    """What autograd keeps for the backward pass: distinct storages, parameters left out."""

    now: int = 0
    peak: int = 0
    _users: Counter = field(default_factory=Counter)
    _ignored: set = field(default_factory=set)

    def hold(self, tensor: torch.Tensor) -> "_Held":
        return _Held(self, tensor)

    def change(self, key: int, size: int, by: int) -> None:
        before = self._users[key]
        self._users[key] += by
        if key in self._ignored or (before and self._users[key]):
            return
        self.now += size if by > 0 else -size
        self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor; counts its storage as long as it lives."""

    def __init__(self, meter: SavedBytes, tensor: torch.Tensor):
        storage = tensor.untyped_storage()
        self.tensor, self.meter, self.key, self.size = tensor, meter, storage.data_ptr(), storage.nbytes()
        meter.change(self.key, self.size, 1)

    def __del__(self) -> None:
        self.meter.change(self.key, self.size, -1)


@contextmanager
def measure_saved(model: Model) -> Iterator[SavedBytes]:
    """Count the bytes kept for backward passes within, what delta nets keep to be computed again included; gradients and
    parameters do not count."""
    meter = SavedBytes()
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            meter._ignored.add(parameter.untyped_storage().data_ptr())

    def checkpoint_and_hold(function, *inputs, **options):  # which holds its inputs past those hooks
        output = checkpoint(function, *inputs, **options)
        output.grad_fn.metadata["held"] = [meter.hold(one) for one in inputs if isinstance(one, torch.Tensor)]
        return output

    with (
        torch.autograd.graph.saved_tensors_hooks(meter.hold, lambda held: held.tensor),
        patch.object(delta_net, "checkpoint", checkpoint_and_hold),
    ):
        yield meter


class CountCollectives(TorchDispatchMode):
    """Counts collectives called within: operation → [calls, bytes]. Bytes are those of the larger of input and output."""

    NAMES = {
        "c10d::allreduce_": "all_reduce",
        "c10d::_allgather_base_": "all_gather",
        "c10d::allgather_": "all_gather",
        "c10d::_reduce_scatter_base_": "reduce_scatter",
        "c10d::send": "send",
    }

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if name := self.NAMES.get(func._schema.name):
            sizes = [sum(t.numel() * t.element_size() for t in tree_leaves(a) if hasattr(t, "numel")) for a in args[:2]]
            entry = self.counts.setdefault(name, [0, 0])
            entry[0] += 1
            entry[1] += max(sizes)
        return func(*args, **(kwargs or {}))
