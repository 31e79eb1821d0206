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
from megatron_sstoken.model.lora_places import Place, adapter_places
from megatron_sstoken.model.lora_targets import (
    EMBEDDING,
    EMBEDDING_MATRICES,
    OF_MLP,
    WHOLE,
    WHOLE_TENSORS,
    peft_embedding_name,
    peft_name,
    peft_whole_name,
    stack_prefixes,
    stacked_alpha,
)
from megatron_sstoken.model.weights import to_hugging_face

_WEIGHT = re.compile(r"model\.layers\.(\d+)\.(.+?)(?:\.weight)?")


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
        self.places = {place.path: place for place in adapter_places(architecture, state.adapters.targets)}
        self._linears = [place for place in self.places.values() if not place.in_stack]
        self._stacks: dict[str, list[Place]] = {}
        """Tensor of all experts → its parts."""
        for place in self.places.values():
            if place.in_stack:
                self._stacks.setdefault(place.module, []).append(place)
        self._reader = CheckpointReader(folder)

    @property
    def fingerprint(self) -> str:
        """Of the adapters, and of what the checkpoint says of their base."""
        files = [self.folder / STATE_FILE, *sorted(self.folder.glob("*.distcp"))]
        return fingerprint_files(map(str, files))

    @property
    def parts_head(self) -> bool:
        """Whether the merged model has a head of its own: the base's is tied to the embedding, which alone has an adapter."""
        return self.architecture.tied_embeddings and EMBEDDING in self.identity.targets

    def merged_delta(self, name: str, part: int | None = None) -> torch.Tensor | None:
        """What the adapters add to the Hugging Face tensor `name`, or to its `part` of a tensor of all experts: scale · B·A,
        fp32; None if nothing."""
        if name == WHOLE_TENSORS[EMBEDDING] and EMBEDDING in self.identity.targets:
            a, b = self.embedding_matrices()
            return (a.t().float() @ b.t().float()) * self.identity.scale
        if (found := self._place_of(name, part)) is None:
            return None
        a, b = self.linear_matrices(*found)
        delta = (b.float() @ a.float()) * self.identity.scale
        return delta.t() if found[0].in_stack else delta

    def _place_of(self, name: str, part: int | None) -> tuple[Place, int] | None:
        """What has adapters in a Hugging Face tensor, and its layer."""
        if (match := _WEIGHT.fullmatch(name)) is None:
            return None
        parent, _, module = match[2].rpartition(".")
        path = match[2] if part is None else f"{parent}.{part}.{module}"
        return (self.places[path], int(match[1])) if path in self.places else None

    def linear_matrices(self, place: Place, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] of one Hugging Face linear in layer `layer` (from 0), with all its targets.

        In a tensor of all experts rows of gate and up take turns.
        """
        first, second = (
            {target: self._read(place, target, matrix, layer) for target in place.targets}
            for matrix in ("lora_A", "lora_B")
        )
        empty = next(iter(second.values())).new_zeros
        blocks = [second[part] if part in second else empty(number, 0) for part, number in place.rows.items()]
        b = torch.block_diag(*blocks)
        if place.in_stack and len(blocks) > 1:
            b = b.unflatten(0, (len(blocks), -1)).transpose(0, 1).flatten(0, 1)
        return torch.cat(list(first.values())), b

    def _stack_matrices(self, module: str, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of a tensor of all experts, as PEFT holds them: A of all below one another, B by turns in its columns."""
        of_experts = [self.linear_matrices(place, layer) for place in self._stacks[module]]
        return torch.cat([a for a, _ in of_experts]), torch.stack([b for _, b in of_experts], dim=2).flatten(1)

    def _read(self, place: Place, target: str, matrix: str, layer: int) -> torch.Tensor:
        """What was trained, its rows as folders have them. In a checkpoint the layers, and then the experts, are the first
        axes."""
        linear = re.sub(r"local_experts\.\d+", "experts", place.linear)
        name = f"decoder.layers.{linear}.adapters.{target}.{matrix}"
        held = self._reader.read_layer(name, layer, place.expert)
        ((_, tensor),) = to_hugging_face(place.rule(name, layer, matrix), layer, held, self.architecture)
        return tensor

    def embedding_matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, vocabulary] and B [hidden, rank] of the embedding, as they were trained."""
        first, second = (self._reader.read_tensor(key) for key in EMBEDDING_MATRICES)
        return first[: self.architecture.vocabulary_size].t(), second

    def whole_tensor(self, module: str) -> torch.Tensor:
        """The weight of a module that was trained whole, in its stored type, without padding."""
        key = WHOLE["embed_tokens"] if self.architecture.tied_embeddings else WHOLE[module]
        return self._reader.read_tensor(key)[: self.architecture.vocabulary_size]

    def merged(self, name: str, tensor: torch.Tensor, part: int | None = None) -> torch.Tensor:
        """The Hugging Face tensor `name` of the base, or its `part` of a tensor of all experts → that of the tuned model;
        summed in fp32, and not rounded yet."""
        for module in self.identity.train_whole:
            if WHOLE_TENSORS[module] == name:
                return self.whole_tensor(module)
        delta = self.merged_delta(name, part)
        if delta is None:
            return tensor
        summed = delta.add_(tensor)
        if self.identity.dora and (found := self._place_of(name, part)):
            lengths = self.magnitude(*found).float()
            summed *= (lengths / summed.norm(dim=1)).unsqueeze(1)
        return summed

    def magnitude(self, place: Place, layer: int) -> torch.Tensor:
        """DoRA's [out] of one Hugging Face linear in layer `layer`."""
        (target,) = place.targets
        return self._read(place, target, "magnitude", layer)

    def peft_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All matrices by the names that PEFT gives them."""
        for module, prefix in stack_prefixes(self._stacks).items():
            for layer in self._stacks[module][0].layers:
                for name, matrix in zip(("lora_A", "lora_B"), self._stack_matrices(module, layer), strict=True):
                    yield peft_name(layer, "mlp.experts", f"{prefix}{name}"), matrix.contiguous()
        for place in self._linears:
            for layer in place.layers:
                for name, matrix in zip(("lora_A", "lora_B"), self.linear_matrices(place, layer), strict=True):
                    yield peft_name(layer, place.path, name), matrix.contiguous()
                if self.identity.dora:
                    yield peft_name(layer, place.path, "magnitude"), self.magnitude(place, layer)
        if EMBEDDING in self.identity.targets:
            for name, matrix in zip(EMBEDDING_MATRICES.values(), self.embedding_matrices(), strict=True):
                yield peft_embedding_name(name), matrix.contiguous()
        for module in self.identity.train_whole:
            yield peft_whole_name(module), self.whole_tensor(module).contiguous()

    def peft_config(self, base: str) -> dict:
        """PEFT's adapter_config.json; `base` is the Hugging Face folder of the weights that the adapters belong to."""
        places = self.places.values()
        fused = {place.module: len(place.targets) for place in places if len(place.targets) > 1}
        alpha, stabilized, dropout = self.identity.alpha, self.identity.rank_stabilized, self.identity.dropout
        parameters: list[str] = []
        if any(place.expert is not None for place in places):
            # PEFT has no dropout where experts lie in one tensor. It makes one adapter of those of gate and up, of twice the
            # rank and the alpha, which is not the same scale where it goes by √rank.
            alpha, stabilized, dropout = self.identity.scale * self.identity.rank, False, 0.0
            # By the names of its feed-forward linears it finds in a mixture those of experts alone: others as parameters.
            beside = [place.path for place in places if place.expert is None and {*OF_MLP} & {*place.targets}]
            parameters = [f"{'.'.join(path.split('.')[-2:])}.weight" for path in beside]
            parameters += [f"mlp.experts.{module}" for module in self._stacks]
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
                *dict.fromkeys(place.module for place in self._linears),
                *([EMBEDDING] if EMBEDDING in self.identity.targets else []),
            ],
            **({"target_parameters": parameters} if parameters else {}),
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
