"""Adapters of a LoRA run → a PEFT folder, or merged into the weights they belong to tensor by tensor."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from megatron_sstoken.checkpoint.manifest import AdapterIdentity, Checkpoint
from megatron_sstoken.checkpoint.weights_source import WeightsSource, base_problem
from megatron_sstoken.conversion.torch_dist import CheckpointReader
from megatron_sstoken.folders import ADAPTER_CONFIG, ADAPTER_WEIGHTS, STATE_FILE
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.fingerprint import fingerprint_files
from megatron_sstoken.model.lora_targets import (
    EMBEDDING,
    EMBEDDING_MATRICES,
    FUSED,
    TARGETS,
    WHOLE,
    WHOLE_TENSORS,
    expert_of,
    hugging_face_linears,
    layers_of,
    other_sides,
    peft_embedding_name,
    peft_name,
    peft_whole_name,
    stacked_alpha,
)

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class AdapterCheckpoint:
    """The adapters in a checkpoint of a LoRA run, read matrix by matrix as they are asked for.

    A linear that fuses several (Phi's `qkv_proj`) gets one adapter for PEFT: their A above one another, their B along a
    diagonal, and a rank and an alpha as many times as large. Raises ValueError where `folder` holds whole weights.
    """

    def __init__(self, checkpoint: Checkpoint, architecture: Architecture):
        folder, state = checkpoint.folder, checkpoint.state
        if state.adapters is None:
            raise ValueError(f"{folder} holds whole weights, no adapters: export it without --merge")
        self.folder = folder
        self.architecture = architecture
        self.identity: AdapterIdentity = state.adapters
        self.linears = hugging_face_linears(architecture, state.adapters.targets)
        self._reader = CheckpointReader(folder)

    @property
    def fingerprint(self) -> str:
        """Of the adapters, and of what the checkpoint says of their base."""
        files = [self.folder / STATE_FILE, *sorted(self.folder.glob("*.distcp"))]
        return fingerprint_files(map(str, files))

    def matrices(self, target: str, layer: int, expert: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of one linear in layer `layer` (from 0), or of an expert in it, as trained."""
        of_experts, read = expert is not None, self._reader.read_layer
        first, second = (_key(target, matrix, of_experts=of_experts) for matrix in ("lora_A", "lora_B"))
        return read(first, layer, expert), read(second, layer, expert)

    def merged_delta(self, name: str) -> torch.Tensor | None:
        """What the adapters add to the Hugging Face tensor `name`: scale · B·A, fp32; None if nothing."""
        if name == WHOLE_TENSORS[EMBEDDING] and EMBEDDING in self.identity.targets:
            a, b = self.embedding_matrices()
            return (a.t().float() @ b.t().float()) * self.identity.scale
        match = _WEIGHT.fullmatch(name)
        if match is None or match[2] not in self.linears:
            return None
        a, b = self.linear_matrices(match[2], int(match[1]))
        return (b.float() @ a.float()) * self.identity.scale

    def linear_matrices(self, path: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of one Hugging Face linear, `path` in layer `layer`, with all the targets that lie in it."""
        found = {target: self.matrices(target, layer, expert_of(path)) for target in self.linears[path]}
        parts = FUSED.get(path.rpartition(".")[2], self.linears[path])
        first = next(b for _, b in found.values())
        rows = other_sides(self.architecture)
        blocks = [found[part][1] if part in found else first.new_zeros(rows[part], 0) for part in parts]
        return torch.cat([found[part][0] for part in parts if part in found]), torch.block_diag(*blocks)

    def embedding_matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, vocabulary] and B [hidden, rank] of the embedding, as they were trained."""
        first, second = (self._reader.read_tensor(key) for key in EMBEDDING_MATRICES)
        return first[: self.architecture.vocabulary_size].t(), second

    def whole_tensor(self, module: str) -> torch.Tensor:
        """The weight of a module that was trained whole, in its stored type, without padding."""
        key = WHOLE["embed_tokens"] if self.architecture.tied_embeddings else WHOLE[module]
        return self._reader.read_tensor(key)[: self.architecture.vocabulary_size]

    def merged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The Hugging Face tensor `name` of the base → that of the tuned model; summed in fp32, and not rounded yet."""
        for module in self.identity.train_whole:
            if WHOLE_TENSORS[module] == name:
                return self.whole_tensor(module)
        delta = self.merged_delta(name)
        if delta is None:
            return tensor
        summed = delta.add_(tensor)
        if self.identity.dora and (match := _WEIGHT.fullmatch(name)):
            summed *= (self.magnitude(match[2], int(match[1])).float() / summed.norm(dim=1)).unsqueeze(1)
        return summed

    def magnitude(self, path: str, layer: int) -> torch.Tensor:
        """DoRA's [out] of the Hugging Face linear `path` in layer `layer`."""
        (target,) = self.linears[path]
        return self._reader.read_layer(_key(target, "magnitude"), layer)

    def peft_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All matrices by the names that PEFT gives them."""
        for layer in range(self.architecture.num_layers):
            for path, targets in self.linears.items():
                if layer not in layers_of(self.architecture, targets[0]):
                    continue
                for name, matrix in zip(("lora_A", "lora_B"), self.linear_matrices(path, layer), strict=True):
                    yield peft_name(layer, path, name), matrix.contiguous()
                if self.identity.dora:
                    yield peft_name(layer, path, "magnitude"), self.magnitude(path, layer)
        if EMBEDDING in self.identity.targets:
            for name, matrix in zip(EMBEDDING_MATRICES.values(), self.embedding_matrices(), strict=True):
                yield peft_embedding_name(name), matrix.contiguous()
        for module in self.identity.train_whole:
            yield peft_whole_name(module), self.whole_tensor(module).contiguous()

    def peft_config(self, base: str) -> dict:
        """PEFT's adapter_config.json; `base` is the Hugging Face folder of the weights that the adapters belong to."""
        fused = {path.rpartition(".")[2]: len(parts) for path, parts in self.linears.items() if len(parts) > 1}
        alpha, stabilized, dropout = self.identity.alpha, self.identity.rank_stabilized, self.identity.dropout
        if any(expert_of(path) is not None for path in self.linears):
            # PEFT has no dropout where experts lie in one tensor. It makes one adapter of those of gate and up, of twice the
            # rank and the alpha, which is not the same scale where it goes by √rank.
            alpha, stabilized, dropout = self.identity.scale * self.identity.rank, False, 0.0
        patterns = {
            "rank_pattern": {name: number * self.identity.rank for name, number in fused.items()},
            "alpha_pattern": {
                name: stacked_alpha(alpha, number, rank_stabilized=stabilized) for name, number in fused.items()
            },
        }
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.identity.rank,
            "lora_alpha": alpha,
            "use_rslora": stabilized,
            "use_dora": self.identity.dora,
            "lora_dropout": dropout,
            **({"modules_to_save": list(self.identity.train_whole)} if self.identity.train_whole else {}),
            "target_modules": [
                *dict.fromkeys(path.rpartition(".")[2] for path in self.linears),
                *([EMBEDDING] if EMBEDDING in self.identity.targets else []),
            ],
            **(patterns if fused else {}),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }

    def write_peft(self, folder: Path, base: str) -> None:
        """Write adapter_config.json and adapter_model.safetensors into `folder`."""
        save_file(dict(self.peft_tensors()), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER_CONFIG).write_text(json.dumps(self.peft_config(base), indent=2) + "\n", encoding="utf-8")

    def base(self, hf_path: str) -> WeightsSource:
        """The weights that the adapters were trained on; `hf_path`: the folder of their architecture.

        Raises ValueError where other weights lie there now.
        """
        source = WeightsSource(hf_path, self.identity.base_checkpoint)
        if problem := base_problem(self.identity, source):
            raise ValueError(
                f"{source.checkpoint or hf_path} does not hold the weights that the adapters of {self.folder} were trained "
                f"on ({problem}): name their folder with --hf"
            )
        return source


def _key(target: str, matrix: str, *, of_experts: bool = False) -> str:
    """Name in a checkpoint, where the layers, and then the experts, are the first axes."""
    linear = TARGETS[target].replace("mlp.", "mlp.experts.experts.") if of_experts else TARGETS[target]
    return f"decoder.layers.{linear}.adapters.{target}.{matrix}"
