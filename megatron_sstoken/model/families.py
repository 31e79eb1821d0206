"""Model families: what a Hugging Face config.json means, and which tensors make which megatron parameter.

A family is data: the fields of its configuration that may be set, and a weight map. A configuration field that would
change what the model computes and is not understood is an error that names it.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
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
    """One megatron parameter, `{layer}` standing for the layer's number, and the Hugging Face tensors it is made of.

    A weight of an expert (`expert`: its number in the model) is whole on the ranks that hold the expert: expert parallel
    deals experts out, and tensor parallel does not cut them.
    """

    megatron: str
    hugging_face: tuple[str, ...]
    split: Split
    expert: int | None = None


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
    qkv_bias: bool = False
    qk_norm: bool = False
    """Whether every head of q and k is normalised before RoPE."""
    sliding_window: int | None = None
    """In the layers of `windowed_layers` a token attends to this many tokens, itself included."""
    windowed_layers: tuple[bool, ...] = ()
    """For every layer whether the window holds; empty without one."""
    num_experts: int = 0
    """Experts of a layer, each of `ffn_hidden_size`; 0 is a dense model."""
    experts_per_token: int = 0
    router_renormalizes: bool = True
    """Whether the weights of a token's experts are made to sum to 1."""

    def padded_vocabulary(self, multiple: int, tensor: int) -> int:
        """Vocabulary rows once padded to a multiple of both numbers.

        With the default multiple of 128 all tensor parallel sizes up to 128 that are powers of two share one padded
        size, so that checkpoints move between them (Megatron-LM issue 1754 tells of the trouble otherwise).
        """
        step = math.lcm(multiple, tensor)
        return -(-self.vocabulary_size // step) * step

    def num_parameters(self) -> int:
        """Parameters of the unpadded model."""
        return self._parameters_with(max(self.num_experts, 1))

    def num_active_parameters(self) -> int:
        """Parameters that one token meets: of the experts, those it is sent to."""
        return self._parameters_with(max(self.experts_per_token, 1))

    def _parameters_with(self, num_experts: int) -> int:
        heads = (self.num_attention_heads + 2 * self.num_query_groups) * self.head_dim
        layer = self.hidden_size * (heads + self.num_attention_heads * self.head_dim)
        layer += num_experts * 3 * self.hidden_size * self.ffn_hidden_size + self.num_experts * self.hidden_size
        layer += 2 * self.hidden_size + (heads if self.qkv_bias else 0) + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.vocabulary_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size

    def weight_rules(self) -> tuple[WeightRule, ...]:
        """The weight map, without the rules for tensors that this architecture lacks; a rule for every expert."""
        rules = list(_LAYER_RULES)
        if self.qkv_bias:
            rules.append(_QKV_BIAS)
        if self.qk_norm:
            rules += _QK_NORMS
        rules += _FAMILIES[self.family].mlp(self)
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
)
_QKV_BIAS = WeightRule(
    _LAYER + "self_attention.linear_qkv.bias", tuple(_HF + f"self_attn.{name}_proj.bias" for name in "qkv"), Split.QKV
)
_QK_NORMS = tuple(
    WeightRule(
        _LAYER + f"self_attention.{name}_layernorm.weight", (_HF + f"self_attn.{name}_norm.weight",), Split.WHOLE
    )
    for name in "qk"
)
_EMBEDDING = WeightRule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Split.VOCABULARY)
_FINAL_NORM = WeightRule("decoder.final_layernorm.weight", ("model.norm.weight",), Split.WHOLE)
_LLAMA_NAMES = ("gate_proj", "up_proj", "down_proj")
_HEAD = WeightRule("output_layer.weight", ("lm_head.weight",), Split.VOCABULARY)


def _gated_mlp(megatron: str, hugging_face: str, names: tuple[str, str, str], expert: int | None) -> list[WeightRule]:
    """Gate, up and down projection, in this order of Hugging Face `names`."""
    gate, up, down = (f"{hugging_face}{name}.weight" for name in names)
    return [
        WeightRule(megatron + "linear_fc1.weight", (gate, up), Split.GATED, expert),
        WeightRule(megatron + "linear_fc2.weight", (down,), Split.COLUMNS, expert),
    ]


def _dense_mlp(architecture: "Architecture") -> list[WeightRule]:
    return _gated_mlp(_LAYER + "mlp.", _HF + "mlp.", _LLAMA_NAMES, expert=None)


def _mixture(block: str, names: tuple[str, str, str]) -> Callable[["Architecture"], list[WeightRule]]:
    """Router and experts under the Hugging Face module `block`."""

    def rules(architecture: "Architecture") -> list[WeightRule]:
        found = [WeightRule(_LAYER + "mlp.router.weight", (f"{_HF}{block}.gate.weight",), Split.WHOLE)]
        for expert in range(architecture.num_experts):
            megatron = f"{_LAYER}mlp.experts.local_experts.{expert}."
            found += _gated_mlp(megatron, f"{_HF}{block}.experts.{expert}.", names, expert)
        return found

    return rules


@dataclass(frozen=True)
class Family:
    """What a `model_type` of Hugging Face means."""

    fixed: dict[str, Any]
    """Fields that must have one value (when present)."""
    mlp: Callable[["Architecture"], list[WeightRule]] = _dense_mlp
    """Weight rules of the feed-forward part."""
    qkv_bias: bool = False
    qk_norm: bool = False
    mixture: bool = False
    absent: dict[str, Any] = field(default_factory=dict)
    """What fields mean where they are absent: transformers' defaults, where they are not Llama's."""
    optional_window: bool = False
    """Whether `use_sliding_window` switches the window on."""


# Fields that say nothing about what the model computes, or only about how it is run or made.
_HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "initializer_range _name_or_path name_or_path pretraining_tp attention_dropout hidden_dropout return_dict "
    "output_attentions output_hidden_states is_decoder id2label label2id "
    "problem_type chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder add_cross_attention "
    "cross_attention_hidden_size finetuning_task tokenizer_class task_specific_params unsloth_fixed "
    "unsloth_version torchscript prefix sep_token_id decoder_start_token_id".split()
)
_UNDERSTOOD = frozenset(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "tie_word_embeddings hidden_act max_window_layers sliding_window use_sliding_window layer_types".split()
)
_MIXTURE_FIELDS = frozenset(
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size norm_topk_prob router_aux_loss_coef "
    "output_router_logits".split()
)
_QWEN_DEFAULTS = {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096}
_MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32}
_FAMILIES: dict[str, Family] = {
    "llama": Family({"attention_bias": False, "mlp_bias": False, "use_sliding_window": False, "sliding_window": None}),
    "mistral": Family({"layer_types": None}, absent=_MISTRAL_DEFAULTS | {"sliding_window": 4096}),
    "qwen2": Family({"use_mrope": False}, qkv_bias=True, optional_window=True, absent=_QWEN_DEFAULTS),
    "qwen3": Family(
        {"attention_bias": False}, qk_norm=True, optional_window=True, absent=_QWEN_DEFAULTS | {"head_dim": 128}
    ),
    "mixtral": Family(
        {"router_jitter_noise": 0.0, "layer_types": None},
        _mixture("block_sparse_moe", ("w1", "w3", "w2")),
        mixture=True,
        absent=_MISTRAL_DEFAULTS
        | {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": Family(
        {"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "layer_types": None},
        _mixture("mlp", _LLAMA_NAMES),
        qk_norm=True,
        mixture=True,
        optional_window=True,
        absent=_QWEN_DEFAULTS | {"num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts_per_tok": 8},
    ),
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
    return parse_architecture(config, path)


def parse_architecture(config: dict[str, Any], path: str) -> Architecture:
    """The architecture that the content of a config.json describes; `path` is what messages call it.

    Raises ValueError as `read_architecture` does.
    """
    name = config.get("model_type")
    if name not in _FAMILIES:
        raise ValueError(f"{path}: model_type={name!r} is not supported: use one of {', '.join(_FAMILIES)}")
    family = _FAMILIES[name]
    _refuse_unknown(path, config, family)
    config = family.absent | config

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
    num_layers = number("num_hidden_layers")
    window, windowed = _sliding_window(path, config, family, num_layers)
    return Architecture(
        family=name,
        hidden_size=number("hidden_size"),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=number("head_dim", number("hidden_size") // heads),
        ffn_hidden_size=number("moe_intermediate_size" if "moe_intermediate_size" in config else "intermediate_size"),
        vocabulary_size=number("vocab_size"),
        max_positions=number("max_position_embeddings", 2048),
        norm_epsilon=number("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_scaling=scaling,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        sliding_window=window,
        windowed_layers=windowed,
        **_mixture_of_experts(path, config, family),
    )


def _mixture_of_experts(path: str, config: dict, family: Family) -> dict[str, Any]:
    """The fields of an `Architecture` that speak of experts."""
    if not family.mixture:
        return {}
    experts = config.get("num_local_experts") or config.get("num_experts")
    chosen = config.get("num_experts_per_tok")
    if not experts or not chosen or chosen > experts:
        raise ValueError(
            f"{path}: num_experts_per_tok={chosen} of num_experts={experts} is not possible: name both, and take no more "
            "than there are"
        )
    # Mixtral always renormalises; Qwen3-MoE where the field says so.
    renormalizes = bool(config.get("norm_topk_prob", False)) if config["model_type"] == "qwen3_moe" else True
    return {"num_experts": experts, "experts_per_token": chosen, "router_renormalizes": renormalizes}


def _sliding_window(path: str, config: dict, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers where it holds, as transformers 5 reads them (`configuration_qwen2.py`)."""
    window = config.get("sliding_window")
    if family.optional_window and not config.get("use_sliding_window"):
        window = None
    kinds = config.get("layer_types")
    if kinds is None and family.optional_window and not family.mixture:
        first = config.get("max_window_layers", 28)
        kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]
    if kinds is None:
        kinds = ["sliding_attention"] * num_layers
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{path}: layer_types={kinds!r} is not supported: one of full_attention and sliding_attention for each of "
            f"num_hidden_layers={num_layers} is"
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if window is not None and any(windowed) else (None, ())


def _refuse_unknown(path: str, config: dict, family: Family) -> None:
    understood = _UNDERSTOOD | (_MIXTURE_FIELDS if family.mixture else frozenset())
    for name, value in config.items():
        if name in family.fixed:
            if value not in (None, family.fixed[name]):
                raise ValueError(f"{path}: {name}={value!r} is not supported: only {family.fixed[name]!r} is")
        elif name in _HARMLESS or name in understood or value in (None, False, 0, 0.0, [], {}, ""):
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
