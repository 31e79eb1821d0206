"""Rotary position embeddings: what config.json says of them, and their frequencies, as transformers has them.

`rope_parameters` and `rope_scaling` are read as in transformers' `modeling_rope_utils` (5.23), which also has the formulas.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_sstoken.model.families.architecture import Architecture, RopeScaling

_HEEDED = {
    "default": frozenset[str](),
    "dynamic": frozenset[str](),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        "factor original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
        "truncate".split()
    ),
    "longrope": frozenset("factor short_factor long_factor original_max_position_embeddings attention_factor".split()),
}
"""Type of RoPE → the parameters that change its frequencies, beside base and fraction."""
_KNOWN = frozenset().union(*_HEEDED.values(), ("rope_theta", "rope_type", "type", "partial_rotary_factor"))
# Of mrope: text has one position, whatever the sections. Of old YaRN configs: how the model was made.
_HARMLESS = frozenset({"mrope_section", "mrope_interleaved", "finetuned"})


def rope_parameters(path: str, config: dict[str, Any]) -> dict[str, Any]:
    """The parameters of RoPE, with `rope_theta` and `rope_type`, from all places that transformers reads.

    `rope_scaling` (of old configs, and added by hand as model cards tell) takes precedence over `rope_parameters`, as there.
    Raises ValueError for parameters that are not known, or differ by kind of layer.
    """
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    found = config.get(name) or {}
    if not isinstance(found, dict):
        raise ValueError(f"{path}: {name}={found!r} is not supported: only an object of parameters is")
    if by_kind := sorted(key for key, value in found.items() if isinstance(value, dict)):
        raise ValueError(
            f"{path}: {name} has parameters of its own for {', '.join(by_kind)}: only one RoPE for all layers is supported"
        )
    if unknown := {key: value for key, value in found.items() if key not in _KNOWN | _HARMLESS and value is not None}:
        raise ValueError(
            f"{path}: {name} has the unknown parameters {', '.join(f'{key}={value!r}' for key, value in unknown.items())}: "
            "remove them if they do not change what the model computes, or ask for their support"
        )
    kept = {key: value for key, value in found.items() if value is not None}
    kind = kept.get("rope_type", kept.pop("type", "default"))
    base = kept.get("rope_theta", config.get("rope_theta"))
    kept |= {"rope_type": kind, "rope_theta": 10000.0 if base is None else base}
    if config.get("partial_rotary_factor") is not None:
        kept.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if config.get("original_max_position_embeddings") is not None:
        kept["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    else:
        kept.setdefault("original_max_position_embeddings", config.get("max_position_embeddings") or 2048)
    return kept


def read_rope(path: str, config: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling. `config`: with the family's meaning of absent fields.

    Raises ValueError for a kind of scaling that is not supported and for one that lacks a number.
    """
    parameters = rope_parameters(path, config)
    base, kind = parameters["rope_theta"], parameters["rope_type"]
    if not isinstance(base, (int, float)) or base <= 0:
        raise ValueError(f"{path}: rope_theta={base!r} is not possible: only a number above 0 is")
    if kind not in _HEEDED:
        raise ValueError(f"{path}: rope type {kind!r} is not supported: use one of {', '.join(_HEEDED)}")
    if kind in ("default", "dynamic"):
        # `dynamic` raises the base for sequences beyond max_position_embeddings alone, and there are none.
        return float(base), None
    try:
        return float(base), _scaling(kind, parameters, config.get("max_position_embeddings") or 2048)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: the rope scaling {kind!r} lacks a number for {error}") from error


def _scaling(kind: str, parameters: dict[str, Any], max_positions: int) -> RopeScaling:
    """Raises KeyError with the name of a parameter that is missing."""
    if kind == "linear":
        return RopeScaling(kind, float(parameters["factor"]))
    original = int(parameters["original_max_position_embeddings"])
    if kind == "llama3":
        return RopeScaling(
            kind,
            float(parameters["factor"]),
            original,
            low_freq_factor=float(parameters["low_freq_factor"]),
            high_freq_factor=float(parameters["high_freq_factor"]),
        )
    factor = float(parameters.get("factor", max_positions / original))
    given = parameters.get("attention_factor")
    if kind == "longrope":
        grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return RopeScaling(
            kind,
            factor,
            original,
            short_factors=tuple(map(float, parameters["short_factor"])),
            attention_factor=float(grown if given is None else given),
        )
    return RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        attention_factor=float(_yarn_attention_factor(factor, parameters) if given is None else given),
    )


def yarn_growth(factor: float, scale: float) -> float:
    """By how much YaRN lets angles, or the scale of attention, grow for positions that are `factor` times as many."""
    return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _yarn_attention_factor(factor: float, parameters: dict[str, Any]) -> float:
    numerator, denominator = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if numerator and denominator:
        return yarn_growth(factor, numerator) / yarn_growth(factor, denominator)
    return yarn_growth(factor, 1.0)


def rope_by_kind(config: dict[str, Any], default_base: float, default_window_base: float) -> tuple[dict, dict]:
    """The rope parameters of layers without and with a window, from transformers 5's dictionary of both or from older fields.

    As `Gemma3TextConfig` reads them: `rope_scaling` and `rope_theta` are those of the former, `rope_local_base_freq` is of the
    latter. Raises ValueError where layers with a window would be scaled.
    """
    given = config.get("rope_parameters") or {}
    if given and not given.keys() <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"rope_parameters={given!r} is not supported: only one of full_attention and sliding_attention is"
        )
    full = dict(given.get("full_attention") or {}) | (config.get("rope_scaling") or {})
    window = dict(given.get("sliding_attention") or {})
    full.setdefault("rope_theta", config.get("rope_theta") or default_base)
    window.setdefault("rope_theta", config.get("rope_local_base_freq") or default_window_base)
    kind = window.get("rope_type") or window.get("type") or "default"
    if kind != "default":
        raise ValueError(f"rope type {kind!r} of sliding_attention is not supported: only 'default' is")
    return full, window


def with_full_rope(config: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """The config with these rope parameters and no others."""
    others = {name: value for name, value in config.items() if name not in ("rope_scaling", "rope_theta")}
    return others | {"rope_parameters": full}


def table_frequencies(architecture: Architecture) -> torch.Tensor:
    """What megatron's table of angles is made of, fp32: `rope_inverse_frequencies`, then windowed layers'."""
    frequencies = rope_inverse_frequencies(architecture)
    if architecture.window_rope_base is None:
        return frequencies
    plain = replace(architecture, rope_base=architecture.window_rope_base, rope_scaling=None)
    return torch.cat([frequencies, rope_inverse_frequencies(plain)])


def rope_inverse_frequencies(architecture: Architecture) -> torch.Tensor:
    """Inverse frequencies, fp32 [rotary_dim / 2], as transformers computes them."""
    dim = architecture.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64).to(torch.float32) / dim
    powers = architecture.rope_base**exponents
    scaling = architecture.rope_scaling
    if scaling is None:
        return 1.0 / powers
    return _FREQUENCIES[scaling.kind](powers, scaling, architecture)


def _linear(powers: torch.Tensor, scaling: RopeScaling, architecture: Architecture) -> torch.Tensor:
    return 1.0 / powers / scaling.factor


def _llama3(powers: torch.Tensor, scaling: RopeScaling, architecture: Architecture) -> torch.Tensor:
    frequencies = 1.0 / powers
    wavelength = 2 * torch.pi / frequencies
    longest = scaling.original_max_positions / scaling.low_freq_factor
    shortest = scaling.original_max_positions / scaling.high_freq_factor
    smooth = (scaling.original_max_positions / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / scaling.factor, frequencies)
    return torch.where((wavelength <= longest) & (wavelength >= shortest), between, scaled)


def _yarn(powers: torch.Tensor, scaling: RopeScaling, architecture: Architecture) -> torch.Tensor:
    dim, base = architecture.rotary_dim, architecture.rope_base

    def dimension(turns: float) -> float:
        """The one (of pairs, not a whole number) that turns so often within the original length."""
        return dim * math.log(scaling.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    width = last - first if last != first else 0.001
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float32) - first) / width).clamp(0, 1)
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def _longrope(powers: torch.Tensor, scaling: RopeScaling, architecture: Architecture) -> torch.Tensor:
    return 1.0 / (torch.tensor(scaling.short_factors, dtype=torch.float32) * powers)


_FREQUENCIES: dict[str, Callable[[torch.Tensor, RopeScaling, Architecture], torch.Tensor]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
