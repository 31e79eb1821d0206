"""Which modules the layers are made of: megatron's own specs with our parts in the places made for that."""

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.attention import AttentionProbe, TorchCoreAttention, core_attention_builder
from megatron_sstoken.model.lora import adapt_layer
from megatron_sstoken.model.norm import RMSNorm
from megatron_sstoken.parallel import Layout


def block_spec(
    config: TransformerConfig,
    tapped_layers: tuple[int, ...],
    probe: AttentionProbe,
    vp_stage: int | None,
    layout: Layout,
    lora: LoraSettings,
) -> TransformerBlockSubmodules:
    """megatron's local layer spec with our norm and core attention in place of those that need apex or refuse packs, and
    with adapters where `lora` asks for them."""
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        layer.self_attention.submodules.q_layernorm = layer.self_attention.submodules.k_layernorm = RMSNorm
    layer.self_attention.submodules.core_attention = core_attention_builder(
        TorchCoreAttention, frozenset(tapped_layers), probe
    )
    if lora.rank:
        adapt_layer(layer, config, lora)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=layout.pipeline_rank)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)
