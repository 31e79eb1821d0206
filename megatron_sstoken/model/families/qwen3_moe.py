"""Qwen3-MoE: Qwen3 with experts in every layer; the router renormalises where `norm_topk_prob` says so."""

from functools import partial

from megatron_sstoken.model.families.qwen2 import QWEN_DEFAULTS
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Experts, Family, register
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture

register(
    Family(
        "qwen3_moe",
        fixed={"decoder_sparse_step": 1, "mlp_only_layers": []},
        biases=ATTENTION_BIAS,
        one_kind_of_layer=True,
        absent=QWEN_DEFAULTS | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
        qk_norm=True,
        experts=Experts("moe_intermediate_size", renormalizes="norm_topk_prob"),
        optional_window=True,
        weight_rules=partial(decoder_rules, mlp=mixture("mlp", LLAMA_NAMES)),
        tiny={"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    )
)
