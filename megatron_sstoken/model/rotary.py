"""Rotary embedding of packed samples without fused kernels: each token is turned by its position, all at once."""

import copy
import math
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sstoken.model.attention import SampleBounds

_FACTOR_FIELDS = frozenset({"yarn_rotary_scaling_factor", "yarn_mscale", "yarn_mscale_all_dim"})


class PackedRotary(torch.nn.Module):
    """megatron's table of angles, read at the positions of a micro-batch's tokens.

    megatron's own way without fused kernels takes sample after sample, asking the device for their lengths in every layer. Here
    its attention is given angles [tokens, 1, dim], and bounds without cumulative lengths, with which it turns all tokens alike.
    """

    def __init__(self, table: torch.nn.Module):
        super().__init__()
        self.table = table
        self.positions: torch.Tensor | None = None

    def take_positions(self, position_ids: torch.Tensor, bounds: SampleBounds) -> SampleBounds:
        """Note the positions int64 [1, tokens] of this rank for the next forward pass; returns the bounds for its layers."""
        self.positions = position_ids[0]
        complete, bounds = bounds, copy.copy(bounds)
        bounds.complete = complete
        bounds.cu_seqlens_q = bounds.cu_seqlens_kv = None
        return bounds

    def get_rotary_seq_len(self, *args, **kwargs) -> int:
        """megatron's: how long the table must be."""
        return self.table.get_rotary_seq_len(*args, **kwargs)  # type: ignore[operator]

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """The angles of every token, fp32 [tokens, 1, dim]."""
        assert self.positions is not None
        return self.table(*args, **kwargs)[:, 0].index_select(0, self.positions)


def multiply_rotated(config: TransformerConfig, factor: float) -> None:
    """Let megatron's attention multiply what it has turned of queries and keys by `factor`, as YaRN and LongRoPE want it.

    megatron computes the factor as 0.1 · mscale · ln(scaling) + 1 from three fields, which its TransformerConfig gets from
    outside; without them it is 1.
    """
    if factor == 1.0:
        return
    values = {"yarn_rotary_scaling_factor": math.e, "yarn_mscale": 10 * (factor - 1), "yarn_mscale_all_dim": 0.0}
    for name, value in values.items():
        setattr(config, name, value)


class TwoRotariesSelfAttention(SelfAttention):
    """Attention in a model whose layers with a window turn queries and keys otherwise than its other layers.

    The table of angles has both, made of the frequencies of one and then of the other (`table_frequencies`).
    """

    def __init__(self, config: TransformerConfig, submodules, layer_number: int, *args, **kwargs):
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        if windowed:  # the factor belongs to the scaling; megatron 0.19 reads it here, 0.16 in every pass
            config = copy.copy(config)
            for name in _FACTOR_FIELDS & vars(config).keys():
                delattr(config, name)
        super().__init__(config, submodules, layer_number, *args, **kwargs)
        self.windowed = windowed

    def forward(self, hidden_states, attention_mask, *args, rotary_pos_emb, **kwargs):
        """Angles [..., 2 · (half of the one, half of the other)], as megatron repeats frequencies for both halves of a head."""
        own = rotary_pos_emb.unflatten(-1, (2, 2, -1))[..., int(self.windowed), :].flatten(-2)
        return super().forward(hidden_states, attention_mask, *args, rotary_pos_emb=own, **kwargs)


def give_lengths(attention: torch.nn.Module, inputs: tuple, options: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """A pre-hook of Transformer Engine's attention, which wants the cumulative lengths that `PackedRotary` hides."""
    bounds = options["packed_seq_params"]
    return inputs, options | {"packed_seq_params": bounds.complete or bounds}


def halves_of_pairs(turned: torch.Tensor) -> torch.Tensor:
    """Numbers [..., n], neighbours being pairs → the first of each pair, then the second, as the usual way turns them."""
    return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def turning_pairs(rotary_dim: int) -> type[SelfAttention]:
    """Attention that turns neighbouring numbers of each head as pairs, in its first `rotary_dim` numbers.

    megatron's own option for it (`rotary_interleaved`) does not take packed samples. Here queries and keys are put into the
    order that the usual way wants; their products do not depend on the order.
    """

    class PairsSelfAttention(SelfAttention):
        def get_query_key_value_tensors(self, *args, **kwargs):
            query, key, *others = super().get_query_key_value_tensors(*args, **kwargs)
            return _halves(query), _halves(key), *others

    def _halves(heads: torch.Tensor) -> torch.Tensor:
        return torch.cat([halves_of_pairs(heads[..., :rotary_dim]), heads[..., rotary_dim:]], dim=-1)

    return PairsSelfAttention
