"""Phi-3, Phi-3.5 and Phi-4: Llama with q, k and v in one tensor, and gate and up in another."""

from megatron_sstoken.model.families.architecture import Architecture
from megatron_sstoken.model.families.registry import Config, Family, register
from megatron_sstoken.model.families.weight_map import WeightRule, decoder_rules, fuse


def weight_rules(architecture: Architecture) -> list[WeightRule]:
    """Llama's, fused."""
    return fuse(fuse(decoder_rules(architecture), "linear_qkv", "qkv_proj"), "linear_fc1", "gate_up_proj")


def with_longrope(config: Config) -> Config:
    """Old configs call LongRoPE `su` or `yarn` (transformers' `configuration_phi3.py`)."""
    changed = dict(config)
    for name in ("rope_scaling", "rope_parameters"):
        given = config.get(name)
        if isinstance(given, dict) and given.get("rope_type", given.get("type")) in ("su", "yarn"):
            changed[name] = {key: value for key, value in given.items() if key != "type"} | {"rope_type": "longrope"}
    return changed


register(
    Family(
        "phi3",
        fixed={"attention_bias": False, "mlp_bias": False, "lm_head_bias": False},
        # Dropout of training, which there is none of here, and what only the code beside the weights reads.
        understood=frozenset(
            {
                "resid_pdrop",
                "embd_pdrop",
                "original_max_position_embeddings",
                "auto_map",
                "full_attn_mod",
                "interpolate_factor",
            }
        ),
        absent={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096},
        partial_rotary=True,
        one_kind_of_layer=True,
        full_rope=with_longrope,
        weight_rules=weight_rules,
        tiny={
            "sliding_window": 11,
            "original_max_position_embeddings": 256,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.5, 3.0],
                "long_factor": [1.0, 4.0, 16.0],
            },
            "pad_token_id": None,  # transformers' default lies outside a tiny vocabulary
        },
    )
)
