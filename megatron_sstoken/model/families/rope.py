"""Rotary position embeddings: what config.json says of them, and their frequencies."""

from typing import Any

import torch

from megatron_sstoken.model.families.architecture import Architecture, RopeScaling


def read_rope(path: str, config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`.

    Raises ValueError for a kind of scaling that is not supported and for one that lacks a number.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    base = parameters.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if parameters.pop("partial_rotary_factor", 1.0) != 1.0 or config.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"{path}: partial_rotary_factor is not supported: only 1.0 is")
    if kind == "default":
        return float(base), None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"{path}: rope type {kind!r} is not supported: use default, linear or llama3")
    try:
        if kind == "linear":
            return float(base), RopeScaling(kind, float(parameters["factor"]))
        return float(base), RopeScaling(
            kind,
            factor=float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
            original_max_positions=int(parameters["original_max_position_embeddings"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the rope scaling {kind!r} lacks a number for {error}") from error


def rope_inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Inverse frequencies, fp32 [head_dim / 2], as transformers computes them (`modeling_rope_utils`)."""
    dim = architecture.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    frequencies = 1.0 / (architecture.rope_base**exponents)
    scaling = architecture.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    wavelength = 2 * torch.pi / frequencies
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)
