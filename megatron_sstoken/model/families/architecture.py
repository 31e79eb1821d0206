"""What a decoder computes, in numbers."""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_sstoken.model.families.weight_map import WeightRule


@dataclass(frozen=True)
class RopeScaling:
    """How RoPE's frequencies are changed for long texts; the numbers are transformers' (`modeling_rope_utils`)."""

    kind: str
    """`linear`, `llama3`, `yarn`, or `longrope` as far as the model was trained before it was made longer."""
    factor: float = 1.0
    """What slow frequencies are divided by; in `longrope` each has its own."""
    original_max_positions: int = 8192
    """Tokens that the model was trained for before."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    """Of `llama3`: wavelengths of so many parts of the original length bound the frequencies between both ways."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    """Of `yarn`: turns within the original length that bound the dimensions between both ways; whether to whole ones."""
    short_factors: tuple[float, ...] = ()
    """Of `longrope`: what each frequency is divided by in sequences within the original length."""
    attention_factor: float = 1.0
    """Of `yarn` and `longrope`: what queries and keys are multiplied by where they are turned."""


@dataclass(frozen=True)
class LayerNorms:
    """The norms of a layer, as Hugging Face calls them; None where there is none."""

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    """Of what attention adds to the residual stream, before it is added."""
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    """The same for the feed-forward part."""

    @property
    def number(self) -> int:
        """How many there are."""
        return sum(name is not None for name in vars(self).values())


@dataclass(frozen=True)
class Latents:
    """Multi-head latent attention: what queries, keys and values of all heads are made of (DeepSeek-V2, arXiv 2405.04434).

    Each head has a query and a key of `Architecture.head_dim` numbers: `plain_dim` that know no positions, then `rotary_dim`
    that RoPE turns, which all heads share of their keys.
    """

    query: int | None
    """Numbers of a token that all its queries are made of; None: they are made of its hidden state."""
    key_value: int
    """Numbers of a token that all its keys, but for what RoPE turns, and values are made of."""
    plain_dim: int
    rotary_dim: int
    value_dim: int
    """Numbers of each head's value."""

    @property
    def down_dim(self) -> int:
        """Numbers of a token that its hidden state is projected to for keys and values: latents, and what RoPE turns."""
        return self.key_value + self.rotary_dim

    @property
    def up_dim(self) -> int:
        """Numbers that each head makes of latents: of its key, and its value."""
        return self.plain_dim + self.value_dim


@dataclass(frozen=True)
class DeltaNet:
    """Sizes of gated delta nets, which stand in some layers in place of attention. Each key head serves as many value heads."""

    key_heads: int
    value_heads: int
    key_dim: int
    """Numbers of each key, and of each query."""
    value_dim: int
    kernel: int
    """Tokens that the convolution sees, the last included."""

    @property
    def values_per_key(self) -> int:
        """Value heads that a key head serves."""
        return self.value_heads // self.key_heads

    @property
    def blocks(self) -> tuple[int, ...]:
        """What is made of a token's hidden state for each key head: query, key, values, the values' gates, and for each of its
        value heads the strength of what it writes and how fast it fades."""
        served = self.values_per_key
        return (self.key_dim, self.key_dim, *[served * self.value_dim] * 2, served, served)

    @property
    def convolved(self) -> int:
        """Of these, for all key heads, what goes through the convolution: queries, keys and values."""
        return self.key_heads * sum(self.blocks[:3])

    @property
    def values(self) -> int:
        """Numbers of all values of a token."""
        return self.value_heads * self.value_dim


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
    rotary_fraction: float = 1.0
    """The part of each head, from its beginning, that RoPE turns."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Whether the projection of attention's output has a bias."""
    mlp_bias: bool = False
    """Whether gate, up and down projection have biases; of a dense model."""
    expert_bias: bool = False
    """Whether routers and experts have biases; then the projections of attention have them, too."""
    attention_sinks: bool = False
    """Whether every head has a learned score that takes part in its softmax beside those of the tokens."""
    latents: Latents | None = None
    """Of multi-head latent attention; then every head has a key and a value of its own."""
    output_gate: bool = False
    """Whether what a head's attention gives is multiplied by the sigmoid of a gate, which is made beside its query."""
    delta_net: DeltaNet | None = None
    delta_layers: tuple[bool, ...] = ()
    """For every layer whether a gated delta net takes the place of attention; empty where none does."""
    qk_norm: bool = False
    """Whether every head of q and k is normalised before RoPE."""
    qk_norm_over_heads: bool = False
    """Whether such a norm goes over all heads at once."""
    norms: LayerNorms = LayerNorms()
    embedding_multiplier: float = 1.0
    """What the embedding is multiplied by."""
    residual_multiplier: float = 1.0
    """What attention and feed-forward part are multiplied by before they are added to the residual stream."""
    logits_divisor: float = 1.0
    activation: str = "silu"
    """Of the gate: `silu`, `gelu_pytorch_tanh`, or `quick_gelu` (x · sigmoid(1.702 x))."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    window_rope_base: float | None = None
    """In layers with a window RoPE has this base and no scaling; None: what it has in the others."""
    queries_grow: bool = False
    """Whether queries beyond the original length are multiplied by more than 1, which is not computed."""
    rotary_pairs: bool = False
    """Whether RoPE turns neighbouring numbers as pairs, not those of the first and the second half."""
    sliding_window: int | None = None
    """In the layers of `windowed_layers` a token attends to this many tokens, itself included."""
    windowed_layers: tuple[bool, ...] = ()
    """For every layer whether the window holds; empty without one."""
    num_experts: int = 0
    """Experts of a layer, each of `ffn_hidden_size`; 0 is a dense model."""
    experts_per_token: int = 0
    router_renormalizes: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""
    router_bias: bool = False
    """Whether a bias, which is not trained, decides with the scores which experts a token is sent to."""
    num_dense_layers: int = 0
    """Leading layers of a mixture that have one feed-forward part, of `dense_ffn_hidden_size`."""
    also_dense: tuple[int, ...] = ()
    """Other layers (from 0) of that kind."""
    dense_ffn_hidden_size: int = 0
    shared_ffn_hidden_size: int = 0
    """Of what every token meets beside its experts; 0 is nothing."""
    shared_gate: bool = False
    """Whether that is multiplied by the sigmoid of a number that is made of the token."""
    ignored_layers: int = 0
    """Layers behind the last that folders hold and transformers does not compute (they predict further tokens)."""
    ignored_prefix: str | None = None
    """How the names of tensors of such layers begin that are not numbered with the others."""
    transformer_options: tuple[tuple[str, Hashable], ...] = ()
    """What the family adds to megatron's TransformerConfig, as (field, value), lists as tuples."""

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers (from 0) that have attention."""
        return tuple(layer for layer in range(self.num_layers) if not (self.delta_layers and self.delta_layers[layer]))

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """The layers (from 0) of a mixture that have no experts."""
        return (*range(self.num_dense_layers), *self.also_dense)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers (from 0) that have experts."""
        return tuple(sorted({*range(self.num_layers)} - {*self.dense_layers})) if self.num_experts else ()

    @property
    def query_rows(self) -> int:
        """Numbers of a token that all its queries have, and their gates."""
        return self.num_attention_heads * self.head_dim * (2 if self.output_gate else 1)

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that RoPE turns."""
        return self.latents.rotary_dim if self.latents else int(self.head_dim * self.rotary_fraction)

    @property
    def value_dim(self) -> int:
        """Numbers of each head's value."""
        return self.latents.value_dim if self.latents else self.head_dim

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that is computed as transformers does it.

        LongRoPE has other frequencies for whole sequences beyond the original length: samples of a pack share theirs.
        """
        scaling = self.rope_scaling
        if scaling is not None and (scaling.kind == "longrope" or self.queries_grow):
            return min(self.max_positions, scaling.original_max_positions)
        return self.max_positions

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

    def norm_parameters(self) -> int:
        """Weights of the norms of a layer with attention."""
        return self.norms.number * self.hidden_size + self._head_norm_parameters()

    def _head_norm_parameters(self) -> int:
        """Weights of the norms of queries and keys, outside of latents."""
        heads = self.num_attention_heads + self.num_query_groups if self.qk_norm_over_heads else 2
        return heads * self.head_dim if self.qk_norm else 0

    def _attention_parameters(self) -> int:
        """Weights and biases of a layer's attention, but for norms of queries and keys outside of latents."""
        heads, output = self.num_attention_heads, self.num_attention_heads * self.value_dim * self.hidden_size
        if (latents := self.latents) is not None:
            down = self.hidden_size * latents.down_dim + latents.key_value
            up = latents.key_value * heads * latents.up_dim
            queries = heads * self.head_dim
            if latents.query is None:
                return output + down + up + self.hidden_size * queries
            return output + down + up + latents.query * (self.hidden_size + 1 + queries)
        rows = self.query_rows + 2 * self.num_query_groups * self.head_dim
        return output + self.hidden_size * rows + (rows if self.qkv_bias else 0)

    def _delta_net_parameters(self, net: DeltaNet) -> int:
        """Weights of what takes the place of a layer's attention."""
        projections = self.hidden_size * (net.key_heads * sum(net.blocks) + net.values)
        return projections + net.convolved * net.kernel + 2 * net.value_heads + net.value_dim

    def _parameters_with(self, num_experts: int) -> int:
        attention = self._attention_parameters() + self._head_norm_parameters()
        attention += self.hidden_size if self.output_bias else 0
        attention += self.num_attention_heads if self.attention_sinks else 0
        number = len(self.attention_layers)
        mixers = number * attention
        if self.delta_net is not None:
            mixers += (self.num_layers - number) * self._delta_net_parameters(self.delta_net)
        layer = self.norms.number * self.hidden_size
        layer += 2 * self.ffn_hidden_size + self.hidden_size if self.mlp_bias else 0
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        feed_forward = num_experts * self.ffn_hidden_size + self.shared_ffn_hidden_size
        mixed = 3 * self.hidden_size * feed_forward + self.num_experts * self.hidden_size
        mixed += self.hidden_size if self.shared_gate else 0
        if self.expert_bias:
            mixed += num_experts * (2 * self.ffn_hidden_size + self.hidden_size) + self.num_experts
        dense = 3 * self.hidden_size * self.dense_ffn_hidden_size
        mlps = (self.num_layers - len(self.dense_layers)) * mixed + len(self.dense_layers) * dense
        return mixers + self.num_layers * layer + mlps + embeddings + self.hidden_size

    def weight_rules(self) -> "tuple[WeightRule, ...]":
        """The weight map, without the rules for tensors that this architecture lacks; a rule for every expert."""
        # Imported here: the registry holds the families, which are made of rules for architectures.
        from megatron_sstoken.model.families.registry import family_of

        return tuple(family_of(self.family).weight_rules(self))

    def tensor_names(self) -> list[str]:
        """The names of all tensors of the Hugging Face model, sorted."""
        return sorted(
            {
                pattern.format(layer=layer)
                for rule in self.weight_rules()
                for layer in rule.layers(self)
                for pattern in rule.hugging_face
            }
        )
