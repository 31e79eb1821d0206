"""Core attention on torch SDPA for packed samples, and the capture of attention to the context.

Tokens are in megatron's THD form: the samples of a micro-batch one after another, `cu_seqlens` giving their bounds.
Under context parallel each rank holds, of every sample, chunk r and chunk 2·cp − 1 − r of 2·cp equal ones.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import is_layer_window_attention

from megatron_sstoken.data.context_parallel import zigzag_index
from megatron_sstoken.device import to_compute_device
from megatron_sstoken.model.rows import HeadRows


@dataclass
class SampleBounds(PackedSeqParams):
    """megatron's packed-sequence parameters, and what the torch path needs besides."""

    lengths: list[int] = field(default_factory=list)
    """Tokens of each sample over all context parallel ranks, its alignment padding included."""

    index: torch.Tensor | None = None
    """int64 [T / cp]: which of the T tokens this context parallel rank holds; None if it holds all."""

    local: np.ndarray | None = None
    """`index` on the host."""

    gathered_order: torch.Tensor | None = None
    """int64 [T]: where each token lies in the ranks' tokens one after another."""

    head_rows: HeadRows | None = None
    """Which rows the head reads, where it reads some only."""

    complete: "SampleBounds | None" = None
    """The same with cumulative lengths, where rotary embedding must not see them (`PackedRotary`)."""


def sample_bounds(lengths: list[int], context_size: int = 1, context_rank: int = 0) -> SampleBounds:
    """Bounds of samples with these padded lengths, for every layer of every stage, on the compute device."""
    cumulative = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cumulative[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    cumulative = to_compute_device(cumulative)
    bounds = SampleBounds(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        max_seqlen_q=max(lengths),
        max_seqlen_kv=max(lengths),
        lengths=lengths,
    )
    if context_size > 1:
        of_rank = zigzag_index(lengths, context_size)
        bounds.local = of_rank[context_rank].numpy()
        bounds.index = to_compute_device(of_rank[context_rank])
        bounds.gathered_order = to_compute_device(of_rank.flatten().argsort())
    return bounds


class TorchCoreAttention(torch.nn.Module):
    """Causal attention within each sample, or within its sliding window; takes the place of megatron's
    `DotProductAttention`.

    That one builds an S×S matrix and refuses packed samples and context parallel. Query: [tokens, heads, head_dim]; key
    and value: [tokens, groups, head_dim], the tokens of this context parallel rank; returns [tokens, heads · head_dim].
    Keys and values of the other ranks are gathered, and their gradients summed back. No attention dropout.
    """

    def __init__(self, config, layer_number, softmax_scale=None, pg_collection=None, **_unused):
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.context_group = pg_collection.cp if pg_collection is not None else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # megatron counts the tokens before a query

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        bounds = packed_seq_params
        assert isinstance(bounds, SampleBounds), "every micro-batch carries the bounds of its samples"
        assert attention_mask is None and attention_bias is None
        num_ranks = 1
        if bounds.gathered_order is not None:
            num_ranks = self.context_group.size()
            key, value = (self._whole(tensor, bounds.gathered_order) for tensor in (key, value))
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        queries = query.transpose(0, 1).split([length // num_ranks for length in bounds.lengths], dim=1)
        keys, values = (tensor.transpose(0, 1).split(bounds.lengths, dim=1) for tensor in (key, value))
        attend = self._attend_to_sample if num_ranks == 1 else self._attend_in_chunks
        pieces = [attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
        return torch.cat(pieces, dim=1).transpose(0, 1).flatten(1)

    def _whole(self, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        """[T / cp, …] of this rank → [T, …] in the samples' order; differentiable."""
        gathered = gather_from_sequence_parallel_region(tensor.contiguous(), group=self.context_group)
        return gathered.index_select(0, order)

    def _attend_to_sample(self, query, key, value):
        if self.window is not None and self.window < query.shape[1]:
            return self._attend_from(0, query, key, value)
        return self._attend(query, key, value, is_causal=True)

    def _attend(self, query, key, value, **which):
        """SDPA of [heads, tokens, head_dim]. Its kernels that do not build S×S want a batch dimension."""
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale, **which).squeeze(0)

    def _attend_from(self, first, query, key, value):
        """Queries at positions `first` on, to the keys before and at each of them."""
        last = first + query.shape[1]
        visible = torch.ones(query.shape[1], last, dtype=torch.bool, device=query.device).tril(diagonal=first)
        if self.window is not None:
            visible = visible.triu(diagonal=first - self.window + 1)
        return self._attend(query, key[:, :last], value[:, :last], attn_mask=visible)

    def _attend_in_chunks(self, query, key, value):
        """This rank's two chunks of a sample, each to all that stands before it."""
        size, rank = query.shape[1] // 2, self.context_group.rank()
        outputs = []
        for chunk, part in zip((rank, 2 * self.context_group.size() - 1 - rank), query.split(size, dim=1), strict=True):
            outputs.append(self._attend_from(chunk * size, part, key, value))
        return torch.cat(outputs, dim=1)


@dataclass
class AttentionCapture:
    """What the captured layers of one model chunk share with the pass.

    The pass sets `context` before it runs the chunk; each captured layer then adds its mass once and ignores the
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
        """The attention captured since `arm`; disarms."""
        masses, self.context, self.masses = self.masses, None, {}
        return masses


@contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Within, `module` is in evaluation mode.

    In training Transformer Engine's attention keeps a copy of its delayed FP8 scales for each forward pass, for the
    recomputation to take away; a pass that is not recomputed would leave its copy behind, one for every micro-batch.
    """
    training = module.training
    module.train(False)
    try:
        yield
    finally:
        module.train(training)


class CapturingCoreAttention(torch.nn.Module):
    """A core attention that also measures how much each query attends to the context.

    With the indicator "x_j is context" as value, attention's output is Σ_{j context} softmax_j, so the kernel that
    computes the layer computes the mass too, and brings causality, packing, grouped queries and context parallel
    along. One attention forward, without gradient.
    """

    def __init__(self, inner: torch.nn.Module, layer_number: int, capture: AttentionCapture):
        super().__init__()
        self.inner = inner
        self.layer_number = layer_number
        self.capture = capture

    def forward(self, query, key, value, attention_mask, **kwargs):
        if self.capture.context is not None and self.layer_number not in self.capture.masses:
            with torch.no_grad(), _evaluating(self.inner):
                indicator = self.capture.context.to(value.dtype)[:, None, None].expand(value.shape).contiguous()
                output = self.inner(query.detach(), key.detach(), indicator, attention_mask, **kwargs)
                mass = output.reshape(query.shape[0], -1, value.shape[-1])[:, :, 0]
                self.capture.masses[self.layer_number] = mass.float().sum(dim=1)
        return self.inner(query, key, value, attention_mask, **kwargs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The checkpoint does not know of the capture: the inner attention's state, under the layer's own name."""
        state = getattr(self.inner, "sharded_state_dict", None)
        return state(prefix, sharded_offsets, metadata) if state else {}


def core_attention_builder(
    inner: Callable[..., torch.nn.Module], captured_layers: frozenset[int], capture: AttentionCapture
):
    """What megatron's layer spec calls for `core_attention`: `inner`, wrapped in a capture on the layers named."""

    def build(*, layer_number: int, **kwargs):
        attention = inner(layer_number=layer_number, **kwargs)
        return (
            CapturingCoreAttention(attention, layer_number, capture) if layer_number in captured_layers else attention
        )

    return build
