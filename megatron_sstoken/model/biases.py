"""Biases of linears: of some of a layer's, where megatron's `add_bias_linear` means all of them; and of experts."""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_sstoken.compat import dense_mlp
from megatron_sstoken.model.delta_net import DeltaNetSubmodules
from megatron_sstoken.model.families import Architecture


def add_biases(layer: TransformerLayerSubmodules, architecture: Architecture) -> None:
    """Give the linears of a layer's spec the biases that the architecture names beside those of q, k and v."""
    attention = layer.self_attention.submodules
    if architecture.output_bias and not isinstance(attention, DeltaNetSubmodules):
        attention.linear_proj = _biased(attention.linear_proj)
    if architecture.mlp_bias and (mlp := dense_mlp(layer)) is not None:
        mlp.linear_fc1, mlp.linear_fc2 = _biased(mlp.linear_fc1), _biased(mlp.linear_fc2)


def _biased(linear: type | ModuleSpec) -> ModuleSpec:
    """A linear of a spec, plain or with adapters, with a bias whatever it is asked to have."""
    spec = linear if isinstance(linear, ModuleSpec) else ModuleSpec(linear)
    kind: Any = spec.module

    class Biased(kind):
        def __init__(self, *args, **options):
            super().__init__(*args, **(options | {"bias": True}))

    return replace(spec, module=Biased)


def let_experts_add_biases(chunk: torch.nn.Module) -> None:
    """Give the experts of a model chunk that are computed one after another outputs of their own to add their biases to.

    megatron adds them in place, to what its row-parallel linear returned: a view that autograd lets nobody write to.
    """
    for experts in chunk.modules():
        if isinstance(experts, SequentialMLP):
            for expert in experts.local_experts:
                expert.linear_fc2.register_forward_hook(_copied)


def _copied(linear: torch.nn.Module, inputs: tuple, outputs: tuple) -> tuple:
    """A forward hook of a linear: its output copied, its bias as it is."""
    output, bias = outputs
    return output.clone(), bias
