"""What a config.json means: fields every family has, those of its own, and an error for every other that says something."""

import json
import os
from collections.abc import Hashable
from typing import Any

from megatron_sstoken.folders import model_folder_problem
from megatron_sstoken.model.families.architecture import Architecture
from megatron_sstoken.model.families.registry import Config, Family, family_names, family_of
from megatron_sstoken.model.families.rope import read_rope

# Fields that say nothing about what the model computes, or only about how it is run or made.
_HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "initializer_range _name_or_path _model_name_or_path name_or_path pretraining_tp attention_dropout hidden_dropout "
    "return_dict output_attentions output_hidden_states is_decoder id2label label2id "
    "problem_type chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder add_cross_attention "
    "cross_attention_hidden_size finetuning_task tokenizer_class task_specific_params unsloth_fixed "
    "unsloth_version torchscript prefix sep_token_id decoder_start_token_id".split()
)
_UNDERSTOOD = frozenset(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "tie_word_embeddings hidden_act max_window_layers sliding_window use_sliding_window layer_types".split()
)


def read_architecture(hf_path: str) -> Architecture:
    """The architecture that `hf_path`/config.json describes.

    Raises ValueError for a missing or unreadable file, an unsupported family, and every field that would change the
    model's output and is not supported, each by name.
    """
    path = os.path.join(hf_path, "config.json")
    if problem := model_folder_problem(hf_path):
        raise ValueError(problem)
    with open(path, encoding="utf-8") as file:
        try:
            config = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a JSON object: it is damaged")
    return parse_architecture(config, path)


def parse_architecture(config: Config, path: str) -> Architecture:
    """The architecture that the content of a config.json describes; `path` is what messages call it.

    Raises ValueError as `read_architecture` does.
    """
    name = config.get("model_type")
    if name not in family_names():
        raise ValueError(f"{path}: model_type={name!r} is not supported: use one of {', '.join(family_names())}")
    family = family_of(name)
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
    base, scaling = read_rope(path, config)
    num_layers = number("num_hidden_layers")
    window, windowed = _sliding_window(path, config, family, num_layers)
    return Architecture(
        family=name,
        hidden_size=number("hidden_size"),
        num_layers=num_layers,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=number("head_dim", number("hidden_size") // heads),
        ffn_hidden_size=number(family.experts.feed_forward if family.experts else "intermediate_size"),
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
        transformer_options=_transformer_options(path, config, family),
        **_mixture_of_experts(path, config, family),
    )


def _mixture_of_experts(path: str, config: Config, family: Family) -> dict[str, Any]:
    """The fields of an `Architecture` that speak of experts."""
    fields = family.experts
    if fields is None:
        return {}
    experts = next((config[name] for name in fields.count if config.get(name)), None)
    chosen = config.get(fields.chosen)
    if not experts or not chosen or chosen > experts:
        raise ValueError(
            f"{path}: {fields.chosen}={chosen} of num_experts={experts} is not possible: name both, and take no more "
            "than there are"
        )
    renormalizes = fields.renormalizes is None or bool(config.get(fields.renormalizes, False))
    return {"num_experts": experts, "experts_per_token": chosen, "router_renormalizes": renormalizes}


def _transformer_options(path: str, config: Config, family: Family) -> tuple[tuple[str, Hashable], ...]:
    """The family's additions to megatron's TransformerConfig, as an `Architecture` holds them."""
    try:
        options = family.transformer_options(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items())


def _sliding_window(path: str, config: Config, family: Family, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers where it holds."""
    window = config.get("sliding_window")
    if family.optional_window and not config.get("use_sliding_window"):
        window = None
    try:
        kinds = family.layer_kinds(config, num_layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(kinds) != num_layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(
            f"{path}: layer_types={kinds!r} is not supported: one of full_attention and sliding_attention for each of "
            f"num_hidden_layers={num_layers} is"
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if window is not None and any(windowed) else (None, ())


def _refuse_unknown(path: str, config: Config, family: Family) -> None:
    understood = _UNDERSTOOD | family.own_fields
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
