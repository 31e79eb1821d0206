"""Ministral 3: Mistral with YaRN, whose queries grow beyond the original length; sequences may not be longer here."""

from typing import Any

from megatron_sstoken.model.families.registry import Config, Family, register

_DEFAULT_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
"""Where the config does not say (transformers' `configuration_ministral3.py`)."""


def rope_of(config: Config) -> dict[str, Any]:
    """What the config says of RoPE. Raises ValueError for anything but YaRN with growing queries."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or _DEFAULT_ROPE)
    if (kind := given.get("rope_type", given.get("type"))) != "yarn":
        raise ValueError(f"rope type {kind!r} is not supported: only 'yarn' is")
    if given.get("llama_4_scaling_beta") is None:  # with which transformers cannot compute
        raise ValueError("llama_4_scaling_beta=None is not supported: a number among the rope parameters is")
    return given


def full_rope(config: Config) -> Config:
    """Without what is no parameter of YaRN."""
    given = rope_of(config)
    kept = {name: given[name] for name in given.keys() - {"llama_4_scaling_beta", "max_position_embeddings"}}
    return {name: value for name, value in config.items() if name != "rope_scaling"} | {"rope_parameters": kept}


register(
    Family(
        "ministral3",
        one_kind_of_layer=True,
        absent={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 262144, "rms_norm_eps": 1e-5},
        full_rope=full_rope,
        further=lambda config: {"queries_grow": rope_of(config)["llama_4_scaling_beta"] != 0},
        tiny={
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 256,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
            "pad_token_id": None,
        },
    )
)
