"""Core attention on torch SDPA for packed samples, and the capture of attention to the context.

Tokens are in megatron's THD form: the samples of a micro-batch one after another, `cu_seqlens` giving their bounds.
Under context parallel each rank holds, of every sample, chunk r and chunk 2·cp − 1 − r of 2·cp equal ones.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

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


def whole_samples(tensor: torch.Tensor, bounds: SampleBounds, group: dist.ProcessGroup) -> torch.Tensor:
    """[T / cp, …] of this rank of the context parallel group → [T, …] of all in the samples' order; differentiable."""
    gathered = gather_from_sequence_parallel_region(tensor.contiguous(), group=group)
    return gathered.index_select(0, bounds.gathered_order)


class TorchCoreAttention(torch.nn.Module):
    """Causal attention within each sample, or within its sliding window; takes the place of megatron's
    `DotProductAttention`.

    That one builds an S×S matrix and refuses packed samples and context parallel. Query: [tokens, heads, head_dim]; key
    and value: [tokens, groups, head_dim], the tokens of this context parallel rank; returns [tokens, heads · head_dim].
    Keys and values of the other ranks are gathered, and their gradients summed back. No attention dropout.

    With `softmax_type="learnable"` every head has a sink: a score that the softmax takes into its denominator beside those of
    the tokens, so that what a query pays to tokens sums to less than 1. It stands under megatron's name for it,
    `softmax_offset` [heads of this rank].
    """

    def __init__(self, config, layer_number, softmax_scale=None, pg_collection=None, **_unused):
        super().__init__()
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.context_group = pg_collection.cp if pg_collection is not None else None
        self.tensor_group = pg_collection.tp if pg_collection is not None else None
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size[0] + 1 if windowed else None  # megatron counts the tokens before a query
        self.softmax_offset = None
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))

    def forward(
        self, query, key, value, attention_mask, *, attn_mask_type=None, attention_bias=None, packed_seq_params=None
    ):
        bounds = packed_seq_params
        assert isinstance(bounds, SampleBounds), "every micro-batch carries the bounds of its samples"
        assert attention_mask is None and attention_bias is None
        num_ranks = 1
        if bounds.gathered_order is not None:
            num_ranks = self.context_group.size()
            key, value = (whole_samples(tensor, bounds, self.context_group) for tensor in (key, value))
        repeats = query.shape[1] // key.shape[1]
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        queries = query.transpose(0, 1).split([length // num_ranks for length in bounds.lengths], dim=1)
        keys, values = (tensor.transpose(0, 1).split(bounds.lengths, dim=1) for tensor in (key, value))
        attend = self._attend_to_sample if num_ranks == 1 else self._attend_in_chunks
        pieces = [attend(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)]
        return torch.cat(pieces, dim=1).transpose(0, 1).flatten(1)

    def _attend_to_sample(self, query, key, value):
        if self.window is not None and self.window < query.shape[1]:
            return self._attend_from(0, query, key, value)
        if self.softmax_offset is None:
            return self._attend(query, key, value, is_causal=True)
        # A query before the first one, for the sink's place: so each of the others sees the sink and the tokens up to its own.
        query = F.pad(query, (0, 0, 1, 0))
        return self._attend(*self._with_sink(query, key, value), is_causal=True)[:, 1:, : value.shape[-1]]

    def _attend(self, query, key, value, **which):
        """SDPA of [heads, tokens, head_dim]. Its kernels that do not build S×S want a batch dimension."""
        query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(query, key, value, scale=self.scale, **which).squeeze(0)

    def _with_sink(self, query, key, value):
        """The same for a softmax without sinks: before all keys is one whose score is the head's sink and whose value is zero.

        It takes one more number of each head, 1 in queries; 8 more, for kernels like multiples.
        """
        assert self.softmax_offset is not None
        heads, width = len(self.softmax_offset), key.shape[-1]
        one = F.pad(query.new_ones(1), (0, 7)).expand(*query.shape[:-1], 8)
        sink = F.pad((self.softmax_offset / self.scale).to(key.dtype).view(heads, 1, 1), (width, 7))
        key = torch.cat([sink, F.pad(key, (0, 8))], dim=1)
        return torch.cat([query, one], dim=-1), key, F.pad(value, (0, 8, 1, 0))

    def _attend_from(self, first, query, key, value):
        """Queries at positions `first` on, to the keys before and at each of them."""
        last = first + query.shape[1]
        visible = torch.ones(query.shape[1], last, dtype=torch.bool, device=query.device).tril(diagonal=first)
        if self.window is not None:
            visible = visible.triu(diagonal=first - self.window + 1)
        key, value = key[:, :last], value[:, :last]
        if self.softmax_offset is None:
            return self._attend(query, key, value, attn_mask=visible)
        visible = F.pad(visible, (1, 0), value=True)
        return self._attend(*self._with_sink(query, key, value), attn_mask=visible)[..., : value.shape[-1]]

    def _attend_in_chunks(self, query, key, value):
        """This rank's two chunks of a sample, each to all that stands before it."""
        size, rank = query.shape[1] // 2, self.context_group.rank()
        outputs = []
        for chunk, part in zip((rank, 2 * self.context_group.size() - 1 - rank), query.split(size, dim=1), strict=True):
            outputs.append(self._attend_from(chunk * size, part, key, value))
        return torch.cat(outputs, dim=1)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """What a checkpoint holds: sinks, by heads; nothing without them."""
        groups = {"tp_group": self.tensor_group, "dp_cp_group": (metadata or {}).get("dp_cp_group")}
        state, axes = self.state_dict(keep_vars=True), {"softmax_offset": 0}
        return make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets, **groups)


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


def _measure(
    layer_number: int,
    capture: AttentionCapture,
    attention: torch.nn.Module,
    inputs: tuple,
    options: dict[str, Any],
    output: torch.Tensor,
) -> None:
    """A forward hook of a core attention: how much each query attends to the context.

    With the indicator "x_j is context" as value, attention's output is Σ_{j context} softmax_j, so the kernel that
    computes the layer computes the mass too, and brings causality, packing, grouped queries, context parallel and sinks
    along. A sink is no context, nor anything else: what it takes is missing from the mass, as it is from the layer's output.
    One attention forward, without gradient.
    """
    if capture.context is None or layer_number in capture.masses:
        return
    query, key, value, *others = inputs
    with torch.no_grad(), _evaluating(attention):
        indicator = capture.context.to(value.dtype)[:, None, None].expand(value.shape).contiguous()
        attended = attention.forward(query.detach(), key.detach(), indicator, *others, **options)
        mass = attended.reshape(query.shape[0], -1, value.shape[-1])[:, :, 0]
        capture.masses[layer_number] = mass.float().sum(dim=1)


def core_attention_builder(
    inner: Callable[..., torch.nn.Module], captured_layers: frozenset[int], capture: AttentionCapture
):
    """What megatron's layer spec calls for `core_attention`: `inner`, which on the layers named also tells `capture`."""

    def build(*, layer_number: int, **kwargs):
        attention = inner(layer_number=layer_number, **kwargs)
        if layer_number in captured_layers:
            # After the forward pass, when the hooks before it have waited for weights and completed the bounds.
            attention.register_forward_hook(partial(_measure, layer_number, capture), with_kwargs=True)
        return attention

    return build
