"""A Hugging Face folder as conversion reads it: weights parameter by parameter, and the files beside them."""

import functools
import json
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_sstoken import __version__
from megatron_sstoken.conversion.contents import Contents, Parameter
from megatron_sstoken.conversion.runs import NumberedRows, Run
from megatron_sstoken.conversion.work import ConversionOptions
from megatron_sstoken.model.dtypes import is_router_bias
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import Tensors, check_weights, read_shard

_WEIGHT_FILES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".msgpack", ".h5", "safetensors.index.json", "bin.index.json",
)  # fmt: skip
_FOLDERS_OF_TEMPLATES = ("additional_chat_templates",)  # where transformers keeps templates with names


class ThreadWeights:
    """The tensors of a Hugging Face folder for several threads: files that one closes must not be another's."""

    def __init__(self, hf_path: str):
        self.hf_path, self.folder = hf_path, Path(hf_path)
        self._mine = threading.local()
        self.weights.close()  # a folder without weights is told before all else

    @property
    def weights(self) -> HuggingFaceWeights:
        """The files as this thread has opened them."""
        if not hasattr(self._mine, "weights"):
            self._mine.weights = HuggingFaceWeights(self.hf_path)
        return self._mine.weights

    def release(self) -> None:
        """Give back what this thread has mapped."""
        self.weights.close()


class FolderReader(ThreadWeights):
    """The weights of a Hugging Face folder, parameter by parameter, as `CheckpointReader` gives those of a checkpoint."""

    def __init__(self, hf_path: str):
        super().__init__(hf_path)
        self.architecture = read_architecture(hf_path)

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
        return self._read(self.weights, parameter)

    def runs(self, parameter: Parameter, dtype: torch.dtype) -> list[Run] | None:
        """The bytes of a whole parameter of type `dtype`; None where they have to be computed."""
        if parameter.rule.stacked or self.weights.pickled:
            return None
        names = [pattern.format(layer=parameter.layer) for pattern in parameter.rule.hugging_face]
        if any(self.weights.dtype(name) is not dtype for name in names):
            return None
        numbered = _Numbered(self.weights)
        return numbered.rows.runs(self._read(numbered, parameter))

    def _read(self, weights: Tensors, parameter: Parameter) -> torch.Tensor:
        return read_shard(weights, parameter.rule, parameter.layer, self.architecture, parameter.shape, 0, 1)


class _Numbered:
    """A folder's tensors with numbers in place of rows, as `read_shard` reads tensors."""

    def __init__(self, weights: HuggingFaceWeights):
        self.path = weights.path
        self.rows = NumberedRows()
        self._weights = weights

    def slice(self, name: str) -> "_NumberedTensor":
        found, run = self._weights.slice(name), Run(*self._weights.place(name))
        return _NumberedTensor(found, self.rows.of(found.get_shape(), [run]))


@dataclass(frozen=True)
class _NumberedTensor:
    """One of them, as safetensors' slices are read."""

    found: Any
    numbers: torch.Tensor

    def get_shape(self) -> list[int]:
        shape: list[int] = self.found.get_shape()
        return shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.numbers[index]


def folders_identity(operation: str, options: ConversionOptions, folders: Sequence[str]) -> dict[str, Any]:
    """What the bytes of an output that is made of whole folders depend on, for a `Workplace`."""
    files = [file for folder in folders for file in (f"{folder}/config.json", *HuggingFaceWeights(folder).files())]
    return {
        "operation": operation,
        "version": __version__,
        "dtype": options.dtype,
        "shard_size": options.shard_size,
        "source": fingerprint_files(files),
    }


def _types(weights: HuggingFaceWeights) -> set[torch.dtype]:
    """The types of all tensors but those whose type is not the model's."""
    names = (name for name in weights.names() if not is_router_bias(name))
    return {weights.dtype(name) for name in names}


def copy_companions(source: Path, target: Path, *, dtype: torch.dtype, changes: dict[str, Any] | None = None) -> None:
    """Copy configuration, tokenizer and templates, everything but weights; config.json is told the weights' dtype, and
    `changes`."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(_WEIGHT_FILES):
            shutil.copyfile(path, target / path.name)
        elif path.is_dir() and path.name in _FOLDERS_OF_TEMPLATES:
            shutil.copytree(path, target / path.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    config |= {key: str(dtype).removeprefix("torch."), **(changes or {})}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
