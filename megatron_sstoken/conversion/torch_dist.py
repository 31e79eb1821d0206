"""megatron's `torch_dist` checkpoints, tensor by tensor: read only what is asked for, write without holding the model.

The format is torch.distributed.checkpoint's: `.metadata` tells for each chunk of a stored tensor where in which file a
tensor lies that `torch.save` wrote. megatron-core adds `metadata.json` and `common.pt`.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_sstoken.checkpoint.harmless import needed_lengths, read_metadata
from megatron_sstoken.conversion.contents import Contents, Parameter, Piece
from megatron_sstoken.conversion.runs import Run, RunCopier, cut
from megatron_sstoken.files import write_failure
from megatron_sstoken.model.dtypes import stored_dtype

_fake_mode_is_not_thread_safe = threading.Lock()


class CheckpointReader:
    """The stored tensors of a checkpoint folder, read chunk by chunk from mapped files.

    Raises ValueError where `.metadata` cannot be read or a file is missing or too short.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.metadata = read_metadata(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in self.metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def identifying_files(self) -> list[Path]:
        """The files that decide what is read."""
        return [self.folder / ".metadata"]

    def check(self, contents: Contents) -> None:
        """Raise ValueError unless every parameter is stored, with its shape, in files as long as they should be."""
        places = (
            self.metadata.storage_data[item.storage_index]
            for parameter in contents.parameters
            for piece in parameter.pieces(parameter.meta_tensor())
            for item in self._read_items(piece)
        )
        for name, size in needed_lengths(places).items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size < size:
                raise ValueError(f"{path} is missing or cut off: the checkpoint says that it has {size} bytes or more")

    def dtype(self, parameter: Parameter) -> torch.dtype:
        """Type that a parameter is stored in."""
        piece = next(parameter.pieces(parameter.meta_tensor()))
        return self._stored(piece).properties.dtype

    def read(self, parameter: Parameter, into: torch.Tensor | None = None) -> torch.Tensor:
        """A whole parameter, in its stored type. `into`: where to put it (contiguous, of that shape and type)."""
        tensor = torch.empty(parameter.shape, dtype=self.dtype(parameter)) if into is None else into
        for piece in parameter.pieces(tensor):
            self._fill(piece)
        return tensor

    def runs(self, parameter: Parameter, dtype: torch.dtype) -> list[Run] | None:
        """The bytes of a whole parameter of type `dtype`; None where they have to be computed, or do not lie together."""
        if self.dtype(parameter) is not dtype:
            return None
        whole = torch.empty(parameter.shape, dtype=dtype)  # memory that nothing touches
        found: list[tuple[int, Run]] = []
        for piece in parameter.pieces(whole):
            if (first := _place_in(piece.data, whole)) is None:
                return None
            for item in self._read_items(piece):
                path, start, saved = self._chunk(item.storage_index)
                to = _first_of_block(item.dest_offsets, item.lengths, piece.data.shape)
                source = _first_of_block(item.storage_offsets, item.lengths, saved.shape)
                if to is None or source is None:
                    return None
                length = item.lengths.numel() * dtype.itemsize
                run = Run(str(path), start + source * dtype.itemsize, length)
                found.append((first + to * dtype.itemsize, run))
        found.sort(key=lambda one: one[0])
        return [run for _, run in found]

    def read_layer(self, key: str, layer: int, expert: int | None = None) -> torch.Tensor:
        """What the checkpoint holds of `key` for `layer` (from 0), and of a tensor of all experts for `expert`, in its type.

        A tensor of that name has the layers as its first axis; where layers are not alike, each has one of its own.
        """
        place = () if expert is None else (expert,)
        if (own := key.replace(".layers.", f".layers.{layer}.")) in self.tensors:
            return self.read_tensor(own, *place)
        return self.read_tensor(key, layer, *place)

    def read_tensor(self, key: str, *place: int) -> torch.Tensor:
        """The stored tensor `key`, or what it has at `place` along its first axes, in its stored type."""
        if key not in self.tensors:
            raise ValueError(f"{self.folder} holds no {key}")
        shape, dtype = self.tensors[key].size, self.tensors[key].properties.dtype
        tensor = torch.empty(shape[len(place) :], dtype=dtype)
        view = tensor.reshape((1,) * len(place) + tuple(tensor.shape))
        self._fill(Piece(key, (*place, *(0 for _ in tensor.shape)), tuple(shape), False, view))
        return tensor

    def _fill(self, piece: Piece) -> None:
        """Copy a part of a stored tensor into `piece.data`."""
        for item in self._read_items(piece):
            chunk, dtype = self._mapped_chunk(item.storage_index)
            assert dtype is piece.data.dtype, f"{piece.key} is described as {piece.data.dtype} and stored as {dtype}"
            target = piece.data[_slices(item.dest_offsets, item.lengths)]
            # As bytes, for tensors in these files are not aligned to the size of their elements.
            *rows, last = _slices(item.storage_offsets, item.lengths)
            last = slice(last.start * dtype.itemsize, last.stop * dtype.itemsize)
            target.view(torch.uint8).copy_(torch.from_numpy(chunk[(*rows, last)]))

    def _stored(self, piece: Piece) -> TensorStorageMetadata:
        entry = self.tensors.get(piece.key)
        if entry is None:
            raise ValueError(f"{self.folder} holds no {piece.key}: it was made from a model of another architecture")
        wanted, found = tuple(piece.global_shape), tuple(entry.size)
        fits = found[1:] == wanted[1:] and (found[0] >= wanted[0] if piece.any_size else found[0] == wanted[0])
        if len(found) != len(wanted) or not fits:
            raise ValueError(
                f"{self.folder}: {piece.key} has shape {list(found)}, config.json says {list(wanted)}: "
                "it was made from a model of another architecture"
            )
        return entry

    def _read_items(self, piece: Piece) -> list:
        """What to read from which chunk: torch's own resharding, given the chunks that overlap along the first axis."""
        entry = self._stored(piece)
        wanted = ChunkStorageMetadata(torch.Size(piece.offset), piece.data.shape)
        first, last = piece.offset[0], piece.offset[0] + piece.data.shape[0]
        near = [
            chunk for chunk in entry.chunks if chunk.offsets[0] < last and chunk.offsets[0] + chunk.sizes[0] > first
        ]
        items = create_read_items_for_chunk_list(
            piece.key, TensorStorageMetadata(entry.properties, entry.size, near), [wanted]
        )
        if sum(torch.Size(item.lengths).numel() for item in items) != piece.data.numel():
            raise ValueError(f"{self.folder}: {piece.key} is not all there")
        return items

    def _mapped_chunk(self, index: MetadataIndex) -> tuple[np.ndarray, torch.dtype]:
        """The bytes of a stored chunk, uint8 with its shape, the last axis in bytes, and its type."""
        path, start, saved = self._chunk(index)
        shape = (*saved.shape[:-1], saved.shape[-1] * saved.element_size())
        return np.memmap(path, np.uint8, mode="c", offset=start, shape=shape), saved.dtype

    def _chunk(self, index: MetadataIndex) -> tuple[Path, int, torch.Tensor]:
        """The file that holds a stored chunk, its first byte in it, and a tensor of its shape and type, without bytes."""
        place = self.metadata.storage_data[index]
        path = self.folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{path} is compressed ({place.transform_descriptors}), which is not supported")
        with open(path, "rb") as file:
            saved, start = _without_bytes(_create_file_view(file, place.offset, place.length))
        if not saved.is_contiguous():
            raise ValueError(f"{path}: {index.fqn} is not stored contiguously, which is not supported")
        return path, place.offset + start + int(saved.storage_offset()) * saved.element_size(), saved


def _without_bytes(view: Any) -> tuple[torch.Tensor, int]:
    """A tensor that torch.save wrote, without its bytes, and where in the file `view` those of its storage begin."""
    saved = torch.load(view, map_location="meta", weights_only=True)
    if (start := saved.untyped_storage()._checkpoint_offset) is None:  # older torch tells it in this mode alone
        view.seek(0)
        with _fake_mode_is_not_thread_safe, FakeTensorMode():
            saved = torch.load(view, weights_only=True)
        start = saved.untyped_storage()._checkpoint_offset
    return saved, start


def _slices(offsets: torch.Size, lengths: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))


def _place_in(view: torch.Tensor, whole: torch.Tensor) -> int | None:
    """The first byte of a part of a tensor, which is contiguous; None where it is no view of consecutive bytes."""
    first = view.data_ptr() - whole.data_ptr()
    is_inside = view.is_contiguous() and 0 <= first <= whole.nbytes - view.nbytes
    return first if is_inside else None


def _first_of_block(offsets: Sequence[int], lengths: Sequence[int], shape: Sequence[int]) -> int | None:
    """Number of the first element of a block of a tensor; None where its elements do not lie one after another."""
    cut = [axis for axis, (length, size) in enumerate(zip(lengths, shape, strict=True)) if length != size]
    if any(length != 1 for length in lengths[: cut[-1] if cut else 0]):
        return None
    first = 0
    for offset, size in zip(offsets, shape, strict=True):
        first = first * size + offset
    return first


def write_parameter(file: BinaryIO, parameter: Parameter, tensor: torch.Tensor) -> list[dict[str, Any]]:
    """Append a whole parameter to a data file; returns where each piece went, for `write_metadata`."""
    return [
        _append(file, piece.key, piece.offset, partial(_save, _own_storage(piece.data)))
        for piece in parameter.pieces(tensor.contiguous())
    ]


def copy_parameter(
    file: BinaryIO, parameter: Parameter, dtype: torch.dtype, runs: Sequence[Run], copier: RunCopier
) -> list[dict[str, Any]] | None:
    """As `write_parameter`, of a parameter of type `dtype` whose bytes are `runs`; None where its pieces are none of them."""
    whole = torch.empty(parameter.shape, dtype=dtype)  # memory that nothing touches
    pieces = list(parameter.pieces(whole))
    places = [place for piece in pieces if (place := _place_in(piece.data, whole)) is not None]
    if len(places) < len(pieces):
        return None

    def copy(data: torch.Tensor, first: int, target: BinaryIO) -> None:
        around = _WithoutBytes(target, data)
        _save(data, around)
        assert around.place is not None, "torch.save has written the tensor's bytes otherwise than all at once"
        copier.copy(list(cut(runs, first, first + data.nbytes)), target.fileno(), around.place)

    return [
        _append(file, piece.key, piece.offset, partial(copy, _own_storage(piece.data), place))
        for piece, place in zip(pieces, places, strict=True)
    ]


def _append(
    file: BinaryIO, key: str, offset: tuple[int, ...] | None, write: Callable[[BinaryIO], None]
) -> dict[str, Any]:
    start = file.tell()
    write(file)
    return {"key": key, "offset": offset, "start": start, "length": file.tell() - start}


class _WithoutBytes:
    """A file for torch.save, into which it writes a tensor without its bytes: their place stays empty.

    torch's own `skip_data` does this, too, and may change, as it says.
    """

    def __init__(self, file: BinaryIO, tensor: torch.Tensor):
        self.name, self.flush = file.name, file.flush
        self._file, self._tensor = file, tensor
        self.place: int | None = None
        """Where in the file."""

    def write(self, data: memoryview) -> int:
        size = len(data)
        if size != self._tensor.nbytes or np.frombuffer(data, np.uint8).ctypes.data != self._tensor.data_ptr():
            return self._file.write(data)
        self.place = self._file.tell()
        self._file.seek(size, os.SEEK_CUR)
        return size


def write_objects(file: BinaryIO, contents: Contents) -> list[dict[str, Any]]:
    """Write the checkpoint's objects into a data file, as `write_parameter` does with tensors."""
    # A list of each, as megatron packs them.
    return [_append(file, item.unique_key, None, partial(_save, [item.data])) for item in contents.objects]


@contextmanager
def without_zip_checksums() -> Iterator[None]:
    """Within, torch.save leaves out the CRC32 that no torch.load looks at; it takes longer than the writing."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _save(value: Any, file: Any) -> None:
    """As torch.save, which hides the system's reason for a failed write behind a RuntimeError of its own."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise write_failure(error, Path(file.name)) from error


def write_metadata(
    folder: Path, contents: Contents, dtype: torch.dtype, files: dict[str, list[dict[str, Any]]]
) -> None:
    """Write what makes the data files of `folder` a checkpoint. `files`: name → what the functions above returned.

    The same arguments give the same bytes.
    """
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for parameter in contents.parameters:
        for piece in parameter.pieces(parameter.meta_tensor()):
            properties = TensorProperties(dtype=stored_dtype(parameter.name, dtype))
            empty = TensorStorageMetadata(properties, torch.Size(piece.global_shape), [])
            entry = described.setdefault(piece.key, empty)
            assert isinstance(entry, TensorStorageMetadata)
            entry.chunks.append(ChunkStorageMetadata(torch.Size(piece.offset), piece.data.shape))
    described |= {item.unique_key: BytesStorageMetadata() for item in contents.objects}
    results = [
        WriteResult(
            index=MetadataIndex(place["key"], place["offset"]),
            size_in_bytes=place["length"],
            storage_data=_StorageInfo(name, place["start"], place["length"]),
        )
        for name, places in sorted(files.items())
        for place in places
    ]
    torch.save({}, folder / "common.pt")
    _RepeatableWriter(folder).finish(Metadata(described), [results])
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


class _RepeatableWriter(FileSystemWriter):
    """Names no random number in `.metadata`, so that a conversion that was stopped ends with the same bytes."""

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


def _own_storage(view: torch.Tensor) -> torch.Tensor:
    """The same memory as a tensor whose storage is not larger than it, for torch.save saves whole storages."""
    return torch.from_numpy(view.view(torch.uint8).numpy()).view(view.dtype)
