"""What differs between the supported lines of megatron-core, each with its reason. What both have is used directly.

`supported.py` names the lines; `device.py` adapts either to machines without CUDA.
"""

import functools
import inspect
import io
import logging
from pathlib import Path
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import save
from megatron.core.dist_checkpointing.strategies import common
from megatron.core.distributed import finalize_model_grads
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, ReadItem
from torch.distributed.checkpoint import load as load_stored

_UNWANTED = {
    # GPTModel gets no new features. 0.16 has no HybridModel that could take its place; see docs/platform.md.
    "megatron.core.models.gpt.gpt_model": "GPTModel IS DEPRECATED",
    # Its successor is another package, nvidia-resiliency-ext. megatron still goes this way itself when it saves and waits.
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
    # The wrapper works out the layout of its buffers as the caller could have done, which 0.16 cannot.
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
}
"""Logger of 0.19 → how the message begins that it writes for every chunk of every run, and that a user cannot act on."""


_WAITS_FOR_TOKENS = megatron.core.__version__.startswith("0.16.")


@functools.lru_cache(maxsize=1)
def silence_announcements() -> None:
    """Keep what 0.19 announces about its own future out of the output of runs."""
    for logger, beginning in _UNWANTED.items():
        logging.getLogger(logger).addFilter(functools.partial(_begins_otherwise, beginning))


def _begins_otherwise(beginning: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(beginning)


def finalize_gradients(model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """megatron's `finalize_model_grads`: reduce gradients and divide them by the tokens of all ranks, int [].

    0.16 waits for the device to tell whether there are any tokens. 0.19 does not; here both do as it does.
    """
    if num_tokens is None or not _WAITS_FOR_TOKENS:
        finalize_model_grads(model, num_tokens, **options)
        return
    finalize_model_grads(model, None, **options)
    groups = options["pg_collection"]
    dist.broadcast(num_tokens, src=dist.get_global_rank(groups.pp, groups.pp.size() - 1), group=groups.pp)
    dist.all_reduce(num_tokens, group=groups.dp_cp)
    for chunk in model:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))  # type: ignore[operator]


def gather_in_next_pass(chunk: torch.nn.Module) -> None:
    """Let the next forward pass gather the weights of a chunk (a DistributedDataParallel that overlaps the two) anew.

    0.19 has a method for it, 0.16 has not.
    """
    if hasattr(chunk, "reset_param_sync_dispatch_state"):
        chunk.reset_param_sync_dispatch_state()  # type: ignore[operator]
        return
    for group in [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]:  # type: ignore[misc]
        assert group.param_gather_handle is None, "the pass before has waited for all that it gathered"
        group.param_gather_dispatched = False


def mark_split(parameter: torch.nn.Parameter, dim: int) -> None:
    """Mark a parameter as one that is cut along `dim` over the tensor ranks, unless megatron has marked it.

    0.16 marks its own only while drawing random weights, 0.19 in any case; both refuse a second mark.
    """
    if not hasattr(parameter, "tensor_model_parallel"):
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def dense_mlp(layer: TransformerLayerSubmodules) -> MLPSubmodules | None:
    """What the feed-forward part of a layer's spec is made of, to be changed in place; None for a mixture of experts."""
    return _mlp_in(layer.mlp)


def expert_mlp(layer: TransformerLayerSubmodules) -> MLPSubmodules | None:
    """The same of the experts of a mixture that are computed one after another; None for any other feed-forward part."""
    return _mlp_in(getattr(_submodules(layer.mlp), "experts", None))


def shared_expert_mlp(layer: TransformerLayerSubmodules) -> MLPSubmodules | None:
    """The same of the shared experts of a mixture; None where it has none."""
    return _mlp_in(getattr(_submodules(layer.mlp), "shared_experts", None))


def _mlp_in(described: Any) -> MLPSubmodules | None:
    submodules = _submodules(described)
    return submodules if isinstance(submodules, MLPSubmodules) else None


def _submodules(described: Any) -> Any:
    """The submodules of a described module. 0.16 describes one by a ModuleSpec, 0.19 by a partial function that builds it."""
    options = described.keywords if isinstance(described, functools.partial) else getattr(described, "__dict__", {})
    return options.get("submodules")


COMMON_STATE = "common_state/shard_0_1"
"""Under this name 0.19 stores, among the tensors, what is not split over ranks; 0.16 has a file for it, `common.pt`."""


def load_options(folder: Path) -> dict[str, Any]:
    """Keyword arguments with which either line's `dist_checkpointing.load` reads the checkpoints of both.

    0.19 knows both forms. 0.16 knows its own, and is given a strategy that finds the other.
    """
    strategy: Any = getattr(common, "TorchCommonLoadStrategy", None)
    if strategy is None or (folder / "common.pt").exists():
        return {}

    class LoadFromTensors(strategy):
        def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
            planner = _ReadObject()
            wanted = {COMMON_STATE: io.BytesIO()}
            load_stored(wanted, storage_reader=FileSystemReader(checkpoint_dir), planner=planner, no_dist=True)
            return planner.value[0]

    return {"common_strategy": LoadFromTensors()}


def save_options() -> dict[str, Any]:
    """Keyword arguments with which `dist_checkpointing.save` plans a write that the caller carries out.

    0.19 wants to be told that megatron's own writer does it, the only one that 0.16 has.
    """
    return {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(save).parameters else {}


class _ReadObject(DefaultLoadPlanner):
    """Reads one stored object, and of its pickle nothing but plain values and tensors."""

    value: Any = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = torch.load(value, weights_only=True)
