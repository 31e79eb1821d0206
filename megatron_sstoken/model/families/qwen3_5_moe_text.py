"""Qwen3.5 (text) as a mixture of experts: Qwen3-Next's, with experts in every layer and the linears of Qwen3.5."""

from functools import partial

from megatron_sstoken.model.families.delta_nets import ABSENT, FIELDS, FIXED, TINY, TINY_MIXTURE, three_of_four
from megatron_sstoken.model.families.delta_nets import further_of_mixture as further
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Experts, Family, register
from megatron_sstoken.model.families.weight_map import LLAMA_NAMES, decoder_rules, mixture

register(
    Family(
        "qwen3_5_moe_text",
        # transformers does not read the last two.
        fixed=FIXED | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        biases=ATTENTION_BIAS,
        understood=FIELDS | {"shared_expert_intermediate_size"},
        absent=ABSENT
        | {
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
        },
        partial_rotary=True,
        qk_norm=True,
        experts=Experts("moe_intermediate_size"),
        layer_kinds=three_of_four,
        other_kind="linear_attention",
        further=further,
        weight_rules=partial(decoder_rules, mlp=mixture("mlp", LLAMA_NAMES, shared="shared_expert")),
        tiny=TINY | TINY_MIXTURE,
    )
)
