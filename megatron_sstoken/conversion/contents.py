"""What megatron's checkpoints of an architecture hold: parameters and the stored tensors that they are cut into.

Asked of the model itself, built for one process without memory for its weights, so that names, shapes and offsets are
those that training saves and loads, for every family.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory

from megatron_sstoken.config import LoraSettings, Settings
from megatron_sstoken.model.build import build_model
from megatron_sstoken.model.families import Architecture, Split, WeightRule
from megatron_sstoken.model.lora_places import adapter_places
from megatron_sstoken.model.lora_targets import (
    EMBEDDING_MATRICES,
    WHOLE,
    is_adapter,
    peft_embedding_name,
    peft_whole_name,
)
from megatron_sstoken.model.weights import held_weights, rules_of_chunk, to_hugging_face
from megatron_sstoken.parallel import create_layout, reset_layout, start_processes


@dataclass(frozen=True)
class Piece:
    """A part of a parameter as it lies in the stored tensor `key`."""

    key: str
    offset: tuple[int, ...]
    """Where it begins in the stored tensor."""
    global_shape: tuple[int, ...]
    """Shape of the stored tensor, which may hold all layers."""
    any_size: bool
    """Whether the stored tensor may have more rows (a vocabulary with another padding)."""
    data: torch.Tensor
    """A view into the parameter, with the stored tensor's number of axes."""


@dataclass(frozen=True)
class Parameter:
    """A whole parameter of the model, as one process without tensor parallel holds it."""

    name: str
    rule: WeightRule
    layer: int
    shape: torch.Size
    entry: ShardedTensor | ShardedTensorFactory
    """What megatron says about its storing; its data is on the meta device."""

    @property
    def numel(self) -> int:
        return self.shape.numel()

    def meta_tensor(self) -> torch.Tensor:
        """A tensor of its shape without memory."""
        return torch.empty(self.shape, device="meta")

    def pieces(self, tensor: torch.Tensor) -> Iterator[Piece]:
        """`tensor`, of this parameter's shape or with fewer vocabulary rows, as views into the stored tensors."""
        if isinstance(self.entry, ShardedTensorFactory):  # gate and up are stored apart
            parts = list(nested_values(replace(self.entry, data=tensor).build()))
        else:
            parts = [replace(self.entry, data=tensor, dtype=tensor.dtype, local_shape=tuple(tensor.shape))]
        for part in parts:
            view = part.data.reshape((1,) * part.prepend_axis_num + tuple(part.local_shape))
            yield Piece(part.key, tuple(part.global_offset), part.global_shape, part.allow_shape_mismatch, view)

    def hugging_face(self, tensor: torch.Tensor, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
        """The Hugging Face tensors of a value of this parameter."""
        return to_hugging_face(self.rule, self.layer, tensor, architecture)


@dataclass(frozen=True)
class Contents:
    """All that a checkpoint of the weights holds."""

    architecture: Architecture
    parameters: tuple[Parameter, ...]
    """In the order of the model: embedding, layers, final norm, head."""
    objects: tuple[ShardedObject, ...]
    """Small objects that megatron asks for when it loads (states of FP8 layers; empty without them)."""


def checkpoint_contents(architecture: Architecture, *, vocabulary_multiple: int = 1) -> Contents:
    """What a checkpoint of `architecture` holds, the vocabulary padded to a multiple of `vocabulary_multiple`.

    Creates and gives up the layout of one process: not to be called while a model is there. Needs no GPU.
    """
    settings = Settings()
    settings.model.vocabulary_multiple = vocabulary_multiple
    with _chunk_of(architecture, settings) as (chunk, stored):
        rules = rules_of_chunk(chunk, architecture)
        parameters = tuple(
            Parameter(name, *rules[name], parameter.shape, stored[name]) for name, parameter in held_weights(chunk)
        )
    objects = tuple(value for value in nested_values(stored) if isinstance(value, ShardedObject))
    return Contents(architecture, parameters, objects)


def adapter_contents(architecture: Architecture, lora: LoraSettings) -> Contents:
    """What a checkpoint of the adapters of `architecture` holds, as `checkpoint_contents`.

    Each has the name of PEFT's matrix; the parts of a linear that is fused in the Hugging Face model have one name. Those in a
    tensor of all experts are named as if it held linears.
    """
    places = adapter_places(architecture, lora.targets)
    place_of = {(place.linear, target): place for place in places for target in place.targets}
    module_of = {WHOLE[module]: module for module in lora.train_whole}
    parameters = []
    with _chunk_of(architecture, Settings(lora=lora)) as (chunk, stored):
        for name, parameter in chunk.named_parameters():
            if name in EMBEDDING_MATRICES:
                split = Split.VOCABULARY if name.endswith("lora_A.weight") else Split.WHOLE
                rule = WeightRule(name, (peft_embedding_name(EMBEDDING_MATRICES[name]),), split)
                parameters.append(Parameter(name, rule, 0, parameter.shape, stored[name]))
            elif is_adapter(name):
                _, _, layer, *linear, _, target, matrix = name.split(".")
                rule = place_of[".".join(linear), target].rule(name, int(layer), matrix)
                parameters.append(Parameter(name, rule, int(layer), parameter.shape, stored[name]))
            elif name in module_of:
                rule = WeightRule(name, (peft_whole_name(module_of[name]),), Split.VOCABULARY)
                parameters.append(Parameter(name, rule, 0, parameter.shape, stored[name]))
    return Contents(architecture, tuple(parameters), objects=())


@contextmanager
def _chunk_of(architecture: Architecture, settings: Settings) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The model on one process, without memory for its weights, and what megatron says about their storing."""
    os.environ.setdefault("SSTOKEN_DEVICE", "cpu")
    start_processes()
    settings.training.precision = "fp32"
    layout = create_layout(settings.parallel, seed=0)
    try:
        (chunk,) = build_model(architecture, settings, layout, trainable=False, shapes_only=True).unwrapped
        yield chunk, chunk.sharded_state_dict(metadata={"dp_cp_group": layout.groups.dp_cp})
    finally:
        reset_layout()
