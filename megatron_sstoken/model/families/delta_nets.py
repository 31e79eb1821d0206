"""What the families of Qwen with gated delta nets share."""

from typing import Any

from megatron_sstoken.model.families.architecture import DeltaNet
from megatron_sstoken.model.families.registry import Config, whole

_SIZES = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "kernel": "linear_conv_kernel_dim",
}
"""Size of a delta net → its field of `config.json`."""
FIELDS = frozenset(
    {*_SIZES.values(), "full_attention_interval", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"}
)
"""Of `config.json`. Layers that predict further tokens are left out, as in transformers."""
FIXED = {
    "sliding_window": None,
    # transformers does not read these, and other programs do.
    "use_sliding_window": False,
    "attn_output_gate": True,
    "mamba_ssm_dtype": "float32",
}
ABSENT = {
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
TINY = {
    "head_dim": 16,
    # The norm of what a state answers makes much of what is small, its rounding included; of less than this, less.
    "rms_norm_eps": 1e-2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
    "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
}

TINY_MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}


def three_of_four(config: Config, num_layers: int) -> list[str]:
    """Layers as `layer_types` lists them; without it every fourth has attention (or as `full_attention_interval` says)."""
    if (listed := config.get("layer_types")) is not None:
        return listed
    every = 4 if config.get("full_attention_interval") is None else whole(config, "full_attention_interval")
    return ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(num_layers)]


def further(config: Config) -> dict[str, Any]:
    """Delta nets, gates of attention's output, and norms by 1 + weight.

    Raises ValueError for value heads that key heads cannot share evenly.
    """
    net = DeltaNet(**{size: whole(config, field) for size, field in _SIZES.items()})
    if net.value_heads % net.key_heads:
        raise ValueError(
            f"linear_num_key_heads={net.key_heads} does not divide linear_num_value_heads={net.value_heads}: each serves as "
            "many"
        )
    kinds = three_of_four(config, whole(config, "num_hidden_layers"))
    found = net if "linear_attention" in kinds else None
    return {"delta_net": found, "output_gate": True, "zero_centered_norms": True, "ignored_prefix": "mtp."}


def further_of_mixture(config: Config) -> dict[str, Any]:
    """The same, and in which layers experts are: in every `decoder_sparse_step`-th but those of `mlp_only_layers`.

    Raises ValueError for layers that are not there, and where no layer has experts.
    """
    layers = range(whole(config, "num_hidden_layers"))
    every, others = whole(config, "decoder_sparse_step"), config.get("mlp_only_layers") or []
    if not isinstance(others, list) or not all(isinstance(layer, int) for layer in others):
        raise ValueError(f"mlp_only_layers={others!r} is not possible: only a list of layers (from 0) is")
    dense = [layer for layer in layers if layer in others or (layer + 1) % every]
    if len(dense) == len(layers):
        raise ValueError(
            f"decoder_sparse_step={every} and mlp_only_layers={others!r} leave no layer experts: name a dense family"
        )
    leading = next(layer for layer in layers if layer not in dense)
    return {
        "num_dense_layers": leading,
        "also_dense": tuple(dense[leading:]),
        "dense_ffn_hidden_size": whole(config, "intermediate_size") if dense else 0,
        "shared_ffn_hidden_size": whole(config, "shared_expert_intermediate_size"),
        "shared_gate": True,
        **further(config),
    }
