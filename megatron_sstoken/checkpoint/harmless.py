"""Nothing in a checkpoint runs code: what its pickles name is compared with a list before they are read.

A checkpoint may come from anywhere. torch reads `.metadata`, and the objects among the tensors, with Python's unpickler,
which calls whatever the file names.
"""

import io
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.serialization import safe_globals

_ALLOWED = {
    "torch": {"Size", "device"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}  # fmt: skip
"""What `.metadata` of torch and megatron is made of: module → names. Besides, torch's types of numbers."""


class _Careful(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _ALLOWED.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which has no place in it")


def read_metadata(folder: Path) -> Metadata:
    """`.metadata` of a checkpoint folder.

    Raises ValueError where it is damaged, or names what could run code or a file outside the folder.
    """
    path = folder / ".metadata"
    try:
        with open(path, "rb") as file:
            found = _Careful(file).load()
        if not isinstance(found, Metadata):
            raise ValueError(f"it holds a {type(found).__name__}")
    except Exception as error:  # whatever its bytes say can go wrong
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}), so it is damaged or not to be trusted: "
            "name another checkpoint"
        ) from error
    for name in {place.relative_path for place in (found.storage_data or {}).values()}:
        if Path(name).name != name:
            raise ValueError(f"{path} names {name}, which is not in that folder: name another checkpoint")
    return found


def require_harmless(folder: Path, metadata: Metadata) -> None:
    """Raise ValueError unless the objects among the tensors hold plain values and tensors alone. `metadata`: the folder's.

    After this, megatron's own way of reading them meets nothing that it would call.
    """
    common = folder / "common.pt"  # of one line of megatron-core; torch's own default can be switched off from outside
    if common.is_file():
        with _told_as_damaged(str(common)):
            torch.load(common, map_location="cpu", weights_only=True)
    objects = [name for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
    places = {index.fqn: place for index, place in (metadata.storage_data or {}).items()}
    for name in objects:
        place = places.get(name)
        if place is None:
            raise ValueError(f"{folder} does not say where {name} lies, so it is damaged: name another checkpoint")
        path = folder / place.relative_path
        with _told_as_damaged(f"{path}: {name}"), open(path, "rb") as file, safe_globals([io.BytesIO]):
            file.seek(place.offset)
            torch.load(io.BytesIO(file.read(place.length)), map_location="cpu", weights_only=True)


@contextmanager
def _told_as_damaged(what: str) -> Iterator[None]:
    """Within, `what` is read as plain values and tensors; whatever goes wrong is a ValueError."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{what} is damaged or not to be trusted ({type(error).__name__}): name another checkpoint"
        ) from error


def needed_lengths(places: Iterable[Any]) -> dict[str, int]:
    """File → bytes that it must have, at least, to hold the `_StorageInfo` of `.metadata` that are given."""
    needed: dict[str, int] = {}
    for place in places:
        end = place.offset + place.length
        needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
    return needed


def missing_parts(folder: Path, metadata: Metadata) -> list[str]:
    """Files of a checkpoint that are not there, or shorter than `.metadata` says: names, sorted."""
    needed = needed_lengths((metadata.storage_data or {}).values())
    sizes = {name: path.stat().st_size for name in needed if (path := folder / name).is_file()}
    return sorted(name for name, size in needed.items() if sizes.get(name, -1) < size)


def require_whole(folder: Path, metadata: Metadata) -> None:
    """Raise ValueError where files of a checkpoint are gone or shortened."""
    if missing := missing_parts(folder, metadata):
        raise ValueError(f"{folder} lacks {', '.join(missing[:3])}, or has it shortened: name another checkpoint")
