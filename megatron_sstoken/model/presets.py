"""The published architectures that launchers, the planner and the benchmarks speak of: name → Hugging Face config.json.

From the models' own config.json on huggingface.co (base models), without what does not concern the architecture.
"""

import copy
import os
from typing import Any

from megatron_sstoken.model.families import Architecture, parse_architecture, read_architecture

_LLAMA3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
_QWEN25: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "torch_dtype": "bfloat16",
}


def _sizes(hidden: int, feed_forward: int, layers: int, heads: int, groups: int, head_dim: int = 128) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": feed_forward,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": head_dim,
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return {"rope_scaling": scaling | {"original_max_position_embeddings": 8192}}


_CONFIGS: dict[str, dict[str, Any]] = {
    "Llama-3.2-1B": _LLAMA3 | _sizes(2048, 8192, 16, 32, 8, 64) | _llama3_rope(32.0) | {"tie_word_embeddings": True},
    "Llama-3.2-3B": _LLAMA3 | _sizes(3072, 8192, 28, 24, 8) | _llama3_rope(32.0) | {"tie_word_embeddings": True},
    "Llama-3.1-8B": _LLAMA3 | _sizes(4096, 14336, 32, 32, 8) | _llama3_rope(8.0),
    "Llama-3.1-70B": _LLAMA3 | _sizes(8192, 28672, 80, 64, 8) | _llama3_rope(8.0),
    "Qwen2.5-7B": _QWEN25 | _sizes(3584, 18944, 28, 28, 4),
    "Qwen2.5-14B": _QWEN25 | _sizes(5120, 13824, 48, 40, 8) | {"rms_norm_eps": 1e-5},
}
MODELS = tuple(_CONFIGS)
"""Names of the presets."""


def model_config(name: str) -> dict[str, Any]:
    """The config.json of a model as a dictionary of the caller's own. Raises ValueError for an unknown name."""
    if name not in _CONFIGS:
        raise ValueError(f"{name} is not in the presets: use one of {', '.join(MODELS)}")
    return copy.deepcopy(_CONFIGS[name])


def find_architecture(model: str) -> Architecture:
    """The architecture of a Hugging Face folder, or of a model of the presets by name.

    Raises ValueError where it is neither.
    """
    if model in MODELS:
        return parse_architecture(model_config(model), model)
    if not os.path.isdir(model):
        raise ValueError(f"the model {model!r} is neither a folder nor in the presets: use one of {', '.join(MODELS)}")
    return read_architecture(model)
