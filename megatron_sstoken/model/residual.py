"""What a layer adds to the residual stream, where that is more than the bare sum."""

from collections.abc import Callable
from typing import Any

import torch


class ResidualAdd(torch.nn.Module):
    """residual + multiplier · norm(output), in the place of megatron's bias, dropout and add.

    Norms of this kind stand after attention or the feed-forward part (OLMo 2, GLM-4, Gemma 3), multipliers in Granite.
    `norm`: what makes a norm of the hidden states, or None.
    """

    def __init__(self, config: Any, norm: Callable[..., torch.nn.Module] | None, multiplier: float):
        super().__init__()
        self.multiplier = multiplier
        self.norm = norm and norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """megatron asks for a function of output and bias, residual, and the probability of dropout, which is 0."""
        return self.add

    def add(
        self, output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, dropout: float
    ) -> torch.Tensor:
        """Hidden states [tokens, batch, hidden size], all three alike."""
        output, bias = output_with_bias
        output = output if bias is None else output + bias
        output = output if self.norm is None else self.norm(output)
        return residual + (output if self.multiplier == 1.0 else output * self.multiplier)
