"""GLM-4 (0414, dense): norms before and after, gate and up in one tensor, RoPE on neighbouring pairs of half of each head."""

from megatron_sstoken.model.families.architecture import Architecture, LayerNorms
from megatron_sstoken.model.families.registry import Family, register
from megatron_sstoken.model.families.weight_map import WeightRule, decoder_rules, fuse


def weight_rules(architecture: Architecture) -> list[WeightRule]:
    """Llama's, with gate and up fused."""
    return fuse(decoder_rules(architecture), "linear_fc1", "gate_up_proj")


register(
    Family(
        "glm4",
        fixed={"sliding_window": None},
        biases={"attention_bias": frozenset({"qkv_bias"})},
        absent={
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1.5625e-07,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
        },
        partial_rotary=True,
        one_kind_of_layer=True,
        norms=LayerNorms(after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"),
        further=lambda config: {"rotary_pairs": True},
        weight_rules=weight_rules,
        tiny={
            "head_dim": 16,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "pad_token_id": None,  # transformers' default lies outside a tiny vocabulary
        },
    )
)
