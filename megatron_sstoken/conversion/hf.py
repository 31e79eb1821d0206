"""Whole checkpoints between Hugging Face folders and megatron's `dist_checkpointing`, streaming, in one process.

At no time are there more tensors in memory than `ConversionOptions.max_memory` allows, whatever the model's size.
"""

import functools
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_sstoken import __version__
from megatron_sstoken.checkpoint.manifest import Checkpoint, RunState, open_checkpoint, write_run_state
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.conversion.adapters import AdapterCheckpoint
from megatron_sstoken.conversion.contents import Contents, Parameter, checkpoint_contents
from megatron_sstoken.conversion.safetensors_files import INDEX, ShardWriter, index_text, plan_shards
from megatron_sstoken.conversion.torch_dist import CheckpointReader, write_metadata, write_objects, write_parameter
from megatron_sstoken.conversion.work import (
    ConversionOptions,
    MemoryBudget,
    Workplace,
    check_memory,
    progress_bar,
    refuse_existing,
    run_tasks,
    write_durably,
)
from megatron_sstoken.model.dtypes import DTYPES, SAFETENSORS_DTYPES
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.weights import HuggingFaceWeights, check_weights, read_shard

_WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", "safetensors.index.json", "bin.index.json",
)  # fmt: skip
_FOLDERS_OF_TEMPLATES = ("additional_chat_templates",)  # where transformers keeps templates with names
_OBJECTS_FILE = "__0_0.distcp"


class FolderReader:
    """The weights of a Hugging Face folder, parameter by parameter, as `CheckpointReader` gives those of a checkpoint."""

    def __init__(self, hf_path: str):
        self.hf_path = hf_path
        self._mine = threading.local()  # files that one worker closes must not be another's
        self.weights.close()  # a folder without weights is told before all else
        self.architecture = read_architecture(hf_path)

    @property
    def weights(self) -> HuggingFaceWeights:
        """The files as this thread has opened them."""
        if not hasattr(self._mine, "weights"):
            self._mine.weights = HuggingFaceWeights(self.hf_path)
        return self._mine.weights

    def identifying_files(self) -> list[Path]:
        """The files that decide what is read."""
        return [Path(self.hf_path, "config.json"), *map(Path, self.weights.files())]

    def check(self, contents: Contents) -> None:
        """Raise ValueError unless every tensor is there with its shape, and no others."""
        check_weights(self.weights, self.architecture)

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """The widest type of the folder's tensors."""
        return max(self.types, key=lambda one: one.itemsize)

    @functools.cached_property
    def types(self) -> set[torch.dtype]:
        """The types of all tensors; asked once, for a mixture has tens of thousands of them."""
        return _types(self.weights)

    def read(self, parameter: Parameter) -> torch.Tensor:
        """A whole parameter, in the type of its tensors."""
        return read_shard(self.weights, parameter.rule, parameter.layer, self.architecture, parameter.shape, 0, 1)

    def release(self) -> None:
        """Give back what this thread has mapped."""
        self.weights.close()


def _reader_of(source: WeightsSource) -> FolderReader | CheckpointReader:
    return FolderReader(source.hf_path) if source.checkpoint is None else CheckpointReader(Path(source.checkpoint))


def _write_adapters(adapters: AdapterCheckpoint, source: str, named: str | None, output: str) -> Path:
    """`named`: the base's Hugging Face folder, where the user named one."""
    base_checkpoint = adapters.identity.base_checkpoint
    if base_checkpoint is None:
        adapters.base(source)
    elif named is None:
        raise ValueError(
            f"the adapters of {adapters.folder} belong to the weights of {base_checkpoint}: export those with to-hf and name "
            "their folder with --hf, or pass --merge"
        )
    with Workplace(output, {"operation": "adapters", "version": __version__, "source": adapters.fingerprint}) as place:
        adapters.write_peft(place.folder, os.path.abspath(source))
        return place.publish()


def to_hf(
    checkpoint: str,
    output: str,
    *,
    hf_path: str | None = None,
    options: ConversionOptions | None = None,
    merge: bool = False,
) -> Path:
    """Write a Hugging Face folder (config, safetensors with index, tokenizer) from a megatron checkpoint.

    `checkpoint`: a checkpoint folder or a directory of them (the newest is taken), of any layout; its optimizer state is
    not read. `hf_path`: the folder that config and tokenizer are copied from; default: the one that the checkpoint
    names. Padded vocabulary rows are left out. Of a LoRA run the adapters are written as a PEFT folder, or, with `merge`,
    the whole model with the adapters in its weights. The output appears complete or not at all. Raises ValueError for
    missing or unfitting input and for an output in the way.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite)
    opened = open_checkpoint(checkpoint)
    folder, source = opened.folder, _architecture_folder(opened, hf_path)
    adapters = AdapterCheckpoint(opened) if merge or opened.state.adapters else None
    if adapters is not None and not merge:
        return _write_adapters(adapters, source, hf_path, output)
    contents = checkpoint_contents(read_architecture(source))  # unpadded
    reader = _reader_of(WeightsSource(source, str(folder)) if adapters is None else adapters.base(source))
    reader.check(contents)
    stored = reader.dtype(contents.parameters[0])
    dtype = DTYPES[options.dtype] if options.dtype else stored
    costs = {parameter.name: _cost(parameter, reader.dtype(parameter), dtype) for parameter in contents.parameters}
    if adapters is not None:  # the product of the matrices and the sum, in fp32
        costs = {parameter.name: costs[parameter.name] + 8 * parameter.numel for parameter in contents.parameters}
    check_memory(options.max_memory, costs)
    identity = _identity("to-hf", dtype, options, [folder / ".metadata", *reader.identifying_files()])
    with Workplace(output, identity) as place:
        _write_safetensors(place, reader, contents, dtype, costs, options, adapters)
        copy_companions(Path(source), place.folder, dtype=dtype)
        return place.publish()


def from_hf(
    hf_path: str, output: str, *, options: ConversionOptions | None = None, vocabulary_multiple: int = 128
) -> Path:
    """Write a megatron checkpoint `output`/step_0000000 from a Hugging Face folder.

    It loads on any layout (`model.checkpoint`). Default type: that of the tensors, F32 where it is F16 or mixed. Raises
    ValueError as `to_hf` does.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite)
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
    return _write_checkpoint(
        output, identity, contents, dtype, costs, options, state, reader.read, release=reader.release
    )


def reshard(
    checkpoint: str,
    output: str,
    *,
    vocabulary_multiple: int = 128,
    hf_path: str | None = None,
    options: ConversionOptions | None = None,
) -> Path:
    """Write the weights of a checkpoint as a new one, `output`/step_0000000, with another vocabulary padding or type.

    Raises ValueError as `to_hf` does.
    """
    options = options or ConversionOptions()
    refuse_existing(output, options.overwrite)
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

    state = RunState(step=0, identity=None, hf_path=os.path.abspath(source))
    return _write_checkpoint(output, identity, contents, dtype, costs, options, state, read)


def _architecture_folder(checkpoint: Checkpoint, hf_path: str | None) -> str:
    source = hf_path or checkpoint.state.hf_path
    if not os.path.isdir(source):
        raise ValueError(f"{checkpoint.folder} was made from {source}, which is not there: name the folder with --hf")
    return source


def _types(weights: HuggingFaceWeights) -> set[torch.dtype]:
    names = {weights.slice(name).get_dtype() for name in weights.names()}
    if not names <= set(SAFETENSORS_DTYPES):
        raise ValueError(
            f"{weights.path} holds tensors of type {', '.join(sorted(names))}: only F32, BF16 and F16 are read"
        )
    return {SAFETENSORS_DTYPES[name] for name in names}


def _megatron_dtype(options: ConversionOptions, default: torch.dtype) -> torch.dtype:
    dtype = DTYPES[options.dtype] if options.dtype else default
    if dtype is torch.float16:
        raise ValueError("--dtype=fp16 is for to-hf: training runs in bf16 or fp32, so use one of these")
    return dtype


def _hugging_face_shapes(contents: Contents) -> Iterator[tuple[str, torch.Size]]:
    for parameter in contents.parameters:
        for name, tensor in parameter.hugging_face(parameter.meta_tensor(), contents.architecture):
            yield name, tensor.shape


def _cost(parameter: Parameter, source: torch.dtype, target: torch.dtype) -> int:
    """Bytes that are in memory while a parameter is converted.

    The pages of the mapped source, the parameter put together from them, the tensors it is taken apart into where it
    fuses several, and what these are converted to.
    """
    size = parameter.numel * source.itemsize
    converted = parameter.numel * target.itemsize if target is not source else 0
    return 2 * size + (size if len(parameter.rule.hugging_face) > 1 else 0) + converted


def _identity(operation: str, dtype: torch.dtype, options: ConversionOptions, sources: list[Path]) -> dict[str, Any]:
    return {
        "operation": operation,
        "version": __version__,
        "dtype": str(dtype),
        "shard_size": options.shard_size,
        "source": fingerprint_files(map(str, sources)),
    }


def convert_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`. Raises ValueError where fp16 cannot hold a value."""
    if dtype is torch.float16 and tensor.dtype is not dtype:
        low, high = torch.aminmax(tensor)
        if max(-low.item(), high.item()) > torch.finfo(dtype).max:
            raise ValueError(f"{name} has values that fp16 cannot hold: use --dtype=bf16 or fp32")
    return tensor.to(dtype)


def _write_safetensors(
    place: Workplace,
    reader: FolderReader | CheckpointReader,
    contents: Contents,
    dtype: torch.dtype,
    costs: dict[str, int],
    options: ConversionOptions,
    adapters: AdapterCheckpoint | None,
) -> None:
    """Write the weights of a checkpoint as safetensors files, all parameters in parallel, and the index."""
    shards = plan_shards(dict(_hugging_face_shapes(contents)), dtype, options.shard_size)
    total = sum(shard.size for shard in shards)
    place.require_space(total)
    writers: dict[str, ShardWriter] = {}
    for shard in shards:
        if shard.file_name not in place.complete:
            writer = ShardWriter(place.folder, shard)
            writers |= dict.fromkeys(shard.places, writer)
    budget = MemoryBudget(options.max_memory)
    done = sum(record["size"] for record in place.complete.values())

    def convert(parameter: Parameter, check: Callable[[], None]) -> None:
        check()
        with budget.hold(costs[parameter.name]), torch.no_grad():
            for name, tensor in parameter.hugging_face(reader.read(parameter), contents.architecture):
                writer = writers.get(name)
                if writer is None:  # in a file that is complete, while its siblings are in another
                    continue
                merged = adapters.merged(name, tensor) if adapters else tensor
                is_last = writer.write(name, convert_dtype(name, merged, dtype).contiguous())
                bar.update(writer.plan.places[name][1])
                if is_last:
                    place.add(writer.plan.file_name, writer.descriptor, {})

    def missing(parameter: Parameter) -> bool:
        parts = parameter.hugging_face(parameter.meta_tensor(), contents.architecture)
        return any(name in writers for name, _ in parts)

    try:
        with progress_bar(total, done, "writing") as bar:
            run_tasks(convert, [one for one in contents.parameters if missing(one)], options.workers)
    finally:
        for writer in set(writers.values()):
            writer.close()
    if len(shards) > 1:
        write_durably(place.folder / INDEX, index_text(shards))


def _write_checkpoint(
    output: str,
    identity: dict[str, Any],
    contents: Contents,
    dtype: torch.dtype,
    costs: dict[str, int],
    options: ConversionOptions,
    state: RunState,
    read: Callable[[Parameter], torch.Tensor],
    release: Callable[[], None] = lambda: None,
) -> Path:
    """Write a megatron checkpoint whose parameters `read` gives, several data files in parallel.

    `release` is called after each parameter: what it was read from may leave memory.
    """
    check_memory(options.max_memory, costs)
    files = _data_files(contents, dtype, options.shard_size)
    total = sum(one.numel for one in contents.parameters) * dtype.itemsize
    budget = MemoryBudget(options.max_memory)

    def convert(parameter: Parameter, file: Any) -> list[dict[str, Any]]:
        with budget.hold(costs[parameter.name]), torch.no_grad():
            places = write_parameter(file, parameter, convert_dtype(parameter.name, read(parameter), dtype))
            release()
        bar.update(parameter.numel * dtype.itemsize)
        return places

    with Workplace(output, identity) as place:
        folder = place.folder / f"step_{state.step:07d}"
        folder.mkdir(exist_ok=True)

        def write_file(name: str, check: Callable[[], None]) -> None:
            path = f"{folder.name}/{name}"
            with open(place.folder / path, "wb") as file:
                places = []
                for parameter in files[name]:
                    check()
                    places += convert(parameter, file)
                if name == _OBJECTS_FILE:
                    places += write_objects(file, contents)
                file.flush()
                place.add(path, file.fileno(), {"places": places})

        place.require_space(total)
        done = sum(record["size"] for record in place.complete.values())
        with progress_bar(total, min(done, total), "writing") as bar:
            todo = [name for name in files if f"{folder.name}/{name}" not in place.complete]
            run_tasks(write_file, todo, options.workers)
        records = json.loads(json.dumps(place.complete))  # alike whether written now or before
        write_metadata(folder, contents, dtype, {Path(name).name: records[name]["places"] for name in sorted(records)})
        write_run_state(folder, replace(state, split=[1, 1, "cpu"]))
        return place.publish()


def _data_files(contents: Contents, dtype: torch.dtype, shard_size: int) -> dict[str, list[Parameter]]:
    """Data files of at most `shard_size` bytes of tensors: name → parameters; the first holds the objects alone."""
    groups: list[list[Parameter]] = [[], []]
    filled = 0
    for parameter in contents.parameters:
        size = parameter.numel * dtype.itemsize
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


def copy_companions(source: Path, target: Path, *, dtype: torch.dtype) -> None:
    """Copy configuration, tokenizer and templates, everything but weights; config.json is told the weights' dtype."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS_OF_TEMPLATES:
            shutil.copytree(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[key] = str(dtype).removeprefix("torch.")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
