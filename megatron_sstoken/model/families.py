"""Model families: what a Hugging Face config.json means, and which tensors make which megatron parameter.

A family is data: the fields of its configuration that may be set, and a weight map. A configuration field that would
change what the model computes and is not understood is an error that names it.
"""

import json
import math
import os
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch


class Split(Enum):
    """How a megatron parameter is made from Hugging Face tensors and split over the tensor parallel group."""

    WHOLE = "whole"  # the same on all ranks
    ROWS = "rows"  # consecutive output rows (column-parallel linear)
    COLUMNS = "columns"  # consecutive input columns (row-parallel linear)
    QKV = "qkv"  # q, k, v interleaved by query group, then rows
    GATED = "gated"  # on each rank its rows of the gate, then its rows of the up projection
    VOCABULARY = "vocabulary"  # rows, zeros appended to the padded vocabulary


@dataclass(frozen=True)
class WeightRule:
    """One megatron parameter, `{layer}` standing for the layer's number, and the Hugging Face tensors it is made of."""

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling (`llama3`) or plain interpolation (`linear`)."""

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class Architecture:
    """What a decoder computes, in numbers. `vocabulary_size` is the unpadded one."""

    family: str
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocabulary_size: int
    max_positions: int
    norm_epsilon: float
    rope_base: float
    rope_scaling: RopeScaling | None
    tied_embeddings: bool
    qkv_bias: bool

    def padded_vocabulary(self, multiple: int, tensor: int) -> int:
        """Vocabulary rows once padded to a multiple of both numbers.

        With the default multiple of 128 all tensor parallel sizes up to 128 that are powers of two share one padded
        size, so that checkpoints move between them (Megatron-LM issue 1754 tells of the trouble otherwise).
        """
        step = math.lcm(multiple, tensor)
        return -(-self.vocabulary_size // step) * step

    def num_parameters(self) -> int:
        """Parameters of the unpadded model."""
        heads = (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        attention = self.hidden_size * (heads + self.num_attention_heads * self.head_dim)
        layer = attention + 3 * self.hidden_size * self.ffn_hidden_size + 2 * self.hidden_size
        layer += heads if self.qkv_bias else 0
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def weight_rules(self) -> tuple[WeightRule, ...]:
        """The weight map, without the rules for tensors that this architecture lacks."""
        rules = list(_LAYER_RULES)
        if self.qkv_bias:
            rules.append(_QKV_BIAS)
        rules += [_EMBEDDING, _FINAL_NORM]
        if not self.tied_embeddings:
            rules.append(_HEAD)
        return tuple(rules)


_LAYER = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."
_LAYER_RULES = (
    WeightRule(_LAYER + "input_layernorm.weight", (_HF + "input_layernorm.weight",), Split.WHOLE),
    WeightRule(
        _LAYER + "self_attention.linear_qkv.weight",
        tuple(_HF + f"self_attn.{name}_proj.weight" for name in "qkv"),
        Split.QKV,
    ),
    WeightRule(_LAYER + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), Split.COLUMNS),
    WeightRule(_LAYER + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), Split.WHOLE),
    WeightRule(
        _LAYER + "mlp.linear_fc1.weight", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight"), Split.GATED
    ),
    WeightRule(_LAYER + "mlp.linear_fc2.weight", (_HF + "mlp.down_proj.weight",), Split.COLUMNS),
)
_QKV_BIAS = WeightRule(
    _LAYER + "self_attention.linear_qkv.bias", tuple(_HF + f"self_attn.{name}_proj.bias" for name in "qkv"), Split.QKV
)
_EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Split.VOCABULARY)
_FINAL_NORM = WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Split.WHOLE)
_HEAD = WeightRule("output_layer.weight", ("lm_head.weight",), Split.VOCABULARY)

# Fields that say nothing about what the model computes, or only about how it is run or made.
_HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "initializer_range _name_or_path name_or_path pretraining_tp attention_dropout hidden_dropout return_dict "
    "output_attentions output_hidden_states max_window_layers sliding_window layer_types is_decoder id2label label2id "
    "problem_type chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder add_cross_attention "
    "cross_attention_hidden_size finetuning_task tokenizer_class task_specific_params unsloth_fixed "
    "unsloth_version torchscript prefix sep_token_id decoder_start_token_id".split()
)
_UNDERSTOOD = frozenset(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "tie_word_embeddings hidden_act".split()
)
# Per family: whether q, k and v have biases, and fields that must have one value (when present).
_FAMILIES: dict[str, tuple[bool, dict[str, Any]]] = {
    "llama": (False, {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False}),
    "qwen2": (True, {"use_sliding_window": False, "use_mrope": False}),
}


def read_architecture(hf_path: str) -> Architecture:
    """The architecture that `hf_path`/config.json describes.

    Raises ValueError for a missing or unreadable file, an unsupported family, and every field that would change the
    model's output and is not supported, each by name.
    """
    path = os.path.join(hf_path, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"{hf_path} has no config.json: name the folder of a Hugging Face checkpoint")
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object: it is damaged")
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise ValueError(f"{path}: model_type={family!r} is not supported: use one of {', '.join(_FAMILIES)}")
    qkv_bias, fixed = _FAMILIES[family]
    _refuse_unknown(path, config, fixed)

    def number(name: str, default: Any = None) -> Any:
        value = config.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{path}: {name} is missing")
        return value

    if number("hidden_act", "silu") != "silu":
        raise ValueError(f"{path}: hidden_act={config['hidden_act']!r} is not supported: only silu is")
    heads = number("num_attention_heads")
    groups = number("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    base, scaling = _rope(path, config)
    return Architecture(
        family=family,
        hidden_size=number("hidden_size"),
        num_layers=number("num_hidden_layers"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=number("head_dim", number("hidden_size") // heads),
        ffn_hidden_size=number("intermediate_size"),
        vocabulary_size=number("vocab_size"),
        max_positions=number("max_position_embeddings", 2048),
        norm_epsilon=number("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=qkv_bias,
    )


def _refuse_unknown(path: str, config: dict, fixed: dict[str, Any]) -> None:
    for name, value in config.items():
        if name == "layer_types" and set(value or ()) - {"full_attention"}:
            raise ValueError(f"{path}: layer_types={value!r} is not supported: only full_attention is")
        if name in fixed:
            if value not in (None, fixed[name]):
                raise ValueError(f"{path}: {name}={value!r} is not supported: only {fixed[name]!r} is")
        elif name in _HARMLESS or name in _UNDERSTOOD or value in (None, False, 0, 0.0, [], {}, ""):
            continue
        else:
            raise ValueError(
                f"{path}: the field {name}={value!r} is not known and might change what the model computes: "
                "remove it if it does not, or ask for its support"
            )


def _rope(path: str, config: dict) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
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
