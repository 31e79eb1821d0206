"""Qwen3.5 (text): gated delta nets in place of most attention; gates of what attention gives; norms by 1 + weight."""

from megatron_sstoken.model.families.delta_nets import ABSENT, FIELDS, FIXED, TINY, further, three_of_four
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Family, register

register(
    Family(
        "qwen3_5_text",
        fixed=FIXED | {"mlp_only_layers": []},
        biases=ATTENTION_BIAS,
        understood=FIELDS,
        absent=ABSENT
        | {
            "intermediate_size": 12288,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
        },
        partial_rotary=True,
        qk_norm=True,
        layer_kinds=three_of_four,
        other_kind="linear_attention",
        further=further,
        tiny=TINY | {"attention_bias": True},
    )
)
