"""Rotary embedding of packed samples without fused kernels: each token is turned by its position, all at once."""

import copy

import torch

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
