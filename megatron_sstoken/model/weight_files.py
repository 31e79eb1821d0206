"""The files of a Hugging Face folder that hold its weights, and their tensors by name, read lazily.

Safetensors, or the pickled `.bin` files of old models, of which nothing but tensors is unpickled.
"""

import functools
import json
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open

from megatron_sstoken.files import read_json
from megatron_sstoken.folders import hub_name
from megatron_sstoken.model.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from megatron_sstoken.model.quantised import quantised_remedy

# In the order in which transformers looks for them; beside a whole file it heeds no index.
_LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_AGAIN = "download the model again"


class NoWeights(ValueError):
    """A folder holds no weights at all."""


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder.

    Raises ValueError where the folder has no weights (`NoWeights`), its index cannot be read, a file of the index is missing
    or a tensor is unknown.
    """

    def __init__(self, hf_path: str):
        self.path = hf_path
        self._open: dict[str, Any] = {}
        self._headers: dict[str, tuple[dict[str, Any], int]] = {}
        layout = next((name for name in _LAYOUTS if os.path.isfile(os.path.join(hf_path, name))), None)
        if layout is None:
            raise _no_weights(hf_path)
        self.pickled = ".bin" in layout
        """Whether these are `.bin` files."""
        if layout.endswith(".index.json"):
            self._file_of = self._read_index(layout)
        else:
            self._file_of = dict.fromkeys(self._opened(layout).keys(), layout)

    def _read_index(self, index: str) -> dict[str, str]:
        try:
            file_of = dict(json.loads(Path(self.path, index).read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path}: {index} is not an index of tensors ({error!r}): {_AGAIN}") from error
        names = sorted(set(file_of.values()))
        if outside := [
            name for name in names if os.path.basename(name) != name
        ]:  # the hub's links have plain names, too
            raise ValueError(f"{self.path}: the index names {outside[0]}, which is not in that folder: {_AGAIN}")
        if gone := [name for name in names if not os.path.isfile(os.path.join(self.path, name))]:
            raise ValueError(
                f"{self.path}: {_some(gone)}, named by {index}, {'is' if len(gone) == 1 else 'are'} missing: "
                f"{_download(self.path)}"
            )
        return file_of

    def _opened(self, file_name: str) -> Any:
        if file_name not in self._open:
            path = os.path.join(self.path, file_name)
            self._open[file_name] = _PickledFile(path) if self.pickled else open_safetensors(path)
        return self._open[file_name]

    def close(self) -> None:
        """Unmap the files, so that the pages read so far leave memory; they are opened again when next read."""
        self._open.clear()

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return sorted(self._file_of)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def files(self) -> list[str]:
        """Paths of the files, sorted."""
        return [os.path.join(self.path, name) for name in sorted(set(self._file_of.values()))]

    def slice(self, name: str) -> Any:
        """A tensor that is read where it is indexed, with `get_shape` and `get_dtype` (a name of safetensors)."""
        if name not in self._file_of:
            raise ValueError(f"{self.path}: the tensor {name} is missing")
        return self._opened(self._file_of[name]).get_slice(name)

    def dtype(self, name: str) -> torch.dtype:
        """Type of a tensor, which `check_files` has found to be one that is read."""
        return SAFETENSORS_DTYPES[self.slice(name).get_dtype()]

    def place(self, name: str) -> tuple[str, int, int]:
        """The safetensors file that holds a tensor, its first byte in it, and how many bytes it has."""
        file_name = self._file_of[name]
        path = os.path.join(self.path, file_name)
        if file_name not in self._headers:
            with open(path, "rb") as file:
                self._headers[file_name] = _read_header(file)
        header, begin = self._headers[file_name]
        start, stop = header[name]["data_offsets"]
        return path, begin + start, stop - start

    @contextmanager
    def read_numbers(self) -> Iterator[Callable[[str, int, int], torch.Tensor]]:
        """Within, a function: a tensor's name, first, last → its numbers from `first` to before `last`, in the file's order.

        For a few numbers of many tensors: of a mapped file much would be read around each place.
        """
        with ExitStack() as stack:

            @functools.cache
            def opened(file_name: str) -> _PlainFile | _PickledFile:
                if self.pickled:
                    pickled: _PickledFile = self._opened(file_name)
                    return pickled
                return _PlainFile(stack.enter_context(open(os.path.join(self.path, file_name), "rb")))

            yield lambda name, first, last: opened(self._file_of[name]).numbers(name, first, last)

    def check_files(self) -> None:
        """Raise ValueError unless the files hold what the index says, each tensor once, in types that are read.

        Reads headers only.
        """
        self.check_index()
        for name in self.names():
            if (kind := self.slice(name).get_dtype()) not in SAFETENSORS_DTYPES:
                config = Path(self.path, "config.json")
                remedy = quantised_remedy(self.path, read_json(config) if config.is_file() else {})
                raise ValueError(
                    f"{self.path}: {name} is of type {kind}: only {', '.join(SAFETENSORS_DTYPES)} are read: {remedy}"
                )

    def check_index(self) -> None:
        """Raise ValueError unless the files hold what the index says, each tensor once, of whatever type."""
        holders: dict[str, list[str]] = defaultdict(list)
        for file_name in sorted(set(self._file_of.values())):
            for name in list(self._opened(file_name).keys()):
                holders[name].append(file_name)
        if twice := sorted(name for name, files in holders.items() if len(files) > 1):
            raise ValueError(
                f"{self.path}: {_some(twice)} lies in {' and in '.join(holders[twice[0]])}, and which one counts is not told: "
                f"{_AGAIN}"
            )
        if stale := sorted(name for name, file in self._file_of.items() if holders.get(name) != [file]):
            where = holders.get(stale[0])
            raise ValueError(
                f"{self.path}: the index is stale: {_some(stale)} is not in {self._file_of[stale[0]]}"
                f"{f' but in {where[0]}' if where else ''}: {_AGAIN}"
            )
        if unlisted := sorted(set(holders) - set(self._file_of)):
            raise ValueError(
                f"{self.path}: the index is stale: it does not name {_some(unlisted)}, which lies in "
                f"{holders[unlisted[0]][0]}: {_AGAIN}"
            )

    def note(self) -> str | None:
        """What a user should know of the files; None where there is nothing."""
        if not self.pickled:
            return None
        return (
            f"the weights of {self.path} are pickled .bin files, of which tensors alone are read: convert them once, with "
            "from-hf or with save_pretrained of transformers"
        )


def open_safetensors(path: str) -> Any:
    """A safetensors file, mapped into memory. Raises ValueError where it cannot be read."""
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}: {_AGAIN}") from error


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where what follows it begins: 8 bytes tell its length, and it is JSON."""
    length = int.from_bytes(file.read(8), "little")
    return json.loads(file.read(length)), 8 + length


class _PlainFile:
    """An open safetensors file."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._header, self._begin = _read_header(file)

    def numbers(self, name: str, first: int, last: int) -> torch.Tensor:
        """Those from `first` to before `last` of a tensor."""
        place = self._header[name]
        dtype = SAFETENSORS_DTYPES[place["dtype"]]
        start = self._begin + place["data_offsets"][0] + first * dtype.itemsize
        data = os.pread(self._file.fileno(), (last - first) * dtype.itemsize, start)
        return torch.frombuffer(bytearray(data), dtype=dtype)


class _PickledFile:
    """A `.bin` file, mapped into memory."""

    def __init__(self, path: str):
        try:
            found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            # torch's own words are left out: they advise to run what the file contains.
            raise ValueError(
                f"{path} is not read: it is damaged, older than torch 1.6, or holds more than tensors, which are not "
                f"unpickled: {_AGAIN}, as safetensors where there are any"
            ) from error
        if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise ValueError(f"{path} does not hold tensors by name: write it with save_pretrained of transformers")
        self._tensors: dict[str, torch.Tensor] = found

    def keys(self) -> Iterable[str]:
        """Names of tensors."""
        return self._tensors.keys()

    def numbers(self, name: str, first: int, last: int) -> torch.Tensor:
        """Those from `first` to before `last` of a tensor."""
        return self._tensors[name].reshape(-1)[first:last]

    def get_slice(self, name: str) -> "_PickledTensor":
        """As safetensors has it."""
        return _PickledTensor(self._tensors[name])


class _PickledTensor:
    """One tensor, as safetensors' slices are read."""

    def __init__(self, tensor: torch.Tensor):
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        dtype = self._tensor.dtype
        return SAFETENSORS_NAMES.get(dtype, str(dtype).removeprefix("torch."))

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._tensor[index].clone()


def _no_weights(hf_path: str) -> NoWeights:
    if shards := sorted(path.name for path in Path(hf_path).glob("*-of-*.safetensors")):
        return NoWeights(f"{hf_path} has {_some(shards)} but no model.safetensors.index.json: {_download(hf_path)}")
    return NoWeights(
        f"{hf_path} has neither model.safetensors nor model.safetensors.index.json: {_download(hf_path)}, or save it there "
        "with save_pretrained"
    )


def _download(hf_path: str) -> str:
    name = hub_name(hf_path)
    return f"download the model with `hf download {name}`" if name else _AGAIN


def _some(names: list[str]) -> str:
    """The first names, and how many more."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest
