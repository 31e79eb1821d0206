"""RMSNorm for the torch path."""

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, computed in fp32.

    megatron's `WrappedTorchNorm` refuses sequence parallel; this one marks its weight, whose gradient megatron then
    sums over the tensor parallel group (`finalize_model_grads`).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        self.offset = 1.0 if config.layernorm_zero_centered_gamma else 0.0
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype) - self.offset)
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (an attribute of megatron's)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        if self.offset:  # Gemma, which multiplies in fp32
            return ((self.offset + self.weight.float()) * wide).to(hidden.dtype)
        return self.weight * wide.to(hidden.dtype)


def norm_over_heads(num_heads: int, group: dist.ProcessGroup) -> type[torch.nn.Module]:
    """A norm over all `num_heads` heads of q or k at once, which tensor parallel `group` deals out evenly.

    Every rank holds the whole weight and uses the part of its heads. megatron sums the gradients of norms of q and k over the
    group, by their names, which makes each rank's the whole one.
    """

    class NormOverHeads(RMSNorm):
        """Hidden states [tokens, batch, heads of this rank, head_dim]."""

        def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
            super().__init__(config, num_heads * hidden_size, eps)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            wide = hidden.float()
            squares = wide.square().sum((-2, -1), keepdim=True)
            # Summed over the ranks, whose heads all depend on the sum: so are its gradients.
            squares = reduce_from_tensor_model_parallel_region(squares, group=group)
            squares = copy_to_tensor_model_parallel_region(squares, group=group)
            wide = wide * torch.rsqrt(squares / len(self.weight) + self.eps)
            weight = self.weight.view(num_heads, -1).chunk(group.size())[group.rank()]
            return weight * wide.to(hidden.dtype)

    return NormOverHeads
