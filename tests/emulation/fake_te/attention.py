"""Stand-ins for cuDNN's attention over packed samples (THD), and for the kernels that context parallel's ring needs.

Tensors are [tokens, heads, dim]; `cu_seqlens` int32 [samples + 1] bounds the samples.
"""

import torch

from tests.emulation.fake_te.kernels import kernel, lengths_of


def _pieces(cu_q, cu_kv):
    """(rows of the queries, rows of the keys) of every sample."""
    first_q = first_kv = 0
    for length_q, length_kv in zip(lengths_of(cu_q), lengths_of(cu_kv), strict=True):
        yield slice(first_q, first_q + length_q), slice(first_kv, first_kv + length_kv)
        first_q, first_kv = first_q + length_q, first_kv + length_kv


def _spread(tensor, rows, repeats):
    """Rows of keys or values, in fp32, once for every head that reads them."""
    return tensor[rows].float().repeat_interleave(repeats, 1)


def _scores(q, k, scale, mask_type, window):
    """[heads, queries, keys], −∞ where a query may not look."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    visible = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device)
    if "CAUSAL" in mask_type.name:
        visible = visible.tril()
    if window[0] >= 0:
        visible = visible.triu(-window[0])
    return scores.masked_fill(~visible, float("-inf"))


@kernel
def fused_attn_fwd(
    max_q, max_kv, is_training, scale, dropout, zero_fill, layout, bias_type, mask_type, softmax_type, window, cu_q, cu_kv,
    q, k, v, *rest,
):  # fmt: skip
    """[output, log of the sums of exponentials fp32 [tokens, heads, 1], state of the random numbers]."""
    assert layout.name.startswith("NVTE_THD") and dropout == 0
    assert sum(lengths_of(cu_q)) == len(q) and sum(lengths_of(cu_kv)) == len(k)
    assert max(lengths_of(cu_q)) <= max_q and max(lengths_of(cu_kv)) <= max_kv
    repeats = q.shape[1] // k.shape[1]
    output = torch.empty_like(q)
    sums = torch.empty(*q.shape[:2], 1, dtype=torch.float32, device=q.device)
    for rows, keys in _pieces(cu_q, cu_kv):
        scores = _scores(q[rows].float(), _spread(k, keys, repeats), scale, mask_type, window)
        logarithm = scores.logsumexp(-1)
        weights = (scores - logarithm.unsqueeze(-1)).exp()
        output[rows] = torch.einsum("hij,jhd->ihd", weights, _spread(v, keys, repeats)).to(q.dtype)
        sums[rows, :, 0] = logarithm.t()
    return [output, sums, torch.zeros(2, dtype=torch.int64, device=q.device)]


@kernel
def fused_attn_bwd(
    max_q, max_kv, scale, dropout, zero_fill, layout, bias_type, mask_type, softmax_type, window, deterministic, cu_q,
    cu_kv, q, k, v, output, upstream, nominal, dtype, saved, *rest,
):  # fmt: skip
    """[gradients of q, k and v, of a bias, of an offset]."""
    repeats, groups = q.shape[1] // k.shape[1], k.shape[1]
    gradients = [torch.zeros_like(tensor) for tensor in (q, k, v)]
    sums = saved[0]
    assert sums.dim() == 3 and len(sums) == len(q)
    for rows, keys in _pieces(cu_q, cu_kv):
        length = rows.stop - rows.start
        queries, spread_k, spread_v = q[rows].float(), _spread(k, keys, repeats), _spread(v, keys, repeats)
        logarithm = sums[rows].reshape(length, -1).t().unsqueeze(-1)
        weights = (_scores(queries, spread_k, scale, mask_type, window) - logarithm).exp()
        incoming = upstream[rows].float()
        gradient = torch.einsum("ihd,jhd->hij", incoming, spread_v)
        constant = (incoming * output[rows].float()).sum(-1).t().unsqueeze(-1)
        gradient = weights * (gradient - constant) * scale
        gradients[0][rows] = torch.einsum("hij,jhd->ihd", gradient, spread_k).to(q.dtype)
        for place, of_heads in (
            (1, torch.einsum("hij,ihd->jhd", gradient, queries)),
            (2, torch.einsum("hij,ihd->jhd", weights, incoming)),
        ):
            shape = (len(of_heads), groups, repeats, of_heads.shape[-1])
            gradients[place][keys] = of_heads.view(shape).sum(2).to(k.dtype)
    return [*gradients, None, None]


def _half(cu_seqlens, which):
    """Rows of the first (0) or second (1) half of every sample."""
    rows: list[int] = []
    first = 0
    for length in lengths_of(cu_seqlens):
        half = length // 2
        rows += range(first + which * half, first + (which + 1) * half)
        first += length
    return torch.tensor(rows, device=cu_seqlens.device, dtype=torch.int64)


@kernel
def thd_read_half_tensor(tensor, cu_seqlens, which):
    """One half of every sample."""
    return tensor.index_select(0, _half(cu_seqlens, which))


@kernel
def thd_second_half_lse_correction(sums, of_step, cu_seqlens, packed):
    """Add a step's sums [heads, tokens / 2] to those of the second halves, in place."""
    assert packed
    rows = _half(cu_seqlens, 1)
    sums[..., rows] = torch.logaddexp(sums[..., rows], of_step.to(sums.dtype).reshape(sums.shape[0], -1))


@kernel
def thd_read_second_half_lse(sums, cu_seqlens, packed, size):
    """The sums of the second halves, padded to `size`."""
    found = sums[..., _half(cu_seqlens, 1)]
    return torch.nn.functional.pad(found, (0, size - found.shape[-1]))


@kernel
def thd_out_correction(output, of_step, sums, sums_of_step, cu_seqlens, only_second_half, packed):
    """Add a step's output to `output`, in the share that its sums have of all."""
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(len(output), device=output.device)
    share = (sums_of_step.reshape(sums.shape[0], -1) - sums[..., rows]).exp().t().unsqueeze(-1)
    output.index_add_(0, rows, (of_step.float() * share).to(output.dtype))


@kernel
def thd_grad_correction(gradient, of_step, cu_seqlens, first, second):
    """Copy or add a step's gradient to the halves of every sample, as `first` and `second` say."""
    both = first != "none" and second != "none"
    for which, action in ((0, first), (1, second)):
        rows = _half(cu_seqlens, which)
        part = of_step.index_select(0, rows) if both else of_step
        if action == "copy":
            gradient.index_copy_(0, rows, part.to(gradient.dtype))
        elif action == "add":
            gradient.index_add_(0, rows, part.to(gradient.dtype))
