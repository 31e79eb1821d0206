"""What a decoder computes, in numbers."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sstoken.model.families.weight_map import WeightRule


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`llama3`) or plain interpolation (`linear`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Architecture:
    """What a decoder computes, in numbers. `vocabulary_size` is the unpadded one."""

    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocabulary_size: int
    max_positions: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether every head of q and k is normalised before RoPE."""
    sliding_window: int | None = None
    """In the layers of `windowed_layers` a token attends to this many tokens, itself included."""
    windowed_layers: tuple[bool, ...] = ()
    """For every layer whether the window holds; empty without one."""
    num_experts: int = 0
    """Experts of a layer, each of `ffn_hidden_size`; 0 is a dense model."""
    experts_per_token: int = 0
    router_renormalizes: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""
    transformer_options: tuple[tuple[str, Hashable], ...] = ()
    """What the family adds to megatron's TransformerConfig, as (field, value), lists as tuples."""

    def padded_vocabulary(self, multiple: int, tensor: int) -> int:
        """Vocabulary rows once padded to a multiple of both numbers.

        With the default multiple of 128 all tensor parallel sizes up to 128 that are powers of two share one padded
        size, so that checkpoints move between them (NVIDIA/Megatron-LM, 1754, tells of the trouble otherwise).
        """
        step = math.lcm(multiple, tensor)
        return -(-self.vocabulary_size // step) * step

    def num_parameters(self) -> int:
        """Parameters of the unpadded model."""
        return self._parameters_with(max(self.num_experts, 1))

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those it is sent to."""
        return self._parameters_with(max(self.experts_per_token, 1))

    def _parameters_with(self, num_experts: int) -> int:
        heads = (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        layer = self.hidden_size * (heads + self.num_attention_heads * self.head_dim)
        layer += num_experts * 3 * self.hidden_size * self.ffn_hidden_size + self.num_experts * self.hidden_size
        layer += 2 * self.hidden_size + (heads if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def weight_rules(self) -> "tuple[WeightRule, ...]":
        """The weight map, without the rules for tensors that this architecture lacks; a rule for every expert."""
        # Imported here: the registry holds the families, which are made of rules for architectures.
        from megatron_sstoken.model.families.registry import family_of

        return tuple(family_of(self.family).weight_rules(self))
