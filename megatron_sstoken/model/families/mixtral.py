"""Mixtral: Mistral with experts, whose router always renormalises over the chosen ones."""

from functools import partial

from megatron_sstoken.model.families.mistral import MISTRAL_DEFAULTS
from megatron_sstoken.model.families.registry import Experts, Family, register
from megatron_sstoken.model.families.weight_map import decoder_rules, mixture

register(
    Family(
        "mixtral",
        fixed={"router_jitter_noise": 0.0},
        absent=MISTRAL_DEFAULTS
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
        one_kind_of_layer=True,
        experts=Experts("intermediate_size"),
        weight_rules=partial(decoder_rules, mlp=mixture("block_sparse_moe", ("w1", "w3", "w2"))),
        tiny={"num_local_experts": 4, "num_experts_per_tok": 2},
    )
)
