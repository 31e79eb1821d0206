"""megatron's `torch_dist` checkpoints, tensor by tensor: read only what is asked for, write without holding the model.

The format is torch.distributed.checkpoint's: `.metadata` tells for each chunk of a stored tensor where in which file a
tensor lies that `torch.save` wrote. megatron-core adds `metadata.json` and `common.pt`.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
        place = self.metadata.storage_data[index]
        path = self.folder / place.relative_path
        if getattr(place, "transform_descriptors", None):
            raise ValueError(f"{path} is compressed ({place.transform_descriptors}), which is not supported")
        with open(path, "rb") as file:
            saved, start = _without_bytes(_create_file_view(file, place.offset, place.length))
        if not saved.is_contiguous():
            raise ValueError(f"{path}: {index.fqn} is not stored contiguously, which is not supported")
        start += int(saved.storage_offset()) * saved.element_size()
        shape = (*saved.shape[:-1], saved.shape[-1] * saved.element_size())
        return np.memmap(path, np.uint8, mode="c", offset=place.offset + start, shape=shape), saved.dtype


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


def write_parameter(file: BinaryIO, parameter: Parameter, tensor: torch.Tensor) -> list[dict[str, Any]]:
    """Append a whole parameter to a data file; returns where each piece went, for `write_metadata`."""
    written = []
    for piece in parameter.pieces(tensor.contiguous()):
        start = file.tell()
        _save(_own_storage(piece.data), file)
        written.append({"key": piece.key, "offset": piece.offset, "start": start, "length": file.tell() - start})
    return written


def write_objects(file: BinaryIO, contents: Contents) -> list[dict[str, Any]]:
    """Write the checkpoint's objects into a data file, as `write_parameter` does with tensors."""
    written = []
    for item in contents.objects:
        start = file.tell()
        _save([item.data], file)  # a list, as megatron packs them
        written.append({"key": item.unique_key, "offset": None, "start": start, "length": file.tell() - start})
    return written


@contextmanager
def without_zip_checksums() -> Iterator[None]:
    """Within, torch.save leaves out the CRC32 that no torch.load looks at; it takes longer than the writing."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)


def _save(value: Any, file: BinaryIO) -> None:
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
