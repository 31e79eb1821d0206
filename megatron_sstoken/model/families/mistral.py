"""Mistral: a sliding window in all layers, unless the config says there is none."""

from megatron_sstoken.model.families.registry import Family, register

MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
"""What absent fields mean in Mistral and Mixtral."""

register(
    Family(
        "mistral",
        absent=MISTRAL_DEFAULTS | {"sliding_window": 4096},
        one_kind_of_layer=True,
        tiny={"sliding_window": 12},
    )
)
