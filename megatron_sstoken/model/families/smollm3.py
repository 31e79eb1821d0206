"""SmolLM3: Llama with layers that do without RoPE, and a window (if any) in just those."""

from typing import Any

from megatron_sstoken.model.families.registry import ATTENTION_BIAS, MLP_BIAS, Config, Family, register


def rope_layers(config: Config) -> list[int]:
    """For every layer 1 if it has RoPE, else 0, as transformers writes it; without a list every n-th has none."""
    num_layers, listed = config["num_hidden_layers"], config.get("no_rope_layers")
    if listed is None:
        interval = config["no_rope_layer_interval"]
        if not isinstance(interval, int) or interval < 1:
            raise ValueError(f"no_rope_layer_interval={interval!r} is not supported: use a number from 1 on")
        return [int((layer + 1) % interval != 0) for layer in range(num_layers)]
    if len(listed) < num_layers or set(listed) - {0, 1}:
        raise ValueError(
            f"no_rope_layers={listed!r} is not supported: a 1 (RoPE) or 0 for each of num_hidden_layers={num_layers} is"
        )
    return [int(rope) for rope in listed[:num_layers]]


def layer_kinds(config: Config, num_layers: int) -> list[str]:
    """Without `layer_types` the window holds in the layers without RoPE (transformers' `configuration_smollm3.py`)."""
    kinds = config.get("layer_types")
    if kinds is None:
        return ["full_attention" if rope else "sliding_attention" for rope in rope_layers(config)]
    if "sliding_attention" in kinds and not (config.get("use_sliding_window") and config.get("sliding_window")):
        # transformers' attention kernels disagree here: some look at the list alone.
        raise ValueError(
            "layer_types names sliding_attention without a window: set use_sliding_window and sliding_window"
        )
    return kinds


def transformer_options(config: Config) -> dict[str, Any]:
    """megatron counts the other way round: 1 is a layer without RoPE."""
    return {"no_rope_freq": [1 - rope for rope in rope_layers(config)]}


register(
    Family(
        "smollm3",
        biases=ATTENTION_BIAS | MLP_BIAS,
        understood=frozenset({"no_rope_layers", "no_rope_layer_interval"}),
        absent={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        optional_window=True,
        layer_kinds=layer_kinds,
        transformer_options=transformer_options,
        tiny={
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 10,
            "pad_token_id": None,  # transformers' default lies outside a tiny vocabulary
        },
    )
)
