"""What adapters sit on: names of linears here, in Hugging Face models and in PEFT's folders, and their sizes."""

import math
import re
from collections.abc import Iterable, Iterator

import torch

from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.families.weight_map import HF, LAYER

_MARK = ".adapters."
_EXPERT = re.compile(r"experts\.(\d+)\.")

TARGETS = {
    "q_proj": "self_attention.linear_qkv",
    "k_proj": "self_attention.linear_qkv",
    "v_proj": "self_attention.linear_qkv",
    "o_proj": "self_attention.linear_proj",
    "gate_proj": "mlp.linear_fc1",
    "up_proj": "mlp.linear_fc1",
    "down_proj": "mlp.linear_fc2",
}
"""Linear that PEFT knows by this name → the (fused) one in a megatron layer, or in each of its experts."""

EMBEDDING = "embed_tokens"
"""The target that is no linear."""
EMBEDDING_MATRICES = {
    "embedding.adapters.lora_A.weight": "lora_embedding_A",
    "embedding.adapters.lora_B": "lora_embedding_B",
}
"""Parameter of its adapter → PEFT's matrix; the first lies transposed."""

OF_MLP = tuple(name for name, linear in TARGETS.items() if linear.startswith("mlp."))
"""The targets of the feed-forward part; of a mixture, of its experts."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linear of Hugging Face models that fuse some → the targets in it, in the order of its rows."""
OTHER_NAMES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
"""Linear of Mixtral's experts → the target that it is."""

WHOLE = {"embed_tokens": "embedding.word_embeddings.weight", "lm_head": "output_layer.weight"}
"""Module of a Hugging Face model that may be trained whole beside the adapters → its parameter in megatron's. The head of a
tied model is a copy on the last pipeline stage, or nothing."""
WHOLE_TENSORS = {"embed_tokens": "model.embed_tokens.weight", "lm_head": "lm_head.weight"}
"""The same in Hugging Face folders."""


def other_sides(a: Architecture) -> dict[str, int]:
    """Target → the side of its weight that is not the hidden size."""
    keys = a.num_query_groups * a.head_dim
    widths = {"q_proj": a.query_rows, "k_proj": keys, "v_proj": keys, "o_proj": a.num_attention_heads * a.value_dim}
    return {name: widths.get(name, a.ffn_hidden_size) for name in TARGETS} | {EMBEDDING: a.vocabulary_size}


def hugging_face_linears(a: Architecture, targets: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Linears of a Hugging Face layer of `a` that have adapters, by their paths → which of `targets` lie in each."""
    rules = {rule.megatron: rule for rule in a.weight_rules()}
    found: dict[str, tuple[str, ...]] = {}
    for target in targets:
        if target == EMBEDDING:
            continue
        linear = TARGETS[target]
        part = [name for name, other in TARGETS.items() if other == linear].index(target)
        places = [linear]
        if a.num_experts and target in OF_MLP:
            places = [linear.replace("mlp.", f"mlp.experts.local_experts.{expert}.") for expert in range(a.num_experts)]
        for place in places:
            rule = rules[f"{LAYER}{place}.weight"]
            path = rule.hugging_face[0 if rule.fused else part].removeprefix(HF).removesuffix(".weight")
            found[path] = (*found.get(path, ()), target)
    return found


def layers_of(a: Architecture, target: str) -> tuple[int, ...]:
    """The layers (from 0) of `a` that have the linear `target`."""
    return tuple(range(a.num_layers)) if target in OF_MLP else a.attention_layers


def expert_of(name: str) -> int | None:
    """The number of the expert that a parameter, or a Hugging Face linear, of this name belongs to."""
    match = _EXPERT.search(name)
    return int(match[1]) if match else None


def stacked_alpha(alpha: float, number: int, *, rank_stabilized: bool) -> float:
    """The alpha that scales an adapter of `number` times the rank as `alpha` scales the others."""
    return alpha * (math.sqrt(number) if rank_stabilized else number)


def num_adapter_parameters(a: Architecture, lora: LoraSettings) -> int:
    """Parameters of all adapters of a model, without those of the padded vocabulary."""
    sides, experts = other_sides(a), max(a.num_experts, 1)
    outputs = sides | {"o_proj": a.hidden_size, "down_proj": a.hidden_size}
    total = 0
    for name in lora.targets:
        number = lora.rank * (a.hidden_size + sides[name]) + (outputs[name] if lora.dora else 0)
        places = 1 if name == EMBEDDING else len(layers_of(a, name)) * (experts if name in OF_MLP else 1)
        total += number * places
    return total


def num_whole_tables(a: Architecture, lora: LoraSettings) -> int:
    """Matrices of vocabulary × hidden size that are trained whole beside the adapters."""
    return min(len(lora.train_whole), 1 if a.tied_embeddings else 2)


def describe_trained(a: Architecture, lora: LoraSettings) -> str:
    """What a run trains, for people."""
    if lora.rank == 0:
        return "all weights"
    kind = "DoRA adapters" if lora.dora else "adapters"
    stabilized = " (rank-stabilized)" if lora.rank_stabilized else ""
    adapters = (
        f"{num_adapter_parameters(a, lora):,} parameters in {kind} of rank {lora.rank}, alpha {lora.alpha:g}{stabilized}, "
        f"dropout {lora.dropout:g}, on {', '.join(lora.targets)}"
    )
    if not lora.train_whole:
        return adapters
    whole = num_whole_tables(a, lora) * a.vocabulary_size * a.hidden_size
    return f"{adapters}, and {whole:,} of {' and '.join(lora.train_whole)}"


def peft_whole_name(module: str) -> str:
    """PEFT's name of the weight of a module that is trained whole."""
    return f"base_model.model.{WHOLE_TENSORS[module]}"


def peft_name(layer: int, linear: str, matrix: str) -> str:
    """PEFT's name of lora_A, lora_B or DoRA's magnitude of the Hugging Face linear at this path in layer `layer` (from 0)."""
    last = "lora_magnitude_vector" if matrix == "magnitude" else f"{matrix}.weight"
    return f"{peft_layer(layer)}.{linear}.{last}"


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
