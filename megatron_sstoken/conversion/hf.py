"""Whole checkpoints between Hugging Face folders and megatron's `dist_checkpointing`, streaming, in one process.

At no time are there more tensors in memory than `ConversionOptions.max_memory` allows, whatever the model's size.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_sstoken import __version__
from megatron_sstoken.checkpoint.manifest import Checkpoint, RunState, open_checkpoint
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.config import ModelSettings
from megatron_sstoken.conversion.adapters import AdapterCheckpoint
from megatron_sstoken.conversion.chat_template import export_stop, export_template
from megatron_sstoken.conversion.contents import Parameter, checkpoint_contents
from megatron_sstoken.conversion.folder import FolderReader, copy_companions
from megatron_sstoken.conversion.output import sources_of, write_checkpoint, write_safetensors
from megatron_sstoken.conversion.torch_dist import CheckpointReader
from megatron_sstoken.conversion.work import (
    ConversionOptions,
    Workplace,
    check_memory,
    refuse_existing,
)
from megatron_sstoken.model.dtypes import DTYPES
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.weights import check_weights


def _reader_of(source: WeightsSource) -> FolderReader | CheckpointReader:
    return FolderReader(source.hf_path) if source.checkpoint is None else CheckpointReader(Path(source.checkpoint))


def _write_adapters(
    adapters: AdapterCheckpoint,
    source: str,
    named: str | None,
    output: str,
    options: ConversionOptions,
    template: str | None,
    tell: Callable[[str], None],
) -> Path:
    """`named`: the base's Hugging Face folder, where the user named one."""
    base_checkpoint = adapters.identity.base_checkpoint
    if base_checkpoint is None:
        adapters.base(source)
    elif named is None:
        raise ValueError(
            f"the adapters of {adapters.folder} belong to the weights of {base_checkpoint}: export those with to-hf and name "
            "their folder with --hf, or pass --merge"
        )
    identity = {
        "operation": "adapters",
        "version": __version__,
        "source": adapters.fingerprint,
        "chat_template": template,
    }
    with Workplace(output, identity, options.checked(adapters.folder)) as place:
        adapters.write_peft(place.folder, os.path.abspath(source))
        tell(export_template(place.folder, template))
        return place.publish()


def to_hf(
    checkpoint: str,
    output: str,
    *,
    hf_path: str | None = None,
    options: ConversionOptions | None = None,
    merge: bool = False,
    chat_template: Literal["data", "own"] = "data",
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a Hugging Face folder (config, safetensors with index, tokenizer) from a megatron checkpoint.

    `checkpoint`: a checkpoint folder or a directory of them (the newest is taken), of any layout; its optimizer state is
    not read. `hf_path`: the folder that config and tokenizer are copied from; default: the one that the checkpoint
    names. Padded vocabulary rows are left out. Of a LoRA run the adapters are written as a PEFT folder, or, with `merge`,
    the whole model with the adapters in its weights: where the head is tied to an embedding with an adapter, which it has no
    part in, as a model whose head is not tied. `chat_template`: the one that the run's data was prepared with
    (`export_template`), or the tokenizer's own; `tell` hears which was written. The output appears complete or not
    at all. Raises ValueError for missing or unfitting input and for an output in the way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [checkpoint, *([hf_path] if hf_path else [])])
    opened = open_checkpoint(checkpoint)
    folder, source = opened.folder, _architecture_folder(opened, hf_path)
    template = opened.state.chat_template if chat_template == "data" else None
    architecture = read_architecture(source)
    adapters = AdapterCheckpoint(opened, architecture) if merge or opened.state.adapters else None
    if adapters is not None and not merge:
        return _write_adapters(adapters, source, hf_path, output, options, template, tell)
    contents = checkpoint_contents(architecture)  # unpadded
    reader = _reader_of(WeightsSource(source, str(folder)) if adapters is None else adapters.base(source))
    reader.check(contents)
    stored = reader.dtype(contents.parameters[0])
    dtype = DTYPES[options.dtype] if options.dtype else stored
    costs = {parameter.name: _cost(parameter, reader.dtype(parameter), dtype) for parameter in contents.parameters}
    apart = adapters is not None and adapters.parts_head
    if adapters is not None:
        each = 8 + (dtype.itemsize if apart else 0)  # product of the matrices and sum, in fp32; the embedding once more
        costs = {parameter.name: costs[parameter.name] + each * parameter.numel for parameter in contents.parameters}
    check_memory(options.max_memory, costs)
    identity = _identity("to-hf", dtype, options, [folder / ".metadata", *reader.identifying_files()])
    identity["chat_template"] = template
    with Workplace(output, identity, options.checked(folder, reader.folder)) as place:
        write_safetensors(place, [*sources_of(reader, contents, dtype, costs, adapters)], options)
        changes = {"tie_word_embeddings": False} if apart else {}
        copy_companions(Path(source), place.folder, dtype=dtype, changes=changes)
        if apart:
            tell(
                "embedding and head are written apart (tie_word_embeddings: false): the adapter is of the embedding alone"
            )
        tell(export_template(place.folder, template))
        if template is not None and (stop := export_stop(place.folder)):
            tell(stop)
        return place.publish()


def from_hf(
    hf_path: str,
    output: str,
    *,
    options: ConversionOptions | None = None,
    vocabulary_multiple: int = ModelSettings.vocabulary_multiple,
) -> Path:
    """Write a megatron checkpoint `output`/step_0000000 from a Hugging Face folder.

    It loads on any layout (`model.checkpoint`). Default type: that of the tensors, F32 where it is F16 or mixed. Raises
    ValueError as `to_hf` does.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [hf_path])
    reader = FolderReader(hf_path)
    check_weights(reader.weights, reader.architecture)
    types = reader.types
    contents = checkpoint_contents(reader.architecture, vocabulary_multiple=vocabulary_multiple)
    dtype = _megatron_dtype(options, torch.bfloat16 if types == {torch.bfloat16} else torch.float32)
    costs = {parameter.name: _cost(parameter, reader.dtype(parameter), dtype) for parameter in contents.parameters}
    identity = _identity("from-hf", dtype, options, reader.identifying_files())
    identity["vocabulary_multiple"] = vocabulary_multiple
    reader.release()
    state = RunState(step=0, identity=None, hf_path=os.path.abspath(hf_path))
    return write_checkpoint(
        output,
        identity,
        contents,
        dtype,
        costs,
        options,
        state,
        reader.read,
        options.checked(reader.folder),
        release=reader.release,
        runs=reader.runs,
    )


def reshard(
    checkpoint: str,
    output: str,
    *,
    vocabulary_multiple: int = ModelSettings.vocabulary_multiple,
    hf_path: str | None = None,
    options: ConversionOptions | None = None,
) -> Path:
    """Write the weights of a checkpoint as a new one, `output`/step_0000000, with another vocabulary padding or type.

    Raises ValueError as `to_hf` does.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite, [checkpoint, *([hf_path] if hf_path else [])])
    opened = open_checkpoint(checkpoint)
    folder, source = opened.folder, _architecture_folder(opened, hf_path)
    reader = CheckpointReader(folder)
    architecture = read_architecture(source)
    stored = checkpoint_contents(architecture)
    reader.check(stored)
    unpadded = {parameter.name: parameter for parameter in stored.parameters}
    contents = checkpoint_contents(architecture, vocabulary_multiple=vocabulary_multiple)
    dtype = _megatron_dtype(options, reader.dtype(unpadded[contents.parameters[0].name]))
    costs = {
        parameter.name: _cost(parameter, reader.dtype(unpadded[parameter.name]), dtype)
        for parameter in contents.parameters
    }
    identity = _identity("reshard", dtype, options, [folder / ".metadata", Path(source, "config.json")])
    identity["vocabulary_multiple"] = vocabulary_multiple

    def read(parameter: Parameter) -> torch.Tensor:
        real = unpadded[parameter.name]
        if real.shape == parameter.shape:
            return reader.read(real)
        padded = torch.zeros(parameter.shape, dtype=reader.dtype(real))
        reader.read(real, into=padded[: real.shape[0]])
        return padded

    template = opened.state.chat_template
    state = RunState(step=0, identity=None, hf_path=os.path.abspath(source), chat_template=template)
    sources = options.checked(reader.folder)
    return write_checkpoint(output, identity, contents, dtype, costs, options, state, read, sources)


def _architecture_folder(checkpoint: Checkpoint, hf_path: str | None) -> str:
    source = hf_path or checkpoint.state.hf_path
    if not os.path.isdir(source):
        raise ValueError(f"{checkpoint.folder} was made from {source}, which is not there: name the folder with --hf")
    return source


def _megatron_dtype(options: ConversionOptions, default: torch.dtype) -> torch.dtype:
    dtype = DTYPES[options.dtype] if options.dtype else default
    if dtype is torch.float16:
        raise ValueError("--dtype=fp16 is for to-hf: training runs in bf16 or fp32, so use one of these")
    return dtype


def _cost(parameter: Parameter, source: torch.dtype, target: torch.dtype) -> int:
    """Bytes that are in memory while a parameter is converted.

    The pages of the mapped source, the parameter put together from them, the tensors it is taken apart into where it
    fuses several or is turned round, and what these are converted to.
    """
    size = parameter.numel * source.itemsize
    converted = parameter.numel * target.itemsize if target is not source else 0
    taken_apart = len(parameter.rule.hugging_face) > 1 or parameter.rule.stacked
    return 2 * size + (size if taken_apart else 0) + converted


def _identity(operation: str, dtype: torch.dtype, options: ConversionOptions, sources: list[Path]) -> dict[str, Any]:
    return {
        "operation": operation,
        "version": __version__,
        "dtype": str(dtype),
        "shard_size": options.shard_size,
        "source": fingerprint_files(map(str, sources)),
    }
