"""DeepSeek V3 (and R1, Kimi K2): multi-head latent attention, and experts chosen as in GLM-4.5, from some of their groups."""

import math
from functools import partial
from typing import Any

from megatron_sstoken.model.families.architecture import Latents
from megatron_sstoken.model.families.registry import Config, Experts, Family, register
from megatron_sstoken.model.families.rope import rope_parameters
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture


def whole(config: Config, name: str, least: int = 1) -> int:
    """The whole number that a field holds. Raises ValueError for anything else."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not possible: only a whole number from {least} on is")
    return value


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
        "router_bias": True,
        "num_dense_layers": min(whole(config, "first_k_dense_replace", least=0), whole(config, "num_hidden_layers")),
        "dense_ffn_hidden_size": whole(config, "intermediate_size"),
        "shared_ffn_hidden_size": whole(config, "n_shared_experts") * whole(config, "moe_intermediate_size"),
        "ignored_layers": config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0,
    }


def transformer_options(config: Config) -> dict[str, Any]:
    """The scale of attention scores; the router, in fp32 as in transformers, and its groups of experts."""
    if config["norm_topk_prob"] is not True:
        raise ValueError(f"norm_topk_prob={config['norm_topk_prob']!r} is not supported: only True is")
    head_dim = whole(config, "qk_nope_head_dim") + whole(config, "qk_rope_head_dim")
    return {
        "softmax_scale": head_dim**-0.5 * _growth(config) ** 2,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": float(config["routed_scaling_factor"]),
        "moe_router_dtype": "fp32",
        **_groups(config),
    }


def _growth(config: Config) -> float:
    """What attention's scale is multiplied by twice, for RoPE that is scaled: YaRN's, and transformers asks of any kind."""
    parameters = rope_parameters("config.json", config)
    scale = parameters.get("mscale_all_dim")
    if parameters["rope_type"] == "default" or not scale:
        return 1.0
    factor = parameters.get("factor")
    if factor is None:
        raise ValueError(f"mscale_all_dim={scale!r} is not possible without the factor of the rope scaling: add it")
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _groups(config: Config) -> dict[str, Any]:
    """Of which groups of experts each token takes its own: of those with the largest sums of their best two scores.

    megatron sums as many of a group as fall to each chosen one. Raises ValueError for other numbers than 2.
    """
    groups, taken = whole(config, "n_group"), whole(config, "topk_group")
    experts, chosen = whole(config, "n_routed_experts"), whole(config, "num_experts_per_tok")
    if taken > groups or experts % groups or experts < 2 * groups or chosen > taken * (experts // groups):
        raise ValueError(
            f"n_group={groups} with topk_group={taken} is not possible for num_experts_per_tok={chosen} of "
            f"n_routed_experts={experts}: groups are equal, of 2 experts or more, and those taken hold enough of them"
        )
    if taken == groups:  # all compete
        return {}
    if chosen // taken != 2:
        raise ValueError(
            f"topk_group={taken} of n_group={groups} with num_experts_per_tok={chosen} is not supported: megatron ranks groups "
            f"by their best {chosen // taken}, transformers by their best 2: only twice as many experts as groups are"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": taken}


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
        understood=frozenset(
            "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim rope_interleave n_group "
            "topk_group first_k_dense_replace n_shared_experts routed_scaling_factor num_nextn_predict_layers "
            # What follows changes nothing.
            "num_mtp_layers aux_loss_alpha seq_aux ep_size auto_map".split()
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
