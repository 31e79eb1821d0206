"""GLM-4.5 and 4.6: experts chosen by sigmoid scores with a bias, shared ones beside them, and dense layers before."""

from functools import partial
from typing import Any

from megatron_sstoken.model.families.registry import Config, Experts, Family, register
from megatron_sstoken.model.families.sigmoid_router import FIELDS, mixture_sizes, router_options
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture


def further(config: Config) -> dict[str, Any]:
    """Norms of queries and keys, and the mixture."""
    return {"qk_norm": bool(config.get("use_qk_norm")), **mixture_sizes(config)}


register(
    Family(
        "glm4_moe",
        fixed={"sliding_window": None},
        biases={"attention_bias": frozenset({"qkv_bias"})},
        understood=FIELDS | {"use_qk_norm"},
        absent={
            "intermediate_size": 10944,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 1,
        },
        partial_rotary=True,
        one_kind_of_layer=True,
        experts=Experts("moe_intermediate_size", count=("n_routed_experts",)),
        further=further,
        transformer_options=router_options,
        weight_rules=partial(decoder_rules, mlp=mixture("mlp", LLAMA_NAMES)),
        tiny={
            "head_dim": 8,
            "use_qk_norm": True,
            "attention_bias": True,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    )
)
