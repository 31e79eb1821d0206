"""DeepSeek V3 (and R1, Kimi K2): multi-head latent attention, and experts chosen as in GLM-4.5, from some of their groups."""

from functools import partial
from typing import Any

from megatron_sstoken.model.families.architecture import Latents
from megatron_sstoken.model.families.registry import Config, Experts, Family, register, whole
from megatron_sstoken.model.families.rope import rope_parameters, yarn_growth
from megatron_sstoken.model.families.sigmoid_router import FIELDS, mixture_sizes, router_options
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture


def further(config: Config) -> dict[str, Any]:
    """Latent attention, whose heads have parts with and without RoPE; the rest of the mixture.

    Raises ValueError for heads that share keys, and for what contradicts the sizes of their parts.
    """
    plain, rotary = whole(config, "qk_nope_head_dim"), whole(config, "qk_rope_head_dim")
    heads, head_dim = whole(config, "num_attention_heads"), plain + rotary
    for name, value in {"num_key_value_heads": heads, "head_dim": rotary, "qk_head_dim": head_dim}.items():
        if config.get(name) not in (None, value):
            raise ValueError(f"{name}={config[name]!r} is not supported: only {value} is, which the other sizes say")
    return {
        "num_query_groups": heads,
        "head_dim": head_dim,
        "latents": Latents(
            query=None if config["q_lora_rank"] is None else whole(config, "q_lora_rank"),
            key_value=whole(config, "kv_lora_rank"),
            plain_dim=plain,
            rotary_dim=rotary,
            value_dim=whole(config, "v_head_dim"),
        ),
        "rotary_pairs": bool(config["rope_interleave"]),
        **mixture_sizes(config),
    }


def transformer_options(config: Config) -> dict[str, Any]:
    """The scale of attention scores, and the router."""
    head_dim = whole(config, "qk_nope_head_dim") + whole(config, "qk_rope_head_dim")
    return {"softmax_scale": head_dim**-0.5 * _growth(config) ** 2, **router_options(config)}


def _growth(config: Config) -> float:
    """What attention's scale is multiplied by twice, for RoPE that is scaled: YaRN's, and transformers asks of any kind."""
    parameters = rope_parameters("config.json", config)
    scale = parameters.get("mscale_all_dim")
    if parameters["rope_type"] == "default" or not scale:
        return 1.0
    factor = parameters.get("factor")
    if factor is None:
        raise ValueError(f"mscale_all_dim={scale!r} is not possible without the factor of the rope scaling: add it")
    return yarn_growth(factor, scale)


register(
    Family(
        "deepseek_v3",
        fixed={
            "attention_bias": False,
            "sliding_window": None,
            # transformers does not read these, and other programs do.
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "moe_layer_freq": 1,
        },
        understood=FIELDS
        | frozenset(
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim rope_interleave "
            # What follows changes nothing.
            "aux_loss_alpha seq_aux ep_size auto_map".split()
        ),
        absent={
            "intermediate_size": 18432,
            "num_key_value_heads": 128,
            "max_position_embeddings": 4096,
            "q_lora_rank": 1536,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "rope_interleave": True,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
        },
        one_kind_of_layer=True,
        experts=Experts("moe_intermediate_size", count=("n_routed_experts",)),
        further=further,
        transformer_options=transformer_options,
        weight_rules=partial(decoder_rules, mlp=mixture("mlp", LLAMA_NAMES)),
        tiny={
            "num_key_value_heads": 4,
            "q_lora_rank": 20,
            "kv_lora_rank": 12,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 6,
            "rms_norm_eps": 1e-3,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "mscale": 0.7,
                "mscale_all_dim": 1.0,
            },
        },
    )
)
