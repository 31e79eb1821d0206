"""The real architectures of published models, written down once: for plans and dry runs without downloads.

The numbers are those of the models' own config.json. A folder made from them has no weights and no tokenizer.
"""

import json
import os
import tempfile
from typing import Any

from megatron_sstoken.model.families import Architecture, read_architecture


def _llama(hidden: int, ffn: int, layers: int, heads: int, **other: Any) -> dict[str, Any]:
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": other.pop("head_dim", hidden // heads),
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": other.pop("rope_factor", 8.0)} | scaling,
        "tie_word_embeddings": other.pop("tied", False),
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


def _qwen(hidden: int, ffn: int, layers: int, heads: int, groups: int, **other: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": 152064,
        "max_position_embeddings": 131072,
        "rms_norm_eps": other.pop("epsilon", 1e-6),
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, tied=True, rope_factor=32.0),
    "llama-3.2-3b": _llama(3072, 8192, 28, 24, tied=True, rope_factor=32.0),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "qwen2.5-7b": _qwen(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": _qwen(5120, 13824, 48, 40, 8, epsilon=1e-5),
}
"""Name → the fields of its config.json."""


def write_config(name: str, folder: str | os.PathLike) -> str:
    """Write `folder`/config.json of the model `name`; returns its path.

    Raises ValueError for an unknown name, and for a folder that has another config.json.
    """
    if name not in PUBLISHED:
        raise ValueError(f"the model {name!r} is not built in: use one of {', '.join(PUBLISHED)}")
    path = os.path.join(folder, "config.json")
    text = json.dumps(PUBLISHED[name], indent=2) + "\n"
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            if file.read() != text:
                raise ValueError(f"{path} exists and is another model's: name another folder")
    os.makedirs(folder, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def find_architecture(model: str) -> Architecture:
    """The architecture of a Hugging Face folder, or of a model of `PUBLISHED` by name."""
    if model not in PUBLISHED:
        if not os.path.isdir(model):
            raise ValueError(
                f"the model {model!r} is neither a folder nor built in: name a Hugging Face folder or one of "
                f"{', '.join(PUBLISHED)}"
            )
        return read_architecture(model)
    with tempfile.TemporaryDirectory() as folder:
        write_config(model, folder)
        return read_architecture(folder)
