"""Whole checkpoints between Hugging Face folders and megatron's `dist_checkpointing`, in one process."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_sstoken.config import Settings
from megatron_sstoken.conversion.adapters import AdapterCheckpoint
from megatron_sstoken.model.build import Model, build_model, load_weights
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weights import HuggingFaceWeights, rules_of_chunk, to_hugging_face
from megatron_sstoken.parallel import create_layout, start_processes
from megatron_sstoken.training.checkpoint import (
    RunState,
    read_run_state,
    resolve_checkpoint,
    save_checkpoint,
)
from megatron_sstoken.training.setup import WeightsSource

_SHARD_BYTES = 5 * 10**9
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", "safetensors.index.json")
_PRECISION: dict[torch.dtype, Literal["bf16", "fp32"]] = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def to_hf(
    checkpoint: str, output: str, *, hf_path: str | None = None, overwrite: bool = False, merge: bool = False
) -> Path:
    """Write a Hugging Face folder (config, safetensors with index, tokenizer) from a megatron checkpoint.

    `checkpoint`: a checkpoint folder or a directory of them (the newest is taken). `hf_path`: the folder that config
    and tokenizer are copied from; default: the one that the checkpoint names. Weights keep the checkpoint's dtype;
    padded vocabulary rows are left out. Of a LoRA run the adapters are written as a PEFT folder, or, with `merge`, the
    whole model with the adapters in its weights. The output appears complete or not at all. Raises ValueError for missing or
    unfitting input and for an output in the way.
    """
    folder = resolve_checkpoint(checkpoint)
    source = hf_path or read_run_state(folder).hf_path
    if not os.path.isdir(source):
        raise ValueError(f"{folder} was made from {source}, which is not there: name the folder with --hf")
    adapters = AdapterCheckpoint(folder) if merge or read_run_state(folder).adapters else None
    if adapters is not None and not merge:
        return _write_adapters(adapters, source, hf_path, output, overwrite)
    weights = adapters.base(source) if adapters is not None else WeightsSource(source, str(folder))
    target, partial = _prepare_output(output, overwrite)
    model = _single_process_model(source, _dtype_of(folder))
    weights.load(model)
    tensors = _hugging_face_tensors(model)
    _write_weights(partial, tensors if adapters is None else adapters.merged(tensors))
    copy_companions(Path(source), partial, dtype=model.config.params_dtype)
    return _publish(partial, target)


def _write_adapters(adapters: AdapterCheckpoint, source: str, named: str | None, output: str, overwrite: bool) -> Path:
    """`named`: the base's Hugging Face folder, where the user named one."""
    base_checkpoint = adapters.identity.base_checkpoint
    if base_checkpoint is None:
        adapters.base(source)
    elif named is None:
        raise ValueError(
            f"the adapters of {adapters.folder} belong to the weights of {base_checkpoint}: export those with to-hf and name "
            "their folder with --hf, or pass --merge"
        )
    target, partial = _prepare_output(output, overwrite)
    adapters.write_peft(partial, os.path.abspath(source))
    return _publish(partial, target)


def from_hf(hf_path: str, output: str, *, overwrite: bool = False) -> Path:
    """Write a megatron checkpoint `output`/step_0000000 from a Hugging Face folder, in the dtype of its tensors.

    It loads on any layout (`model.checkpoint`). Raises ValueError as `to_hf` does.
    """
    weights = HuggingFaceWeights(hf_path)
    dtypes = {weights.slice(name).get_dtype() for name in weights.names()}
    if dtypes <= {"BF16"}:
        dtype = torch.bfloat16
    elif dtypes <= {"F32", "BF16", "F16"}:
        dtype = torch.float32
    else:
        raise ValueError(
            f"{hf_path} holds tensors of type {', '.join(sorted(dtypes))}: only F32, BF16 and F16 are read"
        )
    target, partial = _prepare_output(output, overwrite)
    model = _single_process_model(hf_path, dtype)
    load_weights(model, hf_path)
    state = RunState(step=0, identity=None, hf_path=os.path.abspath(hf_path))
    save_checkpoint(str(partial), state, model, None, None, keep=0)
    return _publish(partial, target)


def _single_process_model(hf_path: str, dtype: torch.dtype) -> Model:
    start_processes()
    settings = Settings()
    settings.training.precision = _PRECISION[dtype]
    layout = create_layout(settings.parallel, seed=0)
    return build_model(read_architecture(hf_path), settings, layout, trainable=False)


def _dtype_of(folder: Path) -> torch.dtype:
    """Dtype of the weights in a megatron checkpoint."""
    start_processes()
    tensors = dist_checkpointing.load_tensors_metadata(str(folder))
    dtype = next(tensor.dtype for name, tensor in tensors.items() if name.startswith("decoder."))
    if dtype not in _PRECISION:
        raise ValueError(f"{folder} holds weights of type {dtype}: only {', '.join(map(str, _PRECISION))} are known")
    return dtype


def _hugging_face_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of a model that one process holds whole."""
    (chunk,) = model.bare
    rules = rules_of_chunk(chunk, model.architecture)
    with torch.no_grad():
        for name, parameter in tqdm(list(chunk.named_parameters()), desc="weights", unit="tensor"):
            rule, layer = rules[name]
            yield from to_hugging_face(rule, layer, parameter, model.architecture)


def _write_weights(folder: Path, tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    """Write safetensors files of at most 5 GB each, and the index if there are several."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = pending_bytes = 0

    def flush() -> None:
        nonlocal pending, pending_bytes
        if pending:
            save_file(pending, folder / f"shard-{len(shards)}.safetensors", metadata={"format": "pt"})
            shards.append(list(pending))
            pending, pending_bytes = {}, 0

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending_bytes + size > _SHARD_BYTES:
            flush()
        pending[name] = tensor.detach().cpu()
        pending_bytes += size
        total += size
    flush()
    if len(shards) == 1:
        os.replace(folder / "shard-0.safetensors", folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file_name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(folder / f"shard-{number}.safetensors", folder / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def copy_companions(source: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Copy configuration, tokenizer and template, everything but weights; config.json is told the weights' dtype."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _prepare_output(output: str, overwrite: bool) -> tuple[Path, Path]:
    target = Path(output)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: name another --output, or pass --overwrite")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return target, partial


def _publish(partial: Path, target: Path) -> Path:
    if target.exists():
        shutil.rmtree(target)
    os.replace(partial, target)
    return target
