"""Write what a conversion makes: safetensors files or a megatron checkpoint, several files in parallel."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sstoken.checkpoint.manifest import RunState, write_run_state
from megatron_sstoken.conversion.adapters import AdapterCheckpoint
from megatron_sstoken.conversion.contents import Contents, Parameter
from megatron_sstoken.conversion.folder import FolderReader, ThreadWeights
from megatron_sstoken.conversion.runs import NumberedRows, Run, RunCopier
from megatron_sstoken.conversion.safetensors_files import INDEX, ShardWriter, index_text, plan_shards
from megatron_sstoken.conversion.torch_dist import (
    CheckpointReader,
    copy_parameter,
    without_zip_checksums,
    write_metadata,
    write_objects,
    write_parameter,
)
from megatron_sstoken.conversion.work import (
    ConversionOptions,
    MemoryBudget,
    Workplace,
    check_memory,
    limit_freed_memory,
    progress_bar,
    run_tasks,
)
from megatron_sstoken.files import naming, write_durably
from megatron_sstoken.model.dtypes import stored_dtype
from megatron_sstoken.model.lora_targets import EMBEDDING, WHOLE_TENSORS

_OBJECTS_FILE = "__0_0.distcp"
_FILES, _SMALLEST_FILE = 16, 64 << 20


def convert_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor` as a model of `dtype` has one of this name. Raises ValueError where fp16 cannot hold a value."""
    dtype = stored_dtype(name, dtype)
    if dtype is torch.float16 and tensor.dtype is not dtype:
        low, high = torch.aminmax(tensor)
        if max(-low.item(), high.item()) > torch.finfo(dtype).max:
            raise ValueError(f"{name} has values that fp16 cannot hold: use --dtype=bf16 or fp32")
    return tensor.to(dtype)


@dataclass(frozen=True)
class Source:
    """Where tensors of safetensors files come from that are made together."""

    tensors: dict[str, torch.Tensor]
    """Name → a meta tensor of its shape and type, in the order of the files."""
    cost: int
    """Bytes in memory while they are made."""
    make: Callable[[], Iterator[tuple[str, torch.Tensor]]]
    """The tensors, or this part of them along their first axis."""
    part: int | None = None
    runs: Callable[[], dict[str, list[Run]] | None] = lambda: None
    """Where the bytes of each tensor lie in files; None where they have to be made."""


def sources_of(
    reader: FolderReader | CheckpointReader,
    contents: Contents,
    dtype: torch.dtype,
    costs: dict[str, int],
    adapters: AdapterCheckpoint | None,
) -> Iterator[Source]:
    """The Hugging Face tensors of a checkpoint's weights, parameter by parameter, with the adapters merged in; the head, where
    they part it from the embedding, as the base has both."""
    apart = adapters is not None and adapters.parts_head
    heads = {WHOLE_TENSORS[EMBEDDING]: WHOLE_TENSORS["lm_head"]} if apart else {}

    def make(parameter: Parameter) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in parameter.hugging_face(reader.read(parameter), contents.architecture):
            merged = adapters.merged(name, tensor, parameter.rule.part) if adapters else tensor
            yield name, convert_dtype(name, merged, dtype)
            if name in heads:
                yield heads[name], convert_dtype(heads[name], tensor, dtype)

    def runs(parameter: Parameter) -> dict[str, list[Run]] | None:
        if adapters is not None or parameter.rule.stacked:
            return None
        if (whole := reader.runs(parameter, stored_dtype(parameter.name, dtype))) is None:
            return None
        rows = NumberedRows()
        tensors = parameter.hugging_face(rows.of(parameter.shape, whole), contents.architecture)
        return {name: rows.runs(numbers) for name, numbers in tensors}

    for parameter in contents.parameters:
        part = parameter.rule.part
        parts = 1 if part is None else contents.architecture.num_experts
        tensors = {
            name: torch.empty(
                tensor.shape if part is None else (parts, *tensor.shape), dtype=stored_dtype(name, dtype), device="meta"
            )
            for own, tensor in parameter.hugging_face(parameter.meta_tensor(), contents.architecture)
            for name in ((own, heads[own]) if own in heads else (own,))
        }
        yield Source(tensors, costs[parameter.name], partial(make, parameter), part, partial(runs, parameter))


def source_of(reader: ThreadWeights, name: str, written: str, dtype: torch.dtype) -> Source:
    """The tensor `name` of a folder, to be written by the name `written` in the type `dtype`; in its own, bit for bit."""
    stored = reader.weights.dtype(name)

    def make() -> Iterator[tuple[str, torch.Tensor]]:
        tensor = reader.weights.slice(name)[...]
        yield written, tensor if dtype is stored else convert_dtype(written, tensor, dtype)
        reader.release()

    def runs() -> dict[str, list[Run]] | None:
        as_it_is = dtype is stored and not reader.weights.pickled
        return {written: [Run(*reader.weights.place(name))]} if as_it_is else None

    made = torch.empty(reader.weights.slice(name).get_shape(), dtype=dtype, device="meta")
    return Source({written: made}, cost=2 * made.numel() * stored.itemsize + made.nbytes, make=make, runs=runs)


def check_costs(options: ConversionOptions, sources: Sequence[Source]) -> None:
    """Raise ValueError unless each of the sources fits the memory."""
    check_memory(options.max_memory, {name: source.cost for source in sources for name in source.tensors})


def write_safetensors(place: Workplace, sources: Sequence[Source], options: ConversionOptions) -> None:
    """Write safetensors files, all sources in parallel, and the index."""
    shards = plan_shards({name: one for source in sources for name, one in source.tensors.items()}, options.shard_size)
    total = sum(shard.size for shard in shards)
    place.require_space(total)
    writers: dict[str, ShardWriter] = {}
    for shard in shards:
        if shard.file_name not in place.complete:
            writer = ShardWriter(place.folder, shard)
            writers |= dict.fromkeys(shard.places, writer)
    budget = MemoryBudget(options.max_memory)
    limit_freed_memory(options.max_memory)
    done = sum(record["size"] for record in place.complete.values())

    def write(source: Source, check: Callable[[], None]) -> None:
        check()
        runs = source.runs()
        with budget.hold(source.cost if runs is None else copier.cost), torch.no_grad():
            for name, content in source.make() if runs is None else runs.items():
                writer = writers.get(name)
                if writer is None:  # in a file that is complete, while its siblings are in another
                    continue
                if isinstance(content, torch.Tensor):
                    size, is_last = content.nbytes, writer.write(name, content.contiguous(), part=source.part)
                else:
                    size, is_last = sum(run.length for run in content), writer.copy(name, content, copier)
                bar.update(size)
                if is_last:
                    place.add(writer.plan.file_name, writer.descriptor, {})

    try:
        with progress_bar(total, done, "writing") as bar, RunCopier(options.max_memory // options.workers) as copier:
            run_tasks(write, [one for one in sources if one.tensors.keys() & writers.keys()], options.workers)
    finally:
        for writer in set(writers.values()):
            writer.close()
    if len(shards) > 1:
        write_durably(place.folder / INDEX, index_text(shards))


def write_checkpoint(
    output: str,
    identity: dict[str, Any],
    contents: Contents,
    dtype: torch.dtype,
    costs: dict[str, int],
    options: ConversionOptions,
    state: RunState,
    read: Callable[[Parameter], torch.Tensor],
    sources: Sequence[Path],
    release: Callable[[], None] = lambda: None,
    runs: Callable[[Parameter, torch.dtype], list[Run] | None] = lambda parameter, dtype: None,
) -> Path:
    """Write a megatron checkpoint whose parameters `read` gives from the folders `sources`, several data files in parallel.

    `runs` tells where the bytes of a parameter of a type lie in files; None where it has to be read. `release` is called
    after each parameter that was: what it was read from may leave memory.
    """
    check_memory(options.max_memory, costs)
    files = _data_files(contents, dtype, options.shard_size)
    total = sum(_stored_bytes(one, dtype) for one in contents.parameters)
    budget = MemoryBudget(options.max_memory)
    limit_freed_memory(options.max_memory)

    def convert(parameter: Parameter, file: Any) -> list[dict[str, Any]]:
        places, stored = None, stored_dtype(parameter.name, dtype)
        if (found := runs(parameter, stored)) is not None:
            with budget.hold(copier.cost):
                places = copy_parameter(file, parameter, stored, found, copier)
        if places is None:
            with budget.hold(costs[parameter.name]), torch.no_grad():
                places = write_parameter(file, parameter, convert_dtype(parameter.name, read(parameter), dtype))
                release()
        bar.update(_stored_bytes(parameter, dtype))
        return places

    with Workplace(output, identity, sources) as place:
        folder = place.folder / f"step_{state.step:07d}"
        folder.mkdir(exist_ok=True)

        def write_file(name: str, check: Callable[[], None]) -> None:
            path = f"{folder.name}/{name}"
            with naming(place.folder / path), open(place.folder / path, "wb") as file:
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
            with without_zip_checksums(), RunCopier(options.max_memory // options.workers) as copier:
                run_tasks(write_file, todo, options.workers)
        records = json.loads(json.dumps(place.complete))  # alike whether written now or before
        write_metadata(folder, contents, dtype, {Path(name).name: records[name]["places"] for name in sorted(records)})
        write_run_state(folder, replace(state, split=[1, 1, "cpu"]))
        return place.publish(inside=folder.name)


def _data_files(contents: Contents, dtype: torch.dtype, shard_size: int) -> dict[str, list[Parameter]]:
    """Data files of at most `shard_size` bytes of tensors: name → parameters; the first holds the objects alone.

    Of a smaller model they are smaller, so that there is one for each worker, and one is flushed while another is written.
    """
    total = sum(_stored_bytes(one, dtype) for one in contents.parameters)
    shard_size = min(shard_size, max(total // _FILES, _SMALLEST_FILE))
    groups: list[list[Parameter]] = [[], []]
    filled = 0
    for parameter in contents.parameters:
        size = _stored_bytes(parameter, dtype)
        if groups[-1] and filled + size > shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(parameter)
        filled += size
    return {f"__0_{number}.distcp": group for number, group in enumerate(groups)}


def _stored_bytes(parameter: Parameter, dtype: torch.dtype) -> int:
    """Of a parameter of a model of `dtype`."""
    return parameter.numel * stored_dtype(parameter.name, dtype).itemsize
