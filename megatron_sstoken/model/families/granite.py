"""Granite 3 and 4 (dense): Llama with multipliers of the embedding, of attention scores, of what layers add, and of logits."""

from typing import Any

from megatron_sstoken.model.families.registry import ATTENTION_BIAS, MLP_BIAS, Config, Family, register


def further(config: Config) -> dict[str, Any]:
    """The multipliers, but for that of attention scores, which megatron has a name for."""
    return {
        "embedding_multiplier": float(config["embedding_multiplier"]),
        "residual_multiplier": float(config["residual_multiplier"]),
        "logits_divisor": float(config["logits_scaling"]),
    }


def transformer_options(config: Config) -> dict[str, Any]:
    """Attention scores are multiplied by this, not by 1 / √head_dim."""
    return {"softmax_scale": float(config["attention_multiplier"])}


_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")

register(
    Family(
        "granite",
        fixed={"sliding_window": None},
        biases=ATTENTION_BIAS | MLP_BIAS,
        understood=frozenset(_MULTIPLIERS),
        absent=dict.fromkeys(_MULTIPLIERS, 1.0),
        further=further,
        transformer_options=transformer_options,
        one_kind_of_layer=True,
        tiny={
            "embedding_multiplier": 6.0,
            "attention_multiplier": 0.22,
            "residual_multiplier": 0.4,
            "logits_scaling": 3.0,
            "tie_word_embeddings": True,
        },
    )
)
