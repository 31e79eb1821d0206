"""Qwen2 and Qwen2.5: biases of q, k and v, and a window in the upper layers where `use_sliding_window` is set."""

from megatron_sstoken.model.families.registry import Config, Family, register

QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
"""What absent fields mean in all of Qwen."""


def upper_layers(config: Config, num_layers: int) -> list[str]:
    """Without `layer_types` the window holds from layer `max_window_layers` on (transformers' `configuration_qwen2.py`)."""
    kinds = config.get("layer_types")
    if kinds is not None:
        return kinds
    first = config.get("max_window_layers", 28)
    return ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]


register(
    Family(
        "qwen2",
        fixed={"use_mrope": False},
        absent=QWEN_DEFAULTS,
        qkv_bias=True,
        optional_window=True,
        layer_kinds=upper_layers,
        tiny={"tie_word_embeddings": True},
    )
)
