"""Qwen3-Next: delta nets and gates as in Qwen3.5, in a mixture of experts with a gated expert for every token beside them."""

from functools import partial

from megatron_sstoken.model.families.delta_nets import ABSENT, FIELDS, FIXED, TINY, TINY_MIXTURE, three_of_four
from megatron_sstoken.model.families.delta_nets import further_of_mixture as further
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Experts, Family, register
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture

register(
    Family(
        "qwen3_next",
        fixed=FIXED,
        biases=ATTENTION_BIAS,
        understood=FIELDS | {"decoder_sparse_step", "mlp_only_layers", "shared_expert_intermediate_size"},
        absent=ABSENT
        | {
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
        },
        partial_rotary=True,
        qk_norm=True,
        experts=Experts("moe_intermediate_size", renormalizes="norm_topk_prob"),
        layer_kinds=three_of_four,
        other_kind="linear_attention",
        further=further,
        weight_rules=partial(
            decoder_rules, mlp=mixture("mlp", LLAMA_NAMES, shared="shared_expert"), delta_by_head=True
        ),
        tiny=TINY | TINY_MIXTURE | {"mlp_only_layers": [2]},
    )
)
