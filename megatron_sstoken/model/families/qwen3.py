"""Qwen3: q and k normalised per head, a `head_dim` of its own, Qwen2's window, no biases."""

from megatron_sstoken.model.families.qwen2 import QWEN_DEFAULTS, upper_layers
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Family, register

register(
    Family(
        "qwen3",
        biases=ATTENTION_BIAS,
        absent=QWEN_DEFAULTS | {"head_dim": 128},
        qk_norm=True,
        optional_window=True,
        layer_kinds=upper_layers,
        tiny={"head_dim": 16, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
    )
)
