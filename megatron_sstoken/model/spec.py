"""Which modules the layers are made of: megatron's own specs with our parts in the places made for that."""

import functools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sstoken.compat import dense_mlp
from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.attention import AttentionCapture, TorchCoreAttention, core_attention_builder
from megatron_sstoken.model.biases import add_biases
from megatron_sstoken.model.delta_net import DeltaNetSubmodules, GatedDeltaNet
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.gated_attention import GatedSelfAttention
from megatron_sstoken.model.last_layer import LastLayer
from megatron_sstoken.model.latents import LatentSelfAttention, LatentSubmodules
from megatron_sstoken.model.lora_layer import adapt_layer
from megatron_sstoken.model.norm import RMSNorm, norm_over_heads
from megatron_sstoken.model.residual import ResidualAdd
from megatron_sstoken.model.rotary import TwoRotariesSelfAttention, give_lengths, turning_pairs
from megatron_sstoken.parallel import Layout


def block_spec(
    config: TransformerConfig,
    architecture: Architecture,
    captured_layers: tuple[int, ...],
    capture: AttentionCapture,
    vp_stage: int | None,
    layout: Layout,
    lora: LoraSettings,
    with_last_layer: bool,
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, made as `config.transformer_impl` says, their core attention wrapped in a capture.

    `transformer_engine`: megatron's spec for it. `local`: megatron's spec for torch, with our norm and core attention in
    place of those that need apex or refuse packs. Either with adapters where `lora` asks for them. `with_last_layer`: whether
    the model ends in this chunk.
    """
    make_core = partial(core_attention_builder, captured_layers=frozenset(captured_layers), capture=capture)
    make_layer = functools.cache(partial(_layer_spec, config, architecture, layout, lora, make_core))
    first = get_transformer_layer_offset(config, vp_stage, layout.pipeline_rank)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pipeline_rank))
    mixed, attention = architecture.sparse_layers, architecture.attention_layers
    layers = [make_layer(mixed=number in mixed, attention=number in attention) for number in numbers]
    # Not in a mixture, whose experts take tokens of many ranks, nor in FP8, whose tiles want certain numbers of rows.
    if with_last_layer and not config.num_moe_experts and not config.fp8:
        layers[-1] = replace(layers[-1], module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_norm(config))


def _norm(config: TransformerConfig) -> Any:
    """What makes norms of hidden states."""
    if config.transformer_impl != "transformer_engine":
        return RMSNorm
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _layer_spec(
    config: TransformerConfig,
    architecture: Architecture,
    layout: Layout,
    lora: LoraSettings,
    make_core: Callable[..., Any],
    *,
    mixed: bool,
    attention: bool,
) -> ModuleSpec:
    """A layer, with a mixture of experts if `mixed`, with attention or else a delta net.

    `make_core`: core attention of a spec → what takes its place.
    """
    kind = {"num_experts": config.num_moe_experts if mixed else None, "qk_layernorm": config.qk_layernorm}
    norm = _norm(config)
    if config.transformer_impl == "transformer_engine":
        spec = get_gpt_layer_with_transformer_engine_spec(**kind, moe_grouped_gemm=config.moe_grouped_gemm)
        if mixed:
            # Before experts, too, the norm is stored under the key that megatron's spec for torch gives it.
            spec.submodules.sharded_state_dict_keys_map |= {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        core_attention = _with_heads_dealt_out(spec.submodules.self_attention.submodules.core_attention)
        # Transformer Engine's takes sinks or packed samples, not both, and of packed samples few kernels take values that are
        # not as wide as keys.
        if architecture.attention_sinks or architecture.latents is not None:
            core_attention = TorchCoreAttention
    else:
        spec = get_gpt_layer_local_spec(normalization="RMSNorm", **kind)
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = norm
            spec.submodules.self_attention.submodules.k_layernorm = norm
        core_attention = TorchCoreAttention
    if architecture.window_rope_base is not None:
        spec.submodules.self_attention.module = TwoRotariesSelfAttention
    elif architecture.rotary_pairs and architecture.latents is None:
        spec.submodules.self_attention.module = turning_pairs(architecture.rotary_dim)
    elif architecture.output_gate:
        spec.submodules.self_attention.module = GatedSelfAttention
    _arrange_norms(spec.submodules, config, architecture, norm, layout)
    parts = spec.submodules.self_attention.submodules
    parts.core_attention = make_core(core_attention)
    if not attention:
        _make_delta_net(spec.submodules, config, architecture, norm)
    elif architecture.latents is not None:
        _make_of_latents(spec.submodules, config, architecture, norm)
    if lora.rank:
        adapt_layer(spec.submodules, config, architecture, lora)
    add_biases(spec.submodules, architecture)
    return spec


def _make_of_latents(
    layer: TransformerLayerSubmodules, config: TransformerConfig, architecture: Architecture, norm: Any
) -> None:
    """Put latent attention into the spec of a layer."""
    up_projection = _apart_from_norm(layer, config, norm)
    attention = layer.self_attention.submodules
    layer.self_attention = ModuleSpec(
        LatentSelfAttention,
        params={"architecture": architecture},
        submodules=LatentSubmodules(
            linear_q_proj=up_projection,
            linear_q_up_proj=up_projection,
            linear_kv_up_proj=up_projection,
            core_attention=attention.core_attention,
            linear_proj=attention.linear_proj,
        ),
    )


def _make_delta_net(
    layer: TransformerLayerSubmodules, config: TransformerConfig, architecture: Architecture, norm: Any
) -> None:
    """Put a delta net in place of the attention of a layer's spec."""
    row_parallel: type = RowParallelLinear
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        row_parallel = TERowParallelLinear
    layer.self_attention = ModuleSpec(
        GatedDeltaNet,
        params={"net": architecture.delta_net},
        submodules=DeltaNetSubmodules(_apart_from_norm(layer, config, norm), row_parallel),
    )


def _apart_from_norm(layer: TransformerLayerSubmodules, config: TransformerConfig, norm: Any) -> type:
    """Give attention a norm of its own before it; a column-parallel linear without one."""
    layer.input_layernorm = norm
    # Where megatron stores the norm of a linear that has one.
    layer.sharded_state_dict_keys_map.pop("input_layernorm.", None)
    if config.transformer_impl != "transformer_engine":
        return ColumnParallelLinear
    from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

    return TEColumnParallelLinear


def _arrange_norms(
    layer: TransformerLayerSubmodules, config: TransformerConfig, a: Architecture, norm: Any, layout: Layout
) -> None:
    """Put norms where the architecture has them, in a spec that has them before attention and feed-forward part."""
    attention, mlp = layer.self_attention.submodules, dense_mlp(layer)
    if a.norms.before_attention is None and a.norms.before_mlp is None:
        layer.input_layernorm = layer.pre_mlp_layernorm = IdentityOp
        if norm is not RMSNorm:  # Transformer Engine's, which are part of the linears
            from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

            assert mlp is not None
            attention.linear_qkv = mlp.linear_fc1 = TEColumnParallelLinear
    for place, name in (("self_attn_bda", a.norms.after_attention), ("mlp_bda", a.norms.after_mlp)):
        if name is not None or a.residual_multiplier != 1.0:
            params = {"config": config, "norm": norm if name else None, "multiplier": a.residual_multiplier}
            setattr(layer, place, ModuleSpec(ResidualAdd, params=params))
    if a.qk_norm_over_heads:
        attention.q_layernorm = norm_over_heads(a.num_attention_heads, layout.groups.tp)
        attention.k_layernorm = norm_over_heads(a.num_query_groups, layout.groups.tp)


def _with_heads_dealt_out(attention: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`attention`, Transformer Engine's, for whatever layer: where context parallel meets a sliding window, each rank
    attends with some of the heads to whole samples. Its usual ring of keys and values refuses windows.

    megatron's own list of a way for each layer, `cp_comm_type`, is read one layer off in 0.16.
    """

    def build(*, config: TransformerConfig, layer_number: int, **options: Any) -> torch.nn.Module:
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        if windowed and config.context_parallel_size > 1:
            options["cp_comm_type"] = "a2a"
        built = attention(config=config, layer_number=layer_number, **options)
        if not config.apply_rope_fusion:
            built.register_forward_pre_hook(give_lengths, with_kwargs=True)
        return built

    return build
