"""A Hugging Face folder as conversion reads it: weights parameter by parameter, and the files beside them."""

import functools
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from megatron_sstoken.conversion.contents import Contents, Parameter
from megatron_sstoken.model.dtypes import is_router_bias
from megatron_sstoken.model.families import read_architecture
from megatron_sstoken.model.weight_files import HuggingFaceWeights
from megatron_sstoken.model.weights import check_weights, read_shard

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
        return read_shard(self.weights, parameter.rule, parameter.layer, self.architecture, parameter.shape, 0, 1)


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
