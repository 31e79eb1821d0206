"""Which modules the layers are made of: megatron's own specs with our parts in the places made for that."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.attention import AttentionCapture, TorchCoreAttention, core_attention_builder
from megatron_sstoken.model.biases import add_biases
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.last_layer import LastLayer
from megatron_sstoken.model.lora import adapt_layer
from megatron_sstoken.model.norm import RMSNorm
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
    kind = {"num_experts": config.num_moe_experts, "qk_layernorm": config.qk_layernorm}
    if config.transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        spec = get_gpt_layer_with_transformer_engine_spec(**kind, moe_grouped_gemm=config.moe_grouped_gemm)
        norm = TENorm
        if config.num_moe_experts:
            # Before experts, too, the norm is stored under the key that megatron's spec for torch gives it.
            spec.submodules.sharded_state_dict_keys_map |= {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        core_attention = _with_heads_dealt_out(spec.submodules.self_attention.submodules.core_attention)
    else:
        spec, norm = get_gpt_layer_local_spec(normalization="RMSNorm", **kind), RMSNorm
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm
        if config.qk_layernorm:
            spec.submodules.self_attention.submodules.q_layernorm = norm
            spec.submodules.self_attention.submodules.k_layernorm = norm
        core_attention = TorchCoreAttention
    attention = spec.submodules.self_attention.submodules
    attention.core_attention = core_attention_builder(core_attention, frozenset(captured_layers), capture)
    if lora.rank:
        adapt_layer(spec.submodules, config, lora)
    add_biases(spec.submodules, architecture)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pipeline_rank)
    layers = [spec] * num_layers
    # Not in a mixture, whose experts take tokens of many ranks, nor in FP8, whose tiles want certain numbers of rows.
    if with_last_layer and not config.num_moe_experts and not config.fp8:
        layers[-1] = replace(spec, module=LastLayer)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def _with_heads_dealt_out(attention: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`attention`, Transformer Engine's, for whatever layer: where context parallel meets a sliding window, each rank
    attends with some of the heads to whole samples. Its usual ring of keys and values refuses windows.

    megatron's own list of a way for each layer, `cp_comm_type`, is read one layer off in 0.16.
    """

    def build(*, config: TransformerConfig, layer_number: int, **options: Any) -> torch.nn.Module:
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        if windowed and config.context_parallel_size > 1:
            options["cp_comm_type"] = "a2a"
        return attention(config=config, layer_number=layer_number, **options)

    return build
