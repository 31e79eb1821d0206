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
