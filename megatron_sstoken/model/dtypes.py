"""Types of weights, by the names that settings, command lines and files give them."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Our names."""
SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Those of safetensors files, for the same types."""
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def weight_dtype(precision: str) -> torch.dtype:
    """What a run of this `training.precision` keeps weights and activations in. FP8 is for matrix products alone."""
    return DTYPES["bf16" if precision == "fp8" else precision]


def is_router_bias(name: str) -> bool:
    """Whether a tensor, by its name in megatron or Hugging Face, is a bias that decides over experts, always in fp32."""
    return name.endswith((".router.expert_bias", ".gate.e_score_correction_bias"))


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What the tensor `name` of a model in `dtype` is stored in."""
    return torch.float32 if is_router_bias(name) else dtype
