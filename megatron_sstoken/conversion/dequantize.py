"""A folder of quantised weights (FP8 by blocks or by tensors, MXFP4) → the same folder with weights of a usual type."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_sstoken.conversion.folder import ThreadWeights, copy_companions, folders_identity
from megatron_sstoken.conversion.number_formats import MXFP4_BLOCK, fp8_matrix, mxfp4_matrix, scale_numbers
from megatron_sstoken.conversion.output import Source, check_costs, source_of, write_safetensors
from megatron_sstoken.conversion.work import ConversionOptions, Workplace, refuse_existing, run_tasks
from megatron_sstoken.files import read_json, write_json
from megatron_sstoken.folders import model_folder_problem
from megatron_sstoken.model.dtypes import DTYPES, SAFETENSORS_DTYPES
from megatron_sstoken.model.quantised import DEQUANTISED, FIELD, quantisation_of
from megatron_sstoken.model.weight_files import HuggingFaceWeights

_FP8, _BYTE = "F8_E4M3", "U8"
_SCALE_TYPES = (*SAFETENSORS_DTYPES, "F8_E8M0", _BYTE)
"""Types by their names in safetensors."""
_BLOCK = [128, 128]
"""What a folder without `weight_block_size` means, as in transformers; null there means scales of whole tensors."""
_OF_OTHERS = {"fp8": ("_scale_inv", "activation_scale"), "mxfp4": ("_blocks", "_scales")}
"""How names of tensors end that mean nothing without another."""
_AGAIN = "download the model again"

Matrix = Callable[[torch.Tensor, torch.Tensor, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class _Quantised:
    """A tensor of the model that a folder holds as codes and scales."""

    name: str
    codes: str
    scales: str
    """Names in the folder."""
    shape: tuple[int, ...]
    """Of the tensor, which is a matrix, or one for each expert."""
    matrix: Matrix
    """Codes and scales of one matrix, and a type → the matrix."""
    unused: str | None = None
    """Another tensor that goes with it, of how inputs are quantised in inference."""


def dequantize(
    hf_path: str,
    output: str,
    *,
    options: ConversionOptions | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a folder whose quantised weights have become numbers of `options.dtype` (bf16, the default, or fp32).

    They are those that transformers computes: codes times scales in fp32, then rounded. All other tensors keep their bits, and
    all other files are copied; config.json loses its `quantization_config`. `tell` hears what was done. The output appears
    complete or not at all. Raises ValueError for a folder that is not quantised, or by another method, for scales that are
    missing, alone, of a wrong shape or not finite, and for an output in the way.
    """
    options = options or ConversionOptions()
    if options.dtype == "fp16":
        raise ValueError("--dtype=fp16 is not for dequantize: use bf16 or fp32")
    refuse_existing(output, options.overwrite, [hf_path])
    if problem := model_folder_problem(hf_path):
        raise ValueError(problem)
    quantisation = quantisation_of(read_json(Path(hf_path, "config.json")))
    reader, dtype = ThreadWeights(hf_path), DTYPES[options.dtype or "bf16"]
    found = _find(reader.weights, quantisation)
    kept = _others(reader.weights, quantisation["quant_method"], found)
    by_name = {one.name: _sources(reader, one, dtype) for one in found}
    by_name |= {name: [source_of(reader, name, name, reader.weights.dtype(name))] for name in kept}
    sources = [source for name in sorted(by_name) for source in by_name[name]]
    check_costs(options, sources)
    _check_scales(reader, found, options.workers)
    with Workplace(output, folders_identity("dequantize", options, [hf_path]), options.checked(hf_path)) as place:
        write_safetensors(place, sources, options)
        copy_companions(Path(hf_path), place.folder, dtype=dtype)
        write_json(place.folder / "config.json", _not_quantised(read_json(place.folder / "config.json")))
        tell(f"made {str(dtype).removeprefix('torch.')}: {len(found)} tensors; kept as they are: {len(kept)}")
        return place.publish()


def _find(weights: HuggingFaceWeights, config: dict[str, Any]) -> list[_Quantised]:
    """The quantised tensors of a folder whose `quantization_config` is `config`."""
    method = config.get("quant_method")
    if not config:
        raise ValueError(
            f"{weights.path}/config.json has no {FIELD}: without one nothing tells how weights are quantised"
        )
    if method not in DEQUANTISED:
        raise ValueError(
            f"{weights.path}: weights quantised by {method!r} are not read: only {' and '.join(DEQUANTISED)} are: name a "
            "folder of those, or of BF16 weights"
        )
    weights.check_index()
    if method == "fp8":
        block = _block_size(weights.path, config)
        found = [_fp8(weights, name, block) for name in weights.names() if _kind(weights, name) == _FP8]
    else:
        found = [_mxfp4(weights, name) for name in weights.names() if name.endswith("_blocks")]
    if not found:
        raise ValueError(f"{weights.path} holds no tensor of {method}, though config.json says so: {_AGAIN}")
    return found


def _kind(weights: HuggingFaceWeights, name: str) -> str:
    """The type of a tensor, by its name in safetensors."""
    kind: str = weights.slice(name).get_dtype()
    return kind


def _block_size(path: str, config: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None: what a scale is of follows from how many there are."""
    size = config.get("weight_block_size", _BLOCK)
    if size is None:
        return None
    if not isinstance(size, list) or len(size) != 2 or not all(type(one) is int and one > 0 for one in size):
        raise ValueError(
            f"{path}: weight_block_size={size!r} is not possible: only two whole numbers above 0, or null, are"
        )
    return size[0], size[1]


def _fp8(weights: HuggingFaceWeights, name: str, block: tuple[int, int] | None) -> _Quantised:
    """The tensor `name`, [rows, columns] or [experts, rows, columns] in FP8; its scale has its name and `_scale_inv`."""
    scales = f"{name}_scale_inv"
    shape, grid = _shapes(weights, name, scales, _SCALE_TYPES)
    *experts, rows, columns = shape if len(shape) in (2, 3) else [0, 0]
    if 0 in (rows, columns):
        raise ValueError(
            f"{weights.path}: {name} has the shape {shape}: only matrices, and one for each expert, are read in FP8: {_AGAIN}"
        )
    if block is not None:
        wanted = [*experts, -(-rows // block[0]), -(-columns // block[1])]
        if grid != wanted:
            raise ValueError(
                f"{weights.path}: {scales} has the shape {grid}: with weight_block_size={[*block]} {name} {shape} needs "
                f"{wanted}: {_AGAIN}"
            )
    else:
        if grid in ([], [1], experts) and len(grid) < len(shape):
            grid = [*experts, 1, 1]  # one of each matrix
        if len(grid) != len(shape) or grid[:-2] != experts or 0 in grid or rows % grid[-2] or columns % grid[-1]:
            raise ValueError(
                f"{weights.path}: {scales} has the shape {grid}: without weight_block_size it has one number, or one for each "
                f"of equal parts of {name} {shape}: {_AGAIN}"
            )
        block = rows // grid[-2], columns // grid[-1]
    stem = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    inputs = f"{stem}activation_scale"
    matrix = partial(fp8_matrix, block=block)
    return _Quantised(name, name, scales, tuple(shape), matrix, inputs if inputs in weights else None)


def _mxfp4(weights: HuggingFaceWeights, blocks: str) -> _Quantised:
    """A tensor of all experts, [experts, inputs, outputs], of which a folder holds `…_blocks` and `…_scales`."""
    name = blocks.removesuffix("_blocks")
    scales = f"{name}_scales"
    shape, grid = _shapes(weights, blocks, scales, (_BYTE,))
    kind = _kind(weights, blocks)
    if len(shape) != 4 or shape[-1] != MXFP4_BLOCK // 2 or 0 in shape or kind != _BYTE:
        raise ValueError(
            f"{weights.path}: {blocks} has the shape {shape} and the type {kind}: only [experts, outputs, blocks, "
            f"{MXFP4_BLOCK // 2}] of {_BYTE} is read: {_AGAIN}"
        )
    if grid != shape[:-1]:
        raise ValueError(f"{weights.path}: {scales} has the shape {grid}: {blocks} needs {shape[:-1]}: {_AGAIN}")
    experts, outputs, groups, _ = shape
    return _Quantised(name, blocks, scales, (experts, groups * MXFP4_BLOCK, outputs), mxfp4_matrix)


def _shapes(weights: HuggingFaceWeights, codes: str, scales: str, types: Sequence[str]) -> tuple[list[int], list[int]]:
    """Shapes of codes and of their scales, which are there, in one of `types`."""
    if scales not in weights:
        raise ValueError(f"{weights.path}: {codes} is quantised, and its scales, {scales}, are missing: {_AGAIN}")
    if (kind := _kind(weights, scales)) not in types:
        raise ValueError(
            f"{weights.path}: {scales} is of type {kind}: only {', '.join(types)} are read as scales: {_AGAIN}"
        )
    return list(weights.slice(codes).get_shape()), list(weights.slice(scales).get_shape())


def _others(weights: HuggingFaceWeights, method: str, found: list[_Quantised]) -> list[str]:
    """Names of all other tensors. Raises ValueError where one is not what it can be beside those `found`."""
    used = {name for one in found for name in (one.codes, one.scales, one.unused)}
    others = [name for name in weights.names() if name not in used]
    codes_of = {one.name: one.codes for one in found}
    for name in others:
        if name.endswith(_OF_OTHERS[method]):
            raise ValueError(
                f"{weights.path}: {name} belongs to a quantised tensor that is missing, or not quantised: {_AGAIN}"
            )
        if (kind := _kind(weights, name)) not in SAFETENSORS_DTYPES:
            raise ValueError(
                f"{weights.path}: {name} is of type {kind}: beside quantised tensors only {', '.join(SAFETENSORS_DTYPES)} are "
                "read: name the folder of the BF16 weights"
            )
        if name in codes_of:
            raise ValueError(
                f"{weights.path} holds {name} and {codes_of[name]}, and which one counts is not told: {_AGAIN}"
            )
    return others


def _sources(reader: ThreadWeights, one: _Quantised, dtype: torch.dtype) -> list[Source]:
    """Where a tensor comes from, matrix by matrix where it has one for each expert."""
    made = torch.empty(one.shape, dtype=dtype, device="meta")
    parts = _parts(one)
    codes, scales = (math.prod(reader.weights.slice(name).get_shape()) for name in (one.codes, one.scales))
    read = codes + 4 * scales  # bytes: a scale has at most 4

    def make(part: int | None) -> Iterator[tuple[str, torch.Tensor]]:
        try:
            matrix = one.matrix(_read(reader, one.codes, part), _read(reader, one.scales, part), dtype)
        except ValueError as error:
            raise ValueError(f"{reader.hf_path}: {one.codes} {error}: {_AGAIN}") from error
        yield one.name, matrix
        reader.release()

    cost = 2 * (read + made.nbytes) // len(parts)  # mapped pages and what is read of them; what is made, and rows of it
    return [Source({one.name: made}, cost, partial(make, part), part) for part in parts]


def _parts(one: _Quantised) -> Sequence[int | None]:
    """Numbers of the experts of a tensor that holds some; one None for a matrix."""
    return range(one.shape[0]) if len(one.shape) == 3 else [None]


def _read(reader: ThreadWeights, name: str, part: int | None) -> torch.Tensor:
    """A tensor of the folder, or that part of it along its first axis."""
    tensor: torch.Tensor = reader.weights.slice(name)[... if part is None else part]
    return tensor


def _check_scales(reader: ThreadWeights, found: list[_Quantised], workers: int) -> None:
    """Raise ValueError for a scale that is not finite: before the work, for all of them are little beside the weights."""

    def look(one: _Quantised, check: Callable[[], None]) -> None:
        check()
        for part in _parts(one):
            if not scale_numbers(_read(reader, one.scales, part)).isfinite().all():
                raise ValueError(f"{reader.hf_path}: {one.scales} holds numbers that are not finite: {_AGAIN}")
        reader.release()

    run_tasks(look, found, workers)


def _not_quantised(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without what `quantisation_of` finds in it."""
    config.pop(FIELD, None)
    if isinstance(text := config.get("text_config"), dict):
        text.pop(FIELD, None)
    return config
