"""Biases of some linears of a layer: megatron's `add_bias_linear` means all of them."""

from dataclasses import replace
from typing import Any

from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_sstoken.compat import dense_mlp
from megatron_sstoken.model.families import Architecture


def add_biases(layer: TransformerLayerSubmodules, architecture: Architecture) -> None:
    """Give the linears of a layer's spec the biases that the architecture names beside those of q, k and v."""
    if architecture.output_bias:
        attention = layer.self_attention.submodules
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
