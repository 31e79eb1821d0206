"""GPT-OSS: attention sinks, windows in every other layer, biases everywhere, and experts with a clamped activation."""

from functools import partial
from typing import Any

from megatron_sstoken.model.families.registry import Config, Experts, Family, register, windows_but_every
from megatron_sstoken.model.families.weight_map import decoder_rules, stacked_experts

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""RoPE of a config that does not speak of it."""


def with_rope(config: Config) -> Config:
    """The config, with the family's RoPE where it has none."""
    return config if config.get("rope_scaling") or config.get("rope_parameters") else config | {"rope_scaling": _YARN}


def transformer_options(config: Config) -> dict[str, Any]:
    """(up + 1) · gate · sigmoid(1.702 · gate), the gate clamped from above and up on both sides."""
    limit = config["swiglu_limit"]
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0:
        raise ValueError(f"swiglu_limit={limit!r} is not possible: only a number above 0 is")
    return {"glu_linear_offset": 1.0, "activation_func_clamp_value": float(limit)}


register(
    Family(
        "gpt_oss",
        fixed={"attention_bias": True, "swiglu_alpha": 1.702},
        # The latter two stand in the first configs beside the fields that count.
        understood=frozenset({"swiglu_limit", "initial_context_length", "experts_per_token"}),
        absent={
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150000.0,
            "sliding_window": 128,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "swiglu_limit": 7.0,
        },
        experts=Experts("intermediate_size"),
        layer_kinds=windows_but_every(2),
        full_rope=with_rope,
        further=lambda config: {
            "qkv_bias": True,
            "output_bias": True,
            "expert_bias": True,
            "attention_sinks": True,
            "activation": "quick_gelu",
        },
        transformer_options=transformer_options,
        weight_rules=partial(decoder_rules, mlp=stacked_experts),
        tiny={
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 11,
            "swiglu_limit": 1.5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "rope_parameters": _YARN | {"original_max_position_embeddings": 64, "factor": 4.0, "rope_theta": 150000.0},
        },
    )
)
