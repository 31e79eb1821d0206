"""The optimizer's state in a checkpoint: every rank writes and reads the part that it holds, and gathers nothing.

megatron's distributed optimizer deals out the fp32 copy and the two moments of each parameter over the data-parallel ranks, as
ranges of its flattened elements. Its own form for all layouts (`fully_reshardable`) gathers all of it on every rank when it
saves, or on one (`distrib_optim_fully_reshardable_mem_efficient`), and makes room for all of it on every rank when it loads.
But a range of a flattened tensor is a few boxes of that tensor, and torch's checkpoints hold boxes of any size. Names and
shapes are those of `fully_reshardable`, so that checkpoints of either are read.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer

from megatron_sstoken.model.optimizer import WeightsCopy, fuse_adamw, owned_ranges, parts_of

_FORM = "fully_reshardable"
"""megatron's name of the form that moves between all layouts."""

_STATE = "optimizer.state."
"""How megatron's names of optimizer state begin."""
HISTORY_WEIGHTS = "history.weights."
"""How names in a checkpoint begin of the weights that history losses are scored with, where they are a copy."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offset and size in each dimension."""


def boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The elements `start` to `stop` of a flattened tensor as boxes of the tensor, in the order of its elements.

    2 · dimensions − 1 at most: the rest of a row, whole rows, and the beginning of a row.
    """
    if len(shape) == 1:
        return [((start,), (stop - start,))] if start < stop else []
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # the whole rows between

    def inside(index: int, begin: int, end: int) -> list[Box]:
        return [((index, *offset), (1, *size)) for offset, size in boxes(shape[1:], begin, end)]

    if first > last:
        return inside(last, start - last * row, stop - last * row)
    whole: Box = ((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    before, after = inside(first - 1, start - (first - 1) * row, row), inside(last, 0, stop - last * row)
    return [*before, *([whole] if first < last else []), *after]


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool
) -> dict[Any, Any]:
    """What `dist_checkpointing` saves of an optimizer, or fills: its settings, and this rank's part of its tensors.

    `weights`: the model's sharded state, which says where each parameter lies in the whole; `metadata`: what that was made
    with. To load, the tensors of the optimizer are themselves what is filled.
    """
    with _own_part_alone(optimizer):
        state = optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=metadata | {"distrib_optim_sharding_type": _FORM}
        )
    for group in _groups(state):
        # With state in the host's memory megatron keeps there the classes that it is made of: code, which no checkpoint holds.
        for name in [name for name, value in group.items() if isinstance(value, type)]:
            del group[name]
    return state


@torch.no_grad()
def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Give an optimizer the state that `dist_checkpointing` has loaded."""
    _take_bounds_of(optimizer, state)
    parts = parts_of(optimizer)
    # A mixture of experts has two optimizers, whose states stand under their numbers.
    states = [state] if len(parts) == 1 else [state[index] for index in range(len(parts))]
    stored = [part_state.pop("param_state") for part_state in states]
    optimizer.load_state_dict(state)
    fuse_adamw(optimizer)  # whatever the checkpoint's groups say
    for part, tensors in zip(parts, stored, strict=True):
        _own_steps(part)
        for number, owned in enumerate(owned_ranges(part)):
            held = part._get_main_param_and_optimizer_states(owned.parameter)
            loaded = {name: _joined(pieces) for name, pieces in tensors[number].items()}
            part._set_main_param_and_optimizer_states(owned.parameter, held | loaded)
        if hasattr(part.optimizer, "_sync_hdo_state_to_sub_optimizers"):  # where a part of it lives on the CPU
            part.optimizer._sync_hdo_state_to_sub_optimizers()


@contextmanager
def _own_part_alone(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Within, megatron's `fully_reshardable` form is what this module makes of it."""
    name = "sharded_param_state_fully_reshardable"
    parts = parts_of(optimizer)
    for part in parts:
        _prepare_adam_state(part)
        setattr(part, name, functools.partial(_own_part, part))
    try:
        yield
    finally:
        for part in parts:
            delattr(part, name)


def _own_part(part: Any, weights: dict[str, Any], is_loading: bool = False, metadata: Any = None) -> Any:
    """This rank's ranges of all parameters: number → name of the state → number of the box → ShardedTensor."""
    entries = _entries(weights)
    found = {
        number: {
            name: dict(enumerate(_in_boxes(entries[owned.parameter], f"{_STATE}{name}.", values.float(), owned.start)))
            for name, values in part._get_main_param_and_optimizer_states(owned.parameter).items()
            if name != "step"  # one for all, which stands in the parameter groups
        }
        for number, owned in enumerate(owned_ranges(part))
    }
    # Where it is empty, it must not be taken for a part of what all ranks have in common.
    return found or LocalNonpersistentObject(found)


def sharded_copy(copy: WeightsCopy, weights: dict[str, Any]) -> Any:
    """What `dist_checkpointing` saves of a copy of the trained weights, or fills: this rank's ranges, fp32, as of the state.

    `weights` as in `sharded_optimizer_state`.
    """
    entries = _entries(weights)
    found = {
        number: dict(enumerate(_in_boxes(entries[owned.parameter], HISTORY_WEIGHTS, values, owned.start)))
        for number, (owned, values) in enumerate(copy)
    }
    return found or LocalNonpersistentObject(found)


@torch.no_grad()
def load_copy(copy: WeightsCopy, loaded: dict[int, dict[int, torch.Tensor]]) -> None:
    """Give a copy of the weights what `dist_checkpointing` has loaded of it."""
    for number, (_, values) in enumerate(copy):
        values.copy_(_joined(loaded[number]))


def _entries(weights: dict[str, Any]) -> dict[torch.Tensor, Any]:
    """Parameter → where it lies in the whole."""
    return {
        entry.data: entry for entry in nested_values(weights) if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }


def _joined(pieces: dict[int, torch.Tensor]) -> torch.Tensor:
    """Boxes by number → the elements of the range that they were cut from."""
    return torch.cat([pieces[index].flatten() for index in sorted(pieces)])


def _in_boxes(entry: Any, prefix: str, values: torch.Tensor, start: int) -> Iterator[ShardedTensor]:
    """`values`, the elements of a parameter from `start` on, as boxes of what the checkpoint holds under `prefix` and its name.

    `entry` says where the parameter lies in the whole; of some it makes several tensors, as of gate and up projections.
    """
    values = values.detach().flatten()
    stop = start + len(values)
    # Made of a tensor without memory, they tell by their place in it which elements they hold.
    whole = torch.empty(entry.data.shape, device="meta")
    changes: dict[str, Any] = {"key": f"{prefix}{entry.key}", "data": whole}
    if isinstance(entry, ShardedTensorFactory):
        pieces = list(nested_values(replace(entry, **changes).build()))
    else:
        pieces = [replace(entry, dtype=whole.dtype, **changes)]
    for piece in pieces:
        first, length = piece.data.storage_offset(), piece.data.numel()
        assert piece.data.is_contiguous(), f"{piece.key} is not a range of the parameter's elements"
        leading = (1,) * piece.prepend_axis_num  # the axes of layers, or experts
        begin, end = max(start, first), min(stop, first + length)
        for offset, size in boxes(piece.local_shape, begin - first, end - first) if begin < end else []:
            count = math.prod(size)
            yield replace(
                piece,
                data=values[begin - start : begin - start + count].view(*leading, *size),
                local_shape=(*leading, *size),
                global_offset=tuple(map(sum, zip(piece.global_offset, (*(0 for _ in leading), *offset), strict=True))),
                axis_fragmentations=None,  # no regular grid
                replica_id=(*piece.replica_id[:2], 0),  # no other data-parallel rank holds it
                prepend_axis_num=0,
            )
            begin += count


def _on_torch(part: Any) -> bool:
    """Whether it runs on torch's own AdamW, as it does without apex and Transformer Engine."""
    return isinstance(part.optimizer, torch.optim.AdamW)


def _prepare_adam_state(part: Any) -> None:
    """Give torch's AdamW its empty state where no step has made it: megatron asserts that it is there."""
    for group in part.optimizer.param_groups if _on_torch(part) else []:
        for parameter in group["params"]:
            if parameter not in part.optimizer.state:
                part.optimizer.state[parameter] = {
                    "step": torch.zeros((), device=parameter.device),  # there, because AdamW is fused
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def _own_steps(part: Any) -> None:
    """Give each parameter a count of its own: megatron hands one tensor to all, which AdamW would count up for each."""
    for parameter, entry in part.optimizer.state.items() if _on_torch(part) else []:
        entry["step"] = entry["step"].to(parameter.device, copy=True)


def _take_bounds_of(optimizer: MegatronOptimizer, state: dict[Any, Any]) -> None:
    """Give the stored parameter groups the bounds of the learning rate that this run has.

    megatron-core 0.19 tells groups apart by these, and finds none where a resumed run has others.
    """
    now = optimizer.param_groups[0]
    for group in _groups(state):
        group |= {name: now[name] for name in ("max_lr", "min_lr") if name in group and name in now}


def _groups(state: dict[Any, Any]) -> Iterator[dict[str, Any]]:
    """The parameter groups in a state, of one optimizer or of two."""
    for part in [state, *(value for value in state.values() if isinstance(value, dict))]:
        if isinstance(part.get("optimizer"), dict):
            yield from part["optimizer"]["param_groups"]
