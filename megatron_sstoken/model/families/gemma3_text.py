"""Gemma 3 (text): norms before and after, by 1 + weight; GeGLU; a scaled embedding; another RoPE in layers with a window."""

from typing import Any

from megatron_sstoken.model.families.architecture import LayerNorms
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Config, Family, register, windows_but_every
from megatron_sstoken.model.families.rope import rope_by_kind, with_full_rope

_BASES = (1e6, 1e4)
"""Of RoPE in layers without and with a window, where the config does not say."""


def further(config: Config) -> dict[str, Any]:
    """What the docstring of this module says."""
    return {
        "activation": "gelu_pytorch_tanh",
        "zero_centered_norms": True,
        "embedding_multiplier": float(config["hidden_size"]) ** 0.5,
        "window_rope_base": float(rope_by_kind(config, *_BASES)[1]["rope_theta"]),
    }


register(
    Family(
        "gemma3_text",
        fixed={
            "hidden_activation": "gelu_pytorch_tanh",
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        biases=ATTENTION_BIAS,
        understood=frozenset(
            {"query_pre_attn_scalar", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"}
        ),
        absent={
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
        },
        qk_norm=True,
        norms=LayerNorms(
            after_attention="post_attention_layernorm",
            before_mlp="pre_feedforward_layernorm",
            after_mlp="post_feedforward_layernorm",
        ),
        layer_kinds=windows_but_every(6),
        full_rope=lambda config: with_full_rope(config, rope_by_kind(config, *_BASES)[0]),
        further=further,
        transformer_options=lambda config: {"softmax_scale": float(config["query_pre_attn_scalar"]) ** -0.5},
        tiny={
            "head_dim": 16,
            "pad_token_id": None,  # transformers' default starts at zero, and its gradient is dropped
            "query_pre_attn_scalar": 24,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    )
)
