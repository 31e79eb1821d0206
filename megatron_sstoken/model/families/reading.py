"""What a config.json means: fields every family has, those of its own, and an error for every other that says something."""

import json
import os
from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from megatron_sstoken.folders import model_folder_problem
from megatron_sstoken.model.families.architecture import Architecture
from megatron_sstoken.model.families.registry import Config, Family, family_names, family_of
from megatron_sstoken.model.families.rope import read_rope, rope_parameters
from megatron_sstoken.model.quantised import FIELD, quantisation_of, quantised_remedy

# Fields that transformers' models of these families do not read, or only for how they are run or made.
_HARMLESS = frozenset(
    "architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id "
    "initializer_range name_or_path pretraining_tp attention_dropout hidden_dropout "
    "return_dict output_attentions output_hidden_states is_decoder id2label label2id "
    "problem_type chunk_size_feed_forward is_encoder_decoder tie_encoder_decoder add_cross_attention "
    "cross_attention_hidden_size finetuning_task tokenizer_class task_specific_params torchscript prefix sep_token_id "
    "decoder_start_token_id use_bfloat16 is_causal tie_weights_keys attn_implementation experts_implementation "
    "use_flash_attn use_flash_attention n_ctx max_sequence_length model_max_length is_llama_config transformers.js_config "
    "neftune_noise_alpha".split()
)
_GENERATION = frozenset(
    "max_length max_new_tokens min_length min_new_tokens do_sample num_beams num_beam_groups num_return_sequences "
    "temperature top_k top_p min_p typical_p epsilon_cutoff eta_cutoff diversity_penalty length_penalty "
    "repetition_penalty encoder_no_repeat_ngram_size no_repeat_ngram_size early_stopping renormalize_logits "
    "bad_words_ids suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id "
    "remove_invalid_values exponential_decay_length_penalty return_dict_in_generate output_scores".split()
)
"""How text is generated, which old versions of transformers kept in config.json."""
_OF_TOOLS = ("_", "unsloth_")
"""How the names of fields begin that a library writes for itself."""
_ONE_OF: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "activation": ("swiglu", "silu"),  # of Falcon3; hidden_act decides
}
"""Fields of all families → the values that are computed."""
_UNDERSTOOD = frozenset(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings rms_norm_eps rope_theta rope_scaling rope_parameters partial_rotary_factor "
    "original_max_position_embeddings tie_word_embeddings max_window_layers sliding_window use_sliding_window "
    "layer_types".split()
)

_LACKING = {
    "gemma2": "it caps attention scores by tanh",
    "kimi_k2": "transformers knows such models as deepseek_v3 alone, and config.json may call them so",
    "qwen3_5": "it reads images, too: qwen3_5_text, its text model alone, is (docs/models.md shows how to write that)",
    "qwen3_5_moe": "it reads images, too: qwen3_5_moe_text, its text model alone, is (docs/models.md shows how to write that)",
    "granitemoe": "its experts come in fused tensors of all experts",
}
"""Models that people have → what they need and is not computed."""


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
        lacking = f", for {_LACKING[name]}" if name in _LACKING else ""
        if isinstance(config.get("text_config"), dict):
            folder = os.path.dirname(path) or "."
            raise ValueError(
                f"{path}: model_type={name!r} describes more than a model of text: make a folder of its text model with "
                f"`python tools/convert_checkpoint.py take-text --hf {folder} --output FOLDER`, and use that"
            )
        raise ValueError(
            f"{path}: model_type={name!r} is not supported{lacking}: use one of {', '.join(family_names())}"
        )
    family = family_of(name)
    _refuse_unknown(path, config, family)
    config = family.absent | config

    def number(name: str, default: Any = None) -> Any:
        value = config.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{path}: {name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{path}: {name}={value!r} is not possible: only a number above 0 is")
        return value

    heads = number("num_attention_heads")
    groups = number("num_key_value_heads", heads)
    if heads % groups:
        raise ValueError(f"{path}: num_key_value_heads={groups} does not divide num_attention_heads={heads}")
    try:
        rope_config = family.full_rope(config)
        base, scaling = read_rope(path, rope_config)
        further = family.further(config)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(path) else f"{path}: {error}") from error
    num_layers = number("num_hidden_layers")
    kinds = _layer_kinds(path, config, family, num_layers)
    window, windowed = _sliding_window(path, config, family, kinds)
    delta_layers = tuple(kind == "linear_attention" for kind in kinds)
    architecture = Architecture(
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
        rotary_fraction=_rotary_fraction(path, rope_config, family),
        **_biases(config, family),
        qk_norm=family.qk_norm,
        norms=family.norms,
        sliding_window=window,
        windowed_layers=windowed,
        delta_layers=delta_layers if any(delta_layers) else (),
        transformer_options=_transformer_options(path, config, family),
        **_mixture_of_experts(path, config, family),
    )
    architecture = replace(architecture, **further)
    _check_rope(path, architecture)
    return architecture


def _biases(config: Config, family: Family) -> dict[str, Any]:
    """The fields of an `Architecture` that speak of biases."""
    switched = {name for field, names in family.biases.items() if config.get(field) for name in names}
    return dict.fromkeys(switched | ({"qkv_bias"} if family.qkv_bias else set()), True)


def _rotary_fraction(path: str, config: Config, family: Family) -> float:
    """The part of each head that RoPE turns."""
    fraction = rope_parameters(path, config).get("partial_rotary_factor", 1.0)
    if fraction != 1.0 and not family.partial_rotary:
        raise ValueError(
            f"{path}: partial_rotary_factor={fraction!r} is not supported: transformers' {family.model_type} does not heed "
            "it, and other programs do: set 1.0 if whole heads are turned"
        )
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(
            f"{path}: partial_rotary_factor={fraction!r} is not possible: only a number above 0, up to 1, is"
        )
    return float(fraction)


def _check_rope(path: str, a: Architecture) -> None:
    """Raises ValueError where RoPE's numbers do not fit the heads."""
    if a.rotary_dim % 2:
        raise ValueError(f"{path}: RoPE turns {a.rotary_dim} numbers of each head: only an even number is possible")
    if a.rope_scaling is not None and a.rope_scaling.kind == "longrope":
        found = len(a.rope_scaling.short_factors)
        if found != a.rotary_dim // 2:
            raise ValueError(
                f"{path}: short_factor has {found} numbers: one for each of {a.rotary_dim // 2} frequencies is"
            )


def _mixture_of_experts(path: str, config: Config, family: Family) -> dict[str, Any]:
    """The fields of an `Architecture` that speak of experts."""
    fields = family.experts
    if fields is None:
        return {}
    experts = next((config[name] for name in fields.count if config.get(name)), None)
    chosen = config.get(fields.chosen)
    renormalizes = fields.renormalizes is None or bool(config.get(fields.renormalizes, False))
    if chosen == 1 and renormalizes:
        # The one weight is always 1: the router would not be trained, and megatron refuses to compute it.
        raise ValueError(
            f"{path}: {fields.chosen}=1 is not supported where the weights of a token's experts are made to sum to 1: use 2 "
            "or more"
        )
    if not experts or not chosen or chosen > experts:
        raise ValueError(
            f"{path}: {fields.chosen}={chosen} of num_experts={experts} is not possible: name both, and take no more "
            "than there are"
        )
    return {"num_experts": experts, "experts_per_token": chosen, "router_renormalizes": renormalizes}


def _transformer_options(path: str, config: Config, family: Family) -> tuple[tuple[str, Hashable], ...]:
    """The family's additions to megatron's TransformerConfig, as an `Architecture` holds them."""
    try:
        options = family.transformer_options(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return tuple((name, tuple(value) if isinstance(value, list) else value) for name, value in options.items())


def _layer_kinds(path: str, config: Config, family: Family, num_layers: int) -> list[str]:
    """What each layer has: full attention, or the family's other kind."""
    try:
        kinds = family.layer_kinds(config, num_layers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(kinds) != num_layers or set(kinds) - {"full_attention", family.other_kind}:
        raise ValueError(
            f"{path}: layer_types={kinds!r} is not supported: one of full_attention and {family.other_kind} for each of "
            f"num_hidden_layers={num_layers} is"
        )
    return kinds


def _sliding_window(path: str, config: Config, family: Family, kinds: list[str]) -> tuple[int | None, tuple[bool, ...]]:
    """The window and the layers where it holds."""
    window = config.get("sliding_window")
    if family.optional_window and not config.get("use_sliding_window"):
        window = None
    everywhere = "full_attention" if window is None else "sliding_attention"
    if family.one_kind_of_layer and config.get("layer_types") is not None and set(kinds) != {everywhere}:
        raise ValueError(
            f"{path}: layer_types={kinds!r} is not supported: transformers' {family.model_type} does not heed it, and with "
            f"sliding_window={window} computes {everywhere} in all layers"
        )
    windowed = tuple(kind == "sliding_attention" for kind in kinds)
    return (window, windowed) if window is not None and any(windowed) else (None, ())


def _refuse_unknown(path: str, config: Config, family: Family) -> None:
    """Raises ValueError that names every field with a value that would change the output and is not computed."""
    understood = _UNDERSTOOD | family.own_fields
    problems, unknown = [], []
    for name, value in config.items():
        if name in family.fixed:
            if value not in (None, family.fixed[name]):
                problems.append(f"{name}={_shown(value)} is not supported: only {family.fixed[name]!r} is")
        elif name in _ONE_OF:
            if value is not None and value not in _ONE_OF[name]:
                problems.append(f"{name}={_shown(value)} is not supported: only {_ONE_OF[name][0]} is")
        elif name == FIELD and value:
            problems.append(_quantised(path, config))
        elif name in _HARMLESS | _GENERATION | understood or name.startswith(_OF_TOOLS):
            continue
        elif value not in (None, False, 0, 0.0, [], {}, ""):
            unknown.append(f"{name}={_shown(value)}")
    if len(unknown) == 1:
        problems.append(
            f"the field {unknown[0]} is not known and might change what the model computes: remove it if it does not, or "
            "ask for its support"
        )
    elif unknown:
        problems.append(
            f"the fields {', '.join(unknown)} are not known and might change what the model computes: remove those that do "
            "not, or ask for their support"
        )
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}")


def _shown(value: Any) -> str:
    """A value as messages show it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _quantised(path: str, config: Config) -> str:
    """Why quantised weights are refused, and what to do."""
    method = quantisation_of(config).get("quant_method", "unknown")
    return f"{FIELD}: weights quantised by {method!r} are not read: {quantised_remedy(os.path.dirname(path), config)}"
