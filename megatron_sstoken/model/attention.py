"""Core attention on torch SDPA for packed samples, and the tap that measures attention to the context.

Tokens are in megatron's THD form: the samples of a micro-batch one after another, `cu_seqlens` giving their bounds.
Under context parallel each rank holds, of every sample, chunk r and chunk 2·cp − 1 − r of 2·cp equal ones.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class SampleBounds(PackedSeqParams):
    """megatron's packed-sequence parameters, with the lengths as Python numbers for the torch path."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample over all context parallel ranks, its alignment padding included."""


def sample_bounds(lengths: list[int], device: torch.device) -> SampleBounds:
    """Bounds of samples with these padded lengths, for every layer of every stage."""
    cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cumulative[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    cumulative = cumulative.to(device)
    return SampleBounds(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )


class TorchCoreAttention(torch.nn.Module):
    """Causal attention within each sample; takes the place of megatron's `DotProductAttention`.

    That one builds an S×S matrix and refuses packed samples. Query: [tokens, heads, head_dim]; key and value:
    [tokens, groups, head_dim]; returns [tokens, heads · head_dim]. No attention dropout.
    """

    def __init__(self, config, layer_number, softmax_scale=None, **_unused):
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        assert isinstance(packed_seq_params, SampleBounds), "every micro-batch carries the bounds of its samples"
        assert attention_mask is None and attention_bias is None
        lengths = packed_seq_params.lengths
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        pieces = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
            for q, k, v in zip(*(t.transpose(0, 1).split(lengths, dim=1) for t in (query, key, value)), strict=True)
        ]
        return torch.cat(pieces, dim=1).transpose(0, 1).flatten(1)


@dataclass
class AttentionProbe:
    """Hand-over between the training step and the taps of one model chunk.

    The step sets `context` before a forward pass; each tapped layer then adds its mass once and ignores the
    repetition of its forward under activation recompute.
    """

    context: torch.Tensor | None = None
    """bool [tokens]: which tokens of this rank are context."""

    masses: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer number (from 1) → sum over this rank's heads of the attention mass on the context, fp32 [tokens]."""

    def arm(self, context: torch.Tensor) -> None:
        """Measure during the next forward pass."""
        self.context, self.masses = context, {}

    def take(self) -> dict[int, torch.Tensor]:
        """The masses measured since `arm`; disarms."""
        masses, self.context, self.masses = self.masses, None, {}
        return masses


class TappedCoreAttention(torch.nn.Module):
    """A core attention that also measures how much each query attends to the context.

    With the indicator "x_j is context" as value, attention's output is Σ_{j context} softmax_j, so the kernel that
    computes the layer computes the mass too, and brings causality, packing, grouped queries and context parallel
    along (design page, section 2). One attention forward, without gradient.
    """

    def __init__(self, inner: torch.nn.Module, layer_number: int, probe: AttentionProbe):
        super().__init__()
        self.inner = inner
        self.layer_number = layer_number
        self.probe = probe

    def forward(self, query, key, value, attention_mask, **kwargs):
        if self.probe.context is not None and self.layer_number not in self.probe.masses:
            with torch.no_grad():
                indicator = self.probe.context.to(value.dtype)[:, None, None].expand(value.shape).contiguous()
                output = self.inner(query.detach(), key.detach(), indicator, attention_mask, **kwargs)
                mass = output.reshape(query.shape[0], -1, value.shape[-1])[:, :, 0]
                self.probe.masses[self.layer_number] = mass.float().sum(dim=1)
        return self.inner(query, key, value, attention_mask, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The checkpoint does not know of the tap: the inner attention's state, under the layer's own name."""
        state = getattr(self.inner, "sharded_state_dict", None)
        return state(prefix, sharded_offsets, metadata) if state else {}


def core_attention_builder(inner: type, tapped_layers: frozenset[int], probe: AttentionProbe):
    """What megatron's layer spec calls for `core_attention`: `inner`, wrapped in a tap on the layers named."""

    def build(*, layer_number: int, **kwargs):
        attention = inner(layer_number=layer_number, **kwargs)
        return TappedCoreAttention(attention, layer_number, probe) if layer_number in tapped_layers else attention

    return build
