"""RMSNorm for the torch path."""

import torch


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, computed in fp32.

    megatron's `WrappedTorchNorm` refuses sequence parallel; this one marks its weight, whose gradient megatron then
    sums over the tensor parallel group (`finalize_model_grads`).
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010  (an attribute of megatron's)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(hidden.dtype)
