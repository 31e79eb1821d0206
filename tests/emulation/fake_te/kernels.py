"""Stand-ins for kernels: matrix products, norms, rotary embeddings, optimizer. Arguments as Transformer Engine passes them.

Computed in fp32 and rounded once, as the kernels do.
"""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from tests.emulation.pretended_device import unnoticed

KERNELS: dict[str, Callable[..., Any]] = {}
"""Name in `transformer_engine_torch` → what stands in for it."""

CALLS: Counter[str] = Counter()
"""How often each was called in this process."""

_DTYPES = {"kFloat32": torch.float32, "kBFloat16": torch.bfloat16, "kFloat16": torch.float16}


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Register a stand-in. What it looks at to find its result is not counted as waiting for the device."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        CALLS[function.__name__] += 1
        with unnoticed():
            return function(*args, **kwargs)

    KERNELS[function.__name__] = run
    return run


def dtype_of(kind: Any) -> torch.dtype | None:
    """torch's type of one of Transformer Engine's, or of torch's own; None of None."""
    return kind if isinstance(kind, torch.dtype) else _DTYPES.get(getattr(kind, "name", ""))


@kernel
def generic_gemm(
    A, transa, B, transb, out, quantizer, out_dtype, bias, bias_dtype, gelu, gelu_in, grad, workspace, size, accumulate,
    *rest, **options,
):  # fmt: skip
    """B·A in column-major words: with `transa` B·Aᵀ. `grad`: `bias` asks for the sum of B's rows. Four results, two None."""
    assert quantizer is None and not gelu
    if out is None:
        shape = (B.shape[-1],) if transb else B.shape[:-1]
        width = A.shape[0] if transa else A.shape[-1]
        out = torch.empty(*shape, width, dtype=dtype_of(out_dtype) or A.dtype, device=A.device)
    _multiply(A, transa, B, transb, out, accumulate, None if grad else bias)
    rows = B.reshape(-1, B.shape[-1])
    return out, rows.float().sum(0).to(bias.dtype) if grad and bias is not None else None, None, None


def _multiply(A, transa, B, transb, out, accumulate, bias=None):
    left, right = (matrix.reshape(-1, matrix.shape[-1]).float() for matrix in (B, A))
    product = (left.t() if transb else left) @ (right.t() if transa else right)
    if bias is not None:
        product = product + bias.float()
    product = product.to(out.dtype).view(out.shape)
    out.add_(product) if accumulate else out.copy_(product)


@kernel
def te_general_grouped_gemm(
    A, transa, B, transb, D, out_dtype, m_splits, bias, bias_dtype, single_output, pre_gelu, grad, workspaces, size,
    accumulate, *rest,
):  # fmt: skip
    """One product for each expert: lists of matrices; D the outputs, or with `single_output` one for all, by rows.

    `bias`: of each expert, nothing without one; with `grad` to be filled with the sums of B's rows.
    """
    outputs = D[0].split([int(rows) for rows in m_splits]) if single_output else D
    for left, right, out, of_expert in zip(B, A, outputs, bias, strict=True):
        added = of_expert if of_expert.numel() and not grad else None
        _multiply(right, transa, left, transb, out, accumulate, added)
        if grad and of_expert.numel():
            of_expert.copy_(left.float().sum(0))
    return bias


@kernel
def rmsnorm_fwd(hidden, weight, epsilon, out, quantizer, dtype, margin, zero_centered):
    """(normalised, None, 1 / root mean square [rows])."""
    wide, gain = hidden.float(), weight.float() + (1 if zero_centered else 0)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    result = (wide * scale * gain).to(dtype_of(dtype) or hidden.dtype)
    if out is not None:
        result = out.copy_(result)
    return result, None, scale.squeeze(-1)


@kernel
def rmsnorm_bwd(upstream, hidden, scale, weight, margin, zero_centered):
    """(gradient of hidden, gradient of weight)."""
    gain = weight.float() + (1 if zero_centered else 0)
    normal = hidden.float() * scale.unsqueeze(-1)
    inner = upstream.float() * gain
    gradient = scale.unsqueeze(-1) * (inner - normal * (inner * normal).mean(-1, keepdim=True))
    return gradient.to(hidden.dtype), (upstream.float() * normal).sum(0).to(weight.dtype)


@kernel
def fused_rope_forward(tensor, frequencies, start, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    """Rotary embedding of [tokens, heads, dim] by each sample's own positions."""
    return _rotate(tensor, frequencies, cu_seqlens, cp_size, cp_rank, 1)


@kernel
def fused_rope_backward(upstream, frequencies, start, layout, interleaved, cu_seqlens, cp_size, cp_rank):
    """The rotation back."""
    return _rotate(upstream, frequencies, cu_seqlens, cp_size, cp_rank, -1)


def _rotate(tensor, frequencies, cu_seqlens, cp_size, cp_rank, sign):
    angles = frequencies.view(frequencies.shape[0], -1)[positions(cu_seqlens, cp_size, cp_rank)].unsqueeze(1)
    assert frequencies.dtype == torch.float32 and angles.shape[0] == tensor.shape[0]
    rotated, rest = tensor.float().split([angles.shape[-1], tensor.shape[-1] - angles.shape[-1]], dim=-1)
    first, second = rotated.chunk(2, -1)
    rotated = rotated * angles.cos() + sign * torch.cat((-second, first), -1) * angles.sin()
    return torch.cat((rotated, rest), -1).to(tensor.dtype)


def lengths_of(cu_seqlens: torch.Tensor) -> list[int]:
    """Lengths of the samples between these bounds."""
    bounds = cu_seqlens.tolist()
    return [end - start for start, end in zip(bounds[:-1], bounds[1:], strict=True)]


def positions(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Within their samples, of the tokens of a context parallel rank: chunks r and 2·cp − 1 − r of 2·cp."""
    found: list[int] = []
    for length in lengths_of(cu_seqlens):
        chunk = length // (2 * cp_size) if cp_size > 1 else length
        for number in (cp_rank, 2 * cp_size - 1 - cp_rank) if cp_size > 1 else (0,):
            found += range(number * chunk, (number + 1) * chunk)
    return torch.tensor(found, device=cu_seqlens.device)


@kernel
def multi_tensor_l2norm(chunk, flag, lists, per_tensor=False, *rest):
    """The norm of all tensors, fp32 [1]."""
    norms = [tensor.float().norm() for tensor in lists[0]]
    total = torch.stack(norms).norm() if norms else torch.zeros((), device="cuda")
    return total.reshape(1), torch.zeros(0, device="cuda")


@kernel
def multi_tensor_scale(chunk, flag, lists, scale):
    """Scaled copies of the first list in the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_((source.float() * scale).to(target.dtype))


@kernel
def multi_tensor_adam(chunk, flag, lists, rate, beta1, beta2, epsilon, step, mode, correction, decay, *rest):
    """AdamW in place on [gradients, parameters, first moments, second moments]."""
    first, second = (1 - beta1**step, 1 - beta2**step) if correction else (1.0, 1.0)
    for gradient, parameter, mean, square in zip(*lists[:4], strict=True):
        gradient = gradient.float()
        mean.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = (mean / first) / ((square / second).sqrt() + epsilon) + decay * parameter.float()
        parameter.add_((-rate * update).to(parameter.dtype))


@kernel
def fused_amax_and_scale_update_after_reduction(*what):
    """New delayed scales: they stay as they are, since nothing is computed in FP8."""
