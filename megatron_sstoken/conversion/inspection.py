"""What a megatron checkpoint holds, told from its metadata alone."""

from pathlib import Path
from typing import Any

from megatron_sstoken.checkpoint.manifest import open_checkpoint
from megatron_sstoken.checkpoint.optimizer_state import HISTORY_WEIGHTS
from megatron_sstoken.conversion.torch_dist import CheckpointReader
from megatron_sstoken.files import format_bytes

_OPTIMIZER, _RANDOM = "optimizer.", "random."


def describe_checkpoint(checkpoint: str) -> dict[str, Any]:
    """Step, source, split, sizes and the tensors of a checkpoint folder, or of the newest one in a directory.

    `parameters` counts the weights with their padded vocabulary; sizes are bytes of tensors. Raises ValueError where
    there is no readable checkpoint.
    """
    stored = open_checkpoint(checkpoint)
    folder, state = stored.folder, stored.state
    tensor, pipeline, *_, device = state.split
    tensors: list[dict[str, Any]] = [
        {
            "name": key,
            "shape": list(entry.size),
            "dtype": str(entry.properties.dtype).removeprefix("torch."),
            "chunks": len(entry.chunks),
            "bytes": entry.size.numel() * entry.properties.dtype.itemsize,
        }
        for key, entry in sorted(CheckpointReader(folder).tensors.items())
    ]
    optimizer = [one for one in tensors if one["name"].startswith(_OPTIMIZER)]
    history = [one for one in tensors if one["name"].startswith(HISTORY_WEIGHTS)]
    weights = [one for one in tensors if not one["name"].startswith((_OPTIMIZER, _RANDOM, HISTORY_WEIGHTS))]
    return {
        "checkpoint": str(folder),
        "step": state.step,
        "source": state.hf_path,
        "made_by": "training" if state.identity else "conversion",
        "split": {"tensor": tensor, "pipeline": pipeline, "device": device},
        "parameters": sum(_numel(one) for one in weights),
        "weights_bytes": sum(one["bytes"] for one in weights),
        "optimizer": bool(optimizer),
        "optimizer_bytes": sum(one["bytes"] for one in optimizer),
        "history_bytes": sum(one["bytes"] for one in history),
        "files_bytes": sum(path.stat().st_size for path in Path(folder).iterdir() if path.is_file()),
        "tensors": tensors,
    }


def _numel(tensor: dict[str, Any]) -> int:
    number = 1
    for size in tensor["shape"]:
        number *= size
    return number


def format_description(description: dict[str, Any]) -> str:
    """The description as text: a line a fact, then a line a tensor."""
    one = description
    split = one["split"]
    optimizer = format_bytes(one["optimizer_bytes"]) if one["optimizer"] else "none"
    lines = [
        f"checkpoint   {one['checkpoint']}",
        f"step         {one['step']} ({one['made_by']})",
        f"source       {one['source']}",
        f"saved on     tensor {split['tensor']} × pipeline {split['pipeline']}, {split['device']}",
        f"parameters   {one['parameters']:,} (with padded vocabulary)",
        f"weights      {format_bytes(one['weights_bytes'])}",
        f"optimizer    {optimizer}",
        *([f"history      {format_bytes(one['history_bytes'])}"] if one["history_bytes"] else []),
        f"files        {format_bytes(one['files_bytes'])}",
        "",
    ]
    width = max((len(tensor["name"]) for tensor in one["tensors"]), default=0)
    for tensor in one["tensors"]:
        size = format_bytes(tensor["bytes"])
        lines.append(f"{tensor['name']:<{width}}  {tensor['dtype']:<8}  {size:>8}  {tensor['shape']}")
    return "\n".join(lines)
