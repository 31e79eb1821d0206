"""Which linears of a layer's spec get adapters."""

from functools import partial
from typing import Any

from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_sstoken.compat import dense_mlp, expert_mlp, shared_expert_mlp
from megatron_sstoken.config import LoraSettings
from megatron_sstoken.model.delta_net import DeltaNetSubmodules
from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.latents import LatentSubmodules
from megatron_sstoken.model.lora import (
    AdaptedColumnParallelLinear,
    AdaptedColumns,
    AdaptedReplicatedLinear,
    AdaptedRowParallelLinear,
    AdaptedRows,
    Blocks,
)
from megatron_sstoken.model.lora_targets import OF_MLP

_QKV = {"q_proj", "k_proj", "v_proj"}
_FROM_LATENTS = {"q_proj": "linear_q_proj", "q_b_proj": "linear_q_up_proj", "kv_b_proj": "linear_kv_up_proj"}
_TO_LATENTS = {"q_a_proj": "linear_q_down_proj", "kv_a_proj_with_mqa": "linear_kv_down_proj"}
"""Target → the linear of latent attention that it is; that of queries without latents among the former."""


def adapt_layer(
    layer: TransformerLayerSubmodules, config: TransformerConfig, architecture: Architecture, lora: LoraSettings
) -> None:
    """Put adapted linears into a layer's spec wherever `lora.targets` names them: in attention or what stands in its place,
    and in all feed-forward parts, which in a mixture are the experts that are computed one after another, and the shared
    ones."""
    attention, targets = layer.self_attention.submodules, set(lora.targets)
    if isinstance(attention, DeltaNetSubmodules):
        _adapt_delta_net(attention, config, architecture, lora)
    elif isinstance(attention, LatentSubmodules):
        _adapt_latents(attention, config, lora)
    elif _QKV & targets:
        heads_per_group = config.num_attention_heads // config.num_query_groups
        heads_per_group *= 2 if config.attention_output_gate else 1  # gates come from the queries' linear
        fused = Blocks({"q_proj": heads_per_group, "k_proj": 1, "v_proj": 1}, config.num_query_groups)
        attention.linear_qkv = partial(_columns(attention.linear_qkv, config), lora=lora, blocks=fused)
    row = _rows(config)
    if "o_proj" in targets and not isinstance(attention, DeltaNetSubmodules):
        attention.linear_proj = ModuleSpec(row, params={"lora": lora, "target": "o_proj"})
    mlps = (dense_mlp(layer), expert_mlp(layer), shared_expert_mlp(layer)) if targets & {*OF_MLP} else ()
    for mlp in filter(None, mlps):
        if {"gate_proj", "up_proj"} & targets:
            params = {"lora": lora, "blocks": Blocks({"gate_proj": 1, "up_proj": 1})}
            mlp.linear_fc1 = ModuleSpec(_columns(mlp.linear_fc1, config), params=params)
        if "down_proj" in targets:
            mlp.linear_fc2 = ModuleSpec(row, params={"lora": lora, "target": "down_proj"})


def _adapt_latents(attention: LatentSubmodules, config: TransformerConfig, lora: LoraSettings) -> None:
    for target, name in _FROM_LATENTS.items():
        if target in lora.targets:
            column = _columns(getattr(attention, name), config)
            setattr(attention, name, partial(column, lora=lora, blocks=Blocks({target: 1})))
    for target, name in _TO_LATENTS.items():
        if target in lora.targets:
            setattr(attention, name, partial(AdaptedReplicatedLinear, lora=lora, target=target))


def _adapt_delta_net(
    net: DeltaNetSubmodules, config: TransformerConfig, architecture: Architecture, lora: LoraSettings
) -> None:
    assert architecture.delta_net is not None
    (rule,) = (rule for rule in architecture.weight_rules() if rule.megatron.endswith(".in_proj.weight"))
    names = [name.split(".")[-2] for name in rule.hugging_face]
    if {*names} & {*lora.targets}:
        shares = {name: sum(rows) for name, rows in zip(names, rule.blocks, strict=True)}
        fused = Blocks(shares, architecture.delta_net.key_heads)
        net.in_proj = partial(_columns(net.in_proj, config), lora=lora, blocks=fused)
    if "out_proj" in lora.targets:
        net.out_proj = ModuleSpec(_rows(config), params={"lora": lora, "target": "out_proj"})


def _columns(linear: Any, config: TransformerConfig) -> type[AdaptedColumns]:
    """What takes the place of a column-parallel linear."""
    if config.transformer_impl != "transformer_engine":
        return AdaptedColumnParallelLinear
    from megatron_sstoken.model.lora_transformer_engine import adapted_columns

    return adapted_columns(linear)


def _rows(config: TransformerConfig) -> type[AdaptedRows]:
    """What takes the place of a row-parallel linear."""
    if config.transformer_impl != "transformer_engine":
        return AdaptedRowParallelLinear
    from megatron_sstoken.model.lora_transformer_engine import AdaptedTELinear

    return AdaptedTELinear
