"""What adapters sit on: names of linears here, in Hugging Face models and in PEFT's folders."""

import math
import re
from collections.abc import Iterable, Iterator

import torch

_MARK = ".adapters."
_EXPERT = re.compile(r"experts\.(\d+)\.")

EMBEDDING = "embed_tokens"
"""The target that is no linear."""
EMBEDDING_MATRICES = {
    "embedding.adapters.lora_A.weight": "lora_embedding_A",
    "embedding.adapters.lora_B": "lora_embedding_B",
}
"""Parameter of its adapter → PEFT's matrix; the first lies transposed."""

OF_MLP = ("gate_proj", "up_proj", "down_proj")
"""Those of the feed-forward part; of a mixture, of its experts, the shared ones among them, and of its dense layers."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear of Hugging Face models that fuse some → the targets in it, in the order of its rows."""
STACKS = ("down_proj", "gate_up_proj")
"""Tensors of all experts that PEFT's `target_parameters` may name, in the order in which it wraps them, from outside."""
OTHER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Linear of Mixtral's experts → the target that it is."""

WHOLE = {"embed_tokens": "embedding.word_embeddings.weight", "lm_head": "output_layer.weight"}
"""Module of a Hugging Face model that may be trained whole beside the adapters → its parameter in megatron's. The head of a
tied model is a copy on the last pipeline stage, or nothing."""
WHOLE_TENSORS = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
"""The same in Hugging Face folders."""


def expert_of(name: str) -> int | None:
    """The number of the expert that a parameter, or a Hugging Face linear, of this name belongs to."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def stacked_alpha(alpha: float, number: int, *, rank_stabilized: bool) -> float:
    """The alpha that scales an adapter of `number` times the rank as `alpha` scales the others."""
    return alpha * (math.sqrt(number) if rank_stabilized else number)


def peft_whole_name(module: str) -> str:
    """PEFT's name of the weight of a module that is trained whole."""
    return f"base_model.model.{WHOLE_TENSORS[module]}"


def peft_name(layer: int, linear: str, matrix: str) -> str:
    """PEFT's name of lora_A, lora_B or DoRA's magnitude of the Hugging Face linear at this path in layer `layer` (from 0)."""
    last = "lora_magnitude_vector" if matrix == "magnitude" else f"{matrix}.weight"
    return f"{peft_layer(layer)}.{linear}.{last}"


def stack_prefixes(modules: Iterable[str]) -> dict[str, str]:
    """Tensor of all experts among `modules` → what PEFT, which wraps one in another, writes before `lora_A`."""
    return dict(zip([name for name in STACKS if name in modules], ("", "base_layer."), strict=False))


def peft_embedding_name(matrix: str) -> str:
    """PEFT's name of a tensor of the adapted embedding: lora_embedding_A or lora_embedding_B, or base_layer.weight."""
    return f"base_model.model.model.embed_tokens.{matrix}"


def peft_layer(layer: int) -> str:
    """PEFT's name of a layer (from 0)."""
    return f"base_model.model.model.layers.{layer}"


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return _MARK in name


def whole_parameters(train_whole: Iterable[str]) -> frozenset[str]:
    """The names of the parameters that are trained whole beside the adapters."""
    return frozenset(WHOLE[module] for module in train_whole)


def base_parameters(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """The named parameters of a model chunk that come from the Hugging Face model."""
    return ((name, parameter) for name, parameter in chunk.named_parameters() if not is_adapter(name))
