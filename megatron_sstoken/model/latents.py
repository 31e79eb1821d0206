"""Multi-head latent attention: queries, keys and values of all heads are made of a few numbers of each token.

megatron's own (`MLASelfAttention`) turns packed samples one after another, takes the model's epsilon for the norms of latents,
and in its spec for torch loses, of the keys' part that all heads share, gradients that other tensor ranks compute. Here its
usual attention does the rest: it turns the first numbers of each head and passes the others. Products of queries and keys do
not depend on the order of their numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule

from megatron_sstoken.model.families import Architecture
from megatron_sstoken.model.linears import LinearMaker, column_parallel, row_parallel
from megatron_sstoken.model.norm import RMSNorm
from megatron_sstoken.model.rotary import halves_of_pairs

_EPSILON = 1e-6
"""Of the norms of latents: transformers gives them its default, whatever `rms_norm_eps` says."""


class ReplicatedLinear(MegatronModule):
    """A linear without bias that is the same on all tensor parallel ranks: [tokens of this rank, batch, in] → [..., out]."""

    bias: torch.Tensor | None = None
    weight: torch.Tensor

    def __init__(self, num_inputs: int, num_outputs: int, *, config: TransformerConfig, tp_group: dist.ProcessGroup):
        super().__init__(config)
        self.input_size, self.tp_group, self.sequence_parallel = num_inputs, tp_group, config.sequence_parallel
        self.weight = torch.nn.Parameter(torch.empty(num_outputs, num_inputs, dtype=config.params_dtype))
        # Each rank sees its share of the tokens: megatron sums such gradients over the tensor ranks.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (an attribute of megatron's)

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, None]:
        """As megatron's linears: the output, and no bias."""
        return F.linear(input_, self.weight), None


@dataclass
class LatentSubmodules:
    """What the attention of a layer's spec is made of."""

    linear_q_proj: LinearMaker
    linear_q_up_proj: LinearMaker
    linear_kv_up_proj: LinearMaker
    """Column-parallel, of the layer's input, and of latents: → heads."""
    core_attention: Callable[..., torch.nn.Module]
    linear_proj: type | ModuleSpec
    linear_q_down_proj: LinearMaker = ReplicatedLinear
    linear_kv_down_proj: LinearMaker = ReplicatedLinear


class LatentSelfAttention(Attention):
    """The attention of a layer, its parameters named as in megatron's `MLASelfAttention`.

    Down projections and norms are whole on every tensor parallel rank, up projections and the output's projection are split by
    heads. Queries and keys begin with the numbers that RoPE turns.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: LatentSubmodules,
        layer_number: int,
        architecture: Architecture,
        **options: Any,
    ):
        super().__init__(
            config=config,
            # The output's projection is made below: this would make it for values as wide as queries.
            submodules=replace(submodules, linear_proj=IdentityOp),
            layer_number=layer_number,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
            **options,
        )
        a, latents = architecture, architecture.latents
        assert latents is not None
        self.latents, self.pairs = latents, a.rotary_pairs
        group, queries = self.pg_collection.tp, a.num_attention_heads * a.head_dim
        up = partial(column_parallel, config, group)
        self.k_layernorm = None  # megatron's attention asks for it
        self.q_layernorm: RMSNorm | None = None
        if latents.query is None:
            self.linear_q_proj = up(submodules.linear_q_proj, a.hidden_size, queries, name="q_proj")
        else:
            self.linear_q_down_proj = submodules.linear_q_down_proj(
                a.hidden_size, latents.query, config=config, tp_group=group
            )
            self.q_layernorm = RMSNorm(config, latents.query, eps=_EPSILON)
            self.linear_q_up_proj = up(submodules.linear_q_up_proj, latents.query, queries, name="q_up_proj")
        self.linear_kv_down_proj = submodules.linear_kv_down_proj(
            a.hidden_size, latents.down_dim, config=config, tp_group=group
        )
        self.kv_layernorm = RMSNorm(config, latents.key_value, eps=_EPSILON)
        heads = a.num_attention_heads * latents.up_dim
        self.linear_kv_up_proj = up(submodules.linear_kv_up_proj, latents.key_value, heads, name="kv_up_proj")
        values = a.num_attention_heads * latents.value_dim
        self.linear_proj = row_parallel(config, group, submodules.linear_proj, values, a.hidden_size)

    def get_query_key_value_tensors(self, hidden_states, *args, **options):
        """Hidden states [tokens of this rank, 1, hidden] → queries, keys, values [tokens, 1, heads of this rank, numbers]."""
        latents = self.latents
        query = self._heads(self._queries(hidden_states))
        query_plain, query_turned = query.split([latents.plain_dim, latents.rotary_dim], dim=-1)
        down, _ = self.linear_kv_down_proj(hidden_states)
        compressed, key_turned = down.split([latents.key_value, latents.rotary_dim], dim=-1)
        up, _ = self.linear_kv_up_proj(self.kv_layernorm(compressed))
        key_plain, value = self._heads(up).split([latents.plain_dim, latents.value_dim], dim=-1)
        key_turned = self._for_all_heads(key_turned).unsqueeze(-2)
        if self.pairs:
            query_turned, key_turned = halves_of_pairs(query_turned), halves_of_pairs(key_turned)
        key_turned = key_turned.expand(*key_plain.shape[:-1], -1)
        query, key = torch.cat([query_turned, query_plain], dim=-1), torch.cat([key_turned, key_plain], dim=-1)
        return query, key, value.contiguous()

    def _queries(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """All heads' one after another, [tokens, 1, heads of this rank · head_dim]."""
        if self.q_layernorm is None:
            return self.linear_q_proj(hidden_states)[0]
        return self.linear_q_up_proj(self.q_layernorm(self.linear_q_down_proj(hidden_states)[0]))[0]

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (self.num_attention_heads_per_partition, -1))

    def _for_all_heads(self, shared: torch.Tensor) -> torch.Tensor:
        """What all heads share of their keys, for all tokens; its gradient is summed over the tensor ranks' heads."""
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(shared, group=self.pg_collection.tp)
        return copy_to_tensor_model_parallel_region(shared, group=self.pg_collection.tp)
