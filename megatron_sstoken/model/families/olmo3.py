"""OLMo 3: OLMo 2 with a window in three of four layers, where RoPE is not scaled."""

from typing import Any

from megatron_sstoken.model.families.olmo2 import OLMO_NORMS
from megatron_sstoken.model.families.registry import ATTENTION_BIAS, Config, Family, register, windows_but_every
from megatron_sstoken.model.families.rope import rope_by_kind, with_full_rope

_BASES = (5e5, 5e5)
"""Of RoPE in layers without and with a window, where the config does not say."""


def further(config: Config) -> dict[str, Any]:
    """What the docstring of this module says."""
    window_base = float(rope_by_kind(config, *_BASES)[1]["rope_theta"])
    return {"qk_norm_over_heads": True, "window_rope_base": window_base}


register(
    Family(
        "olmo3",
        biases=ATTENTION_BIAS,
        absent={"rms_norm_eps": 1e-5, "sliding_window": 4096},
        qk_norm=True,
        norms=OLMO_NORMS,
        layer_kinds=windows_but_every(4),
        full_rope=lambda config: with_full_rope(config, rope_by_kind(config, *_BASES)[0]),
        further=further,
        tiny={
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 5e5,
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    )
)
