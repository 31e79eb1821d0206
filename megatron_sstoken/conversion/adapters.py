"""Adapters of a LoRA run → a PEFT folder, or merged into the weights they belong to tensor by tensor."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sstoken.checkpoint.manifest import AdapterIdentity, Checkpoint
from megatron_sstoken.checkpoint.weights_source import WeightsSource
from megatron_sstoken.conversion.torch_dist import CheckpointReader
from megatron_sstoken.folders import STATE_FILE
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.lora import TARGETS, peft_name

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.\w+\.(\w+)\.weight")


class AdapterCheckpoint:
    """The adapters in a checkpoint of a LoRA run, read matrix by matrix as they are asked for.

    Raises ValueError where `folder` holds whole weights.
    """

    def __init__(self, checkpoint: Checkpoint):
        folder, state = checkpoint.folder, checkpoint.state
        if state.adapters is None:
            raise ValueError(f"{folder} holds whole weights, no adapters: export it without --merge")
        self.folder = folder
        self.identity: AdapterIdentity = state.adapters
        self._reader = CheckpointReader(folder)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return self._reader.tensors[_key(self.identity.targets[0], "lora_A")].size[0]

    @property
    def fingerprint(self) -> str:
        """Of the adapters, and of what the checkpoint says of their base."""
        files = [self.folder / STATE_FILE, *sorted(self.folder.glob("*.distcp"))]
        return fingerprint_files(map(str, files))

    def matrices(self, target: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of one linear in layer `layer` (from 0), as they were trained."""
        read = self._reader.read_layer
        return read(_key(target, "lora_A"), layer), read(_key(target, "lora_B"), layer)

    def merged_delta(self, name: str) -> torch.Tensor | None:
        """What the adapters add to the Hugging Face tensor `name`: scale · B·A, fp32; None if nothing."""
        match = _WEIGHT.fullmatch(name)
        if match is None or match[2] not in self.identity.targets:
            return None
        a, b = self.matrices(match[2], int(match[1]))
        return (b.float() @ a.float()) * self.identity.scale

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The Hugging Face tensor `name` of the base → that of the tuned model, summed in fp32 and rounded once."""
        delta = self.merged_delta(name)
        return tensor if delta is None else delta.add_(tensor).to(tensor.dtype)

    def peft_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All matrices by the names that PEFT gives them."""
        for layer in range(self.num_layers):
            for target in self.identity.targets:
                for name, matrix in zip(("lora_A", "lora_B"), self.matrices(target, layer), strict=True):
                    yield peft_name(layer, target, name), matrix.contiguous()

    def peft_config(self, base: str) -> dict:
        """PEFT's adapter_config.json; `base` is the Hugging Face folder of the weights that the adapters belong to."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.identity.rank,
            "lora_alpha": self.identity.alpha,
            "use_rslora": self.identity.rank_stabilized,
            "lora_dropout": self.identity.dropout,
            "target_modules": self.identity.targets,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    def write_peft(self, folder: Path, base: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors into `folder`."""
        save_file(dict(self.peft_tensors()), folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(
            json.dumps(self.peft_config(base), indent=2) + "\n", encoding="utf-8"
        )

    def base(self, hf_path: str) -> WeightsSource:
        """The weights that the adapters were trained on; `hf_path`: the folder of their architecture.

        Raises ValueError where other weights lie there now.
        """
        source = WeightsSource(hf_path, self.identity.base_checkpoint)
        if source.fingerprint() != self.identity.base_fingerprint:
            raise ValueError(
                f"{source.checkpoint or hf_path} does not hold the weights that the adapters of {self.folder} were trained "
                "on: name their folder with --hf"
            )
        return source


def _key(target: str, matrix: str) -> str:
    """Name in a checkpoint, where the layers are the first axis."""
    return f"decoder.layers.{TARGETS[target].megatron}.adapters.{target}.{matrix}"
