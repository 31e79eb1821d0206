"""Gated delta nets, which in some layers stand in place of attention (Qwen3-Next, Qwen3.5).

megatron's own (`GatedDeltaNet`) takes no packed samples, no context parallel, and needs flash-linear-attention. Here one linear
makes, for one key head after another, query, key, values, the values' gates, and what decides of its value heads how strongly
they write and how fast they fade (`DeltaNet.blocks`). So tensor parallel deals out key heads with their value heads, as rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.utils.checkpoint import checkpoint

from megatron_sstoken.model.attention import SampleBounds, whole_samples
from megatron_sstoken.model.delta_rule import gated_delta_rule, short_convolution
from megatron_sstoken.model.families import DeltaNet
from megatron_sstoken.model.linears import LinearMaker, column_parallel, row_parallel


@dataclass
class DeltaNetSubmodules:
    """The linears of a layer's spec."""

    in_proj: LinearMaker
    out_proj: type | ModuleSpec


class GatedNorm(torch.nn.Module):
    """Root mean square norm over each head, multiplied by SiLU of a gate: both [tokens, heads of this rank, numbers].

    The weight is the same on all tensor parallel ranks, each of which has other heads: its gradient is summed over them.
    """

    def __init__(self, num_values: int, eps: float, dtype: torch.dtype, group: dist.ProcessGroup):
        super().__init__()
        self.eps, self.group = eps, group
        self.weight = torch.nn.Parameter(torch.ones(num_values, dtype=dtype))

    def forward(self, hidden: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed = copy_to_tensor_model_parallel_region(self.weight, group=self.group) * wide.to(hidden.dtype)
        return (normed * F.silu(gate.float())).to(hidden.dtype)


class GatedDeltaNet(MegatronModule):
    """What a layer's spec has in place of self-attention.

    `conv_weight` [rows of queries, keys and values, 1, kernel], `dt_bias` and `A_log` [value heads] are split by heads; the
    type of all weights is that of the model, as in transformers, and decay and state are computed in fp32.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: DeltaNetSubmodules,
        layer_number: int,
        net: DeltaNet,
        pg_collection: Any,
        **_of_attention: Any,
    ):
        super().__init__(config=config)
        self.net, self.layer_number = net, layer_number
        self.tp_group, self.context_group = pg_collection.tp, pg_collection.cp
        ranks, dtype = self.tp_group.size(), config.params_dtype
        rows = net.key_heads * sum(net.blocks)
        self.in_proj = column_parallel(config, self.tp_group, submodules.in_proj, config.hidden_size, rows, name="qkv")
        self.conv_weight = torch.nn.Parameter(torch.empty(net.convolved // ranks, 1, net.kernel, dtype=dtype))
        self.dt_bias = torch.nn.Parameter(torch.empty(net.value_heads // ranks, dtype=dtype))
        self.A_log = torch.nn.Parameter(torch.empty(net.value_heads // ranks, dtype=dtype))
        self.out_norm = GatedNorm(net.value_dim, config.layernorm_epsilon, dtype, self.tp_group)
        self.out_proj = row_parallel(config, self.tp_group, submodules.out_proj, net.values, config.hidden_size)
        self.recomputes = config.recompute_granularity == "selective"

    def forward(self, hidden_states, attention_mask, *, packed_seq_params, **_unused):
        """Hidden states [tokens of this rank, 1, hidden] → the same, and no bias."""
        bounds = packed_seq_params
        assert isinstance(bounds, SampleBounds), "every micro-batch carries the bounds of its samples"
        projected, _ = self.in_proj(hidden_states)
        net = self.net
        by_head = projected.squeeze(1).unflatten(-1, (-1, sum(net.blocks)))  # [tokens, key heads of this rank, …]
        convolved, gate, rates = by_head.split([sum(net.blocks[:3]), net.blocks[3], sum(net.blocks[4:])], dim=-1)
        if bounds.gathered_order is not None:
            convolved, rates = (whole_samples(one, bounds, self.context_group) for one in (convolved, rates))
        if self.recomputes and self.training:
            mixed = checkpoint(self._mixed, convolved, rates, bounds.lengths, use_reentrant=False)
        else:
            mixed = self._mixed(convolved, rates, bounds.lengths)
        if bounds.index is not None:
            mixed = mixed.index_select(0, bounds.index)
        output = self.out_norm(mixed, gate.reshape(mixed.shape))
        return self.out_proj(output.flatten(1).unsqueeze(1))

    def _mixed(self, convolved: torch.Tensor, rates: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """What the states answer to all tokens of the samples, [tokens, value heads of this rank, value dim]."""
        net = self.net
        mixed = short_convolution(convolved.flatten(1), self.conv_weight, lengths).view(convolved.shape)
        query, key, value = mixed.split(net.blocks[:3], dim=-1)
        value = value.unflatten(-1, (-1, net.value_dim)).flatten(1, 2)
        strength, change = (one.flatten(1) for one in rates.chunk(2, dim=-1))
        decay = -self.A_log.float().exp() * F.softplus(change.float() + self.dt_bias)
        return gated_delta_rule(query, key, value, decay, strength.sigmoid(), lengths)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """megatron's entries of the linears and the norm, and one for each parameter that is split by heads."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = {name: one for name, one in self.named_parameters(recurse=False)}
        groups = {"tp_group": self.tp_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        return state | make_sharded_tensors_for_checkpoint(
            own, prefix, dict.fromkeys(own, 0), sharded_offsets, **groups
        )
