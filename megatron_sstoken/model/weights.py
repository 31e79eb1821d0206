"""Hugging Face tensors ↔ the slices of megatron's parameters that one rank holds.

Every rank opens the files memory-mapped and reads its own slices only, whatever the size of the model.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch

from megatron_sstoken.model.dtypes import is_router_bias
from megatron_sstoken.model.families import Architecture, DeltaNet, Latents, Split, WeightRule
from megatron_sstoken.model.lora_targets import base_parameters
from megatron_sstoken.model.weight_files import HuggingFaceWeights

_OF_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.(linear_fc\d)\.(weight|bias)$")
_EMBEDDING_NAME, _HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"


class Tensors(Protocol):
    """What holds tensors by their Hugging Face names, as `HuggingFaceWeights` does."""

    path: str

    def slice(self, name: str) -> Any:
        """A tensor that is read where it is indexed, with `get_shape`."""


def hugging_face_weight(tensors: Tensors, rule: WeightRule, layer: int, architecture: Architecture):
    """Check the shapes of the tensors of one rule and return their slice objects, in the rule's order."""
    slices = []
    for pattern in rule.hugging_face:
        name = pattern.format(layer=layer)
        found = tensors.slice(name)
        expected = expected_shape(name, architecture)
        if list(found.get_shape()) != expected:
            raise ValueError(f"{tensors.path}: {name} has shape {found.get_shape()}, config.json says {expected}")
        slices.append(found)
    return slices


def check_weights(tensors: HuggingFaceWeights, architecture: Architecture) -> None:
    """Raise ValueError unless the tensors of the architecture are there, each once and with its shape, and no others.

    Reads headers only, and of a tied model that has a head all the same both tensors. A tensor too many (a bias, an adapter)
    would be a part of the model that is left out.
    """
    tensors.check_files()
    known = superfluous_tensors(tensors, architecture)
    for rule in architecture.weight_rules():
        for layer in rule.layers(architecture):
            hugging_face_weight(tensors, rule, layer, architecture)
            known.update(pattern.format(layer=layer) for pattern in rule.hugging_face)
    if unknown := [name for name in tensors.names() if name not in known]:
        raise ValueError(
            f"{tensors.path}: the tensor {unknown[0]} is not part of a {architecture.family} model as config.json describes "
            f"it ({len(unknown)} such): use the config.json that belongs to these weights"
        )


def superfluous_tensors(tensors: HuggingFaceWeights, architecture: Architecture) -> set[str]:
    """Tensors of a folder that say nothing new: rotary frequencies of old checkpoints, a tied head's copy, ignored layers.

    Raises ValueError where the copy of a tied head is not one.
    """
    found = {name for name in tensors.names() if name.endswith("rotary_emb.inv_freq")}
    for layer in range(architecture.num_layers, architecture.num_layers + architecture.ignored_layers):
        found |= {name for name in tensors.names() if name.startswith(f"model.layers.{layer}.")}
    if (prefix := architecture.ignored_prefix) is not None:
        found |= {name for name in tensors.names() if name.startswith(prefix)}
    if architecture.tied_embeddings and (head := _HEAD_NAME) in tensors:
        if not _same(tensors, head, _EMBEDDING_NAME):
            raise ValueError(
                f"{tensors.path}: {head} differs from {_EMBEDDING_NAME}, though config.json says tie_word_embeddings=true: "
                "write false there, for transformers then keeps both apart"
            )
        found.add(head)
    return found


def _same(tensors: HuggingFaceWeights, first: str, second: str) -> bool:
    """Whether two matrices agree in type, shape and all numbers; read by some rows at a time."""
    a, b = tensors.slice(first), tensors.slice(second)
    if (a.get_dtype(), list(a.get_shape())) != (b.get_dtype(), list(b.get_shape())):
        return False
    return all(torch.equal(a[row : row + 4096], b[row : row + 4096]) for row in range(0, a.get_shape()[0], 4096))


def expected_shape(name: str, architecture: Architecture) -> list[int]:
    """Shape that config.json gives the Hugging Face tensor `name`."""
    a = architecture
    if a.delta_net is not None and ".linear_attn." in name:
        return _delta_net_shapes(a, a.delta_net)[name.partition(".linear_attn.")[2]]
    width = a.ffn_hidden_size
    if ".shared_expert" in name:
        width = a.shared_ffn_hidden_size
    elif a.dense_layers and ".experts." not in name:
        width = a.dense_ffn_hidden_size
    queries, keys = a.query_rows, a.num_query_groups * a.head_dim
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "gate_proj": width}
    outputs |= {"up_proj": width, "embed_tokens": a.vocabulary_size, "lm_head": a.vocabulary_size}
    outputs |= {"qkv_proj": queries + 2 * keys, "gate_up_proj": 2 * width}
    outputs |= {"w1": a.ffn_hidden_size, "w3": a.ffn_hidden_size, "gate": a.num_experts, "router": a.num_experts}
    outputs |= {"shared_expert_gate": 1}
    module, kind = name.split(".")[-2:]
    if a.latents is not None and (shape := _latent_shapes(a, a.latents).get(module)):
        return shape
    if kind == "sinks":
        return [a.num_attention_heads]
    if module == "experts":  # of all of them
        matrices = {"gate_up_proj": [a.hidden_size], "down_proj": [a.ffn_hidden_size]}
        outputs_each = 2 * a.ffn_hidden_size if kind.startswith("gate_up") else a.hidden_size
        return [a.num_experts, *matrices.get(kind, []), outputs_each]
    if kind == "e_score_correction_bias":
        return [a.num_experts]
    if module in outputs:
        return [outputs[module]] + ([a.hidden_size] if kind == "weight" else [])
    if module in ("q_norm", "k_norm"):
        return [a.head_dim if not a.qk_norm_over_heads else queries if module == "q_norm" else keys]
    if kind == "bias":  # of what is not in `outputs`
        return [a.hidden_size]
    inputs = {"o_proj": a.num_attention_heads * a.value_dim, "down_proj": width, "w2": a.ffn_hidden_size}
    return [a.hidden_size, inputs[module]] if module in inputs else [a.hidden_size]


def _latent_shapes(a: Architecture, latents: Latents) -> dict[str, list[int]]:
    """Module that makes queries, keys and values of latents → shape of its weight."""
    shapes = {
        "kv_a_proj_with_mqa": [latents.down_dim, a.hidden_size],
        "kv_a_layernorm": [latents.key_value],
        "kv_b_proj": [a.num_attention_heads * latents.up_dim, latents.key_value],
    }
    if latents.query is not None:
        shapes["q_a_proj"] = [latents.query, a.hidden_size]
        shapes["q_a_layernorm"] = [latents.query]
        shapes["q_b_proj"] = [a.num_attention_heads * a.head_dim, latents.query]
    return shapes


def _delta_net_shapes(a: Architecture, net: DeltaNet) -> dict[str, list[int]]:
    """Tensor of what stands in place of attention → its shape."""
    fused = net.key_heads * sum(net.blocks[:4])
    outputs = {"qkvz": fused, "ba": 2 * net.value_heads, "qkv": net.convolved, "z": net.values}
    outputs |= {"b": net.value_heads, "a": net.value_heads}
    return {f"in_proj_{name}.weight": [number, a.hidden_size] for name, number in outputs.items()} | {
        "conv1d.weight": [net.convolved, 1, net.kernel],
        "dt_bias": [net.value_heads],
        "A_log": [net.value_heads],
        "norm.weight": [net.value_dim],
        "out_proj.weight": [a.hidden_size, net.values],
    }


def read_shard(
    tensors: Tensors,
    rule: WeightRule,
    layer: int,
    architecture: Architecture,
    shape: torch.Size,
    tensor_rank: int,
    tensor_size: int,
) -> torch.Tensor:
    """The slice of one megatron parameter that tensor rank `tensor_rank` of `tensor_size` holds, of `shape`."""
    sources = hugging_face_weight(tensors, rule, layer, architecture)
    if rule.part is not None:
        part = sources[0][rule.part].t()
        return torch.cat([part[0::2], part[1::2]]) if rule.split is Split.GATED else part
    if rule.split is Split.GATED and rule.fused:
        half = sources[0].get_shape()[0] // 2
        sources = [_Rows(sources[0], 0, half), _Rows(sources[0], half, 2 * half)]
    if rule.split is Split.WHOLE:
        return sources[0][:]
    if rule.split is Split.COLUMNS:
        width = shape[1]
        return sources[0][:, tensor_rank * width : (tensor_rank + 1) * width]
    rows = shape[0]
    first, last = tensor_rank * rows, (tensor_rank + 1) * rows
    if rule.split is Split.ROWS:
        return sources[0][first:last]
    if rule.split is Split.GATED:
        half = rows // 2
        return torch.cat([source[tensor_rank * half : (tensor_rank + 1) * half] for source in sources])
    if rule.split is Split.VOCABULARY:
        real = sources[0][min(first, architecture.vocabulary_size) : min(last, architecture.vocabulary_size)]
        if real.shape[0] == rows:  # no copy of what is often the largest matrix
            return real
        return torch.cat([real, real.new_zeros(rows - real.shape[0], *real.shape[1:])])
    return _read_interleaved(sources, *_interleaved(rule, architecture), first, last)


def interleaved(rule: WeightRule, tensors: list[torch.Tensor], architecture: Architecture) -> torch.Tensor:
    """The whole megatron parameter that a rule makes from these Hugging Face tensors, by groups where it asks for them."""
    if rule.split not in (Split.QKV, Split.KEY_HEADS):
        (only,) = tensors
        return only
    return _read_interleaved(tensors, *_interleaved(rule, architecture), 0, sum(map(len, tensors)))


@dataclass(frozen=True)
class _Rows:
    """Rows `first` to `last` of a tensor's slice object, read like one."""

    tensor: Any
    first: int
    last: int

    def __getitem__(self, rows: slice) -> torch.Tensor:
        start, stop, _ = rows.indices(self.last - self.first)
        return self.tensor[self.first + start : self.first + stop]


def _interleaved(rule: WeightRule, architecture: Architecture) -> tuple[int, tuple[tuple[int, ...], ...]]:
    """Number of groups that the megatron parameter consists of; for each Hugging Face tensor, the rows that a group has of each
    of the parts that lie in it one after another."""
    if rule.split is Split.KEY_HEADS:
        assert architecture.delta_net is not None
        return architecture.delta_net.key_heads, rule.blocks
    groups, head_dim = architecture.num_query_groups, architecture.head_dim
    blocks = (architecture.query_rows // groups, head_dim, head_dim)
    return groups, (blocks,) if rule.fused else tuple((block,) for block in blocks)


def _read_interleaved(sources, num_groups: int, blocks: tuple[tuple[int, ...], ...], first: int, last: int):
    """Rows [first, last) of the fused matrix, which holds for each group its rows of every part: of q, k and v, say.

    Where tensor parallel outnumbers the query groups the cut goes through a group: megatron gathers before use.
    """
    parts = [
        (_Rows(source, before * num_groups, (before + rows) * num_groups), rows)
        for source, own in zip(sources, blocks, strict=True)
        for before, rows in zip(accumulate(own, initial=0), own, strict=False)
    ]
    group_rows = sum(rows for _, rows in parts)
    groups = range(first // group_rows, -(-last // group_rows))
    fused = torch.cat([part[group * rows : (group + 1) * rows] for group in groups for part, rows in parts])
    return fused[first - groups.start * group_rows :][: last - first]


def to_hugging_face(
    rule: WeightRule, layer: int, parameter: torch.Tensor, architecture: Architecture
) -> Iterator[tuple[str, torch.Tensor]]:
    """The Hugging Face tensors of a whole (unsplit) megatron parameter, as (name, tensor); of a stack its `part`."""
    names = [pattern.format(layer=layer) for pattern in rule.hugging_face]
    if rule.part is not None:
        part = torch.stack(parameter.chunk(2), dim=1).flatten(0, 1) if rule.split is Split.GATED else parameter
        yield names[0], part.t().contiguous()
        return
    if rule.split in (Split.QKV, Split.KEY_HEADS):
        num_groups, blocks = _interleaved(rule, architecture)
        grouped = parameter.unflatten(0, (num_groups, -1)).split([sum(own) for own in blocks], dim=1)
        parts = [
            torch.cat([part.flatten(0, 1) for part in one.split(own, dim=1)])
            for one, own in zip(grouped, blocks, strict=True)
        ]
    elif rule.split is Split.GATED:
        parts = list(parameter.chunk(2))
        parts = [torch.cat(parts)] if rule.fused else parts
    elif rule.split is Split.VOCABULARY:
        parts = [parameter[: architecture.vocabulary_size]]
    else:
        parts = [parameter]
    for name, part in zip(names, parts, strict=True):
        yield name, part.contiguous()


def join_shards(rule: WeightRule, shards: list[torch.Tensor]) -> torch.Tensor:
    """The whole (unsplit) megatron parameter from the slices of all tensor ranks, in their order."""
    if rule.split is Split.WHOLE:
        return shards[0]
    if rule.split is Split.GATED:
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(shards, dim=1 if rule.split is Split.COLUMNS else 0)


def held_weights(chunk: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a model chunk that come from the Hugging Face model: the base's parameters, and biases of routers,
    which are buffers in megatron."""
    yield from base_parameters(chunk)
    yield from ((name, buffer) for name, buffer in chunk.named_buffers() if is_router_bias(name))


def rules_of_chunk(model: Any, architecture: Architecture) -> dict[str, tuple[WeightRule, int]]:
    """For a model chunk (an unwrapped GPTModel): its parameter names → (rule, number of the layer from 0)."""
    layers = model.decoder.layers
    first_layer = layers[0].layer_number - 1 if len(layers) else 0
    numbers = [layer.mlp.local_expert_indices for layer in layers if hasattr(layer.mlp, "local_expert_indices")]
    first_expert = numbers[0][0] if numbers else 0
    held = {name for name, _ in held_weights(model)} | {name for name, _ in model.named_parameters()}
    table: dict[str, tuple[WeightRule, int]] = {}
    for rule in architecture.weight_rules():
        name = rule.megatron
        if rule.expert is not None:  # experts are numbered within their rank
            name = name.replace(f".local_experts.{rule.expert}.", f".local_experts.{rule.expert - first_expert}.")
        if "{layer}" in name:
            for layer in rule.layers(architecture):
                if first_layer <= layer < first_layer + len(layers):
                    table[name.format(layer=layer - first_layer)] = (rule, layer)
        else:
            table[name] = (rule, 0)
    if architecture.tied_embeddings:  # the last of several pipeline stages holds a copy of the embedding as its head
        table["output_layer.weight"] = table["embedding.word_embeddings.weight"]
    named = {_name_in_chunk(name, held): entry for name, entry in table.items()}
    return {name: entry for name, entry in named.items() if name in held}


def _name_in_chunk(name: str, held: set[str]) -> str:
    """`name` as the chunk has it. Transformer Engine keeps a norm inside the linear layer that follows it, and the weights of
    all experts in one layer, by number."""
    for norm, linear in (("input_layernorm.", "self_attention.linear_qkv."), ("pre_mlp_layernorm.", "mlp.linear_fc1.")):
        fused = name.replace(norm, f"{linear}layer_norm_")
        if fused in held:
            return fused
    grouped = _OF_EXPERT.sub(r".experts.\2.\3\1", name)
    return grouped if grouped in held else name


@torch.no_grad()
def load_hugging_face(
    model: torch.nn.Module, tensors: HuggingFaceWeights, architecture: Architecture, tensor_rank: int, tensor_size: int
) -> None:
    """Fill every parameter of a model chunk (an unwrapped GPTModel) from a Hugging Face folder, converting to its dtype.

    Adapters stay as they are. Raises ValueError where a tensor is missing or has another shape than config.json says.
    """
    table = rules_of_chunk(model, architecture)
    for name, parameter in held_weights(model):
        rule, layer = table[name]
        place = (tensor_rank, tensor_size) if rule.expert is None else (0, 1)
        shard = read_shard(tensors, rule, layer, architecture, parameter.shape, *place)
        assert shard.shape == parameter.shape, f"{name}: {tuple(shard.shape)} read, {tuple(parameter.shape)} held"
        parameter.copy_(shard)
