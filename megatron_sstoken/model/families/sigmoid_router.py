"""Mixtures of DeepSeek V3 and GLM-4.5: experts chosen by sigmoid scores with a bias, shared experts, dense layers before."""

from typing import Any

from megatron_sstoken.model.families.registry import Config, whole

FIELDS = frozenset(
    "n_group topk_group first_k_dense_replace n_shared_experts routed_scaling_factor num_nextn_predict_layers "
    "num_mtp_layers".split()
)
"""Of `config.json`, beside those of any mixture."""


def mixture_sizes(config: Config) -> dict[str, Any]:
    """Of the architecture: the mixture's, and the layers that predict further tokens, which transformers leaves out."""
    return {
        "router_bias": True,
        "num_dense_layers": min(whole(config, "first_k_dense_replace", least=0), whole(config, "num_hidden_layers")),
        "dense_ffn_hidden_size": whole(config, "intermediate_size"),
        "shared_ffn_hidden_size": whole(config, "n_shared_experts") * whole(config, "moe_intermediate_size"),
        "ignored_layers": config.get("num_nextn_predict_layers") or config.get("num_mtp_layers") or 0,
    }


def router_options(config: Config) -> dict[str, Any]:
    """Of megatron's configuration: the router, in fp32 as in transformers, and its groups of experts."""
    if config["norm_topk_prob"] is not True:
        raise ValueError(f"norm_topk_prob={config['norm_topk_prob']!r} is not supported: only True is")
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": float(config["routed_scaling_factor"]),
        "moe_router_dtype": "fp32",
        **_groups(config),
    }


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
