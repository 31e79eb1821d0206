"""Rotary embedding of packed samples without fused kernels: each token is turned by its position, all at once."""

import copy
import math

import torch
from megatron.core.transformer import TransformerConfig

from megatron_sstoken.model.attention import SampleBounds


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
        bounds = copy.copy(bounds)
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
    fields = {"yarn_rotary_scaling_factor": math.e, "yarn_mscale": 10 * (factor - 1), "yarn_mscale_all_dim": 0.0}
    for name, value in fields.items():
        setattr(config, name, value)
