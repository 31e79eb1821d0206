"""What a family declares, and the families there are, by the `model_type` of their config.json."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megatron_sstoken.model.families.architecture import Architecture, LayerNorms
from megatron_sstoken.model.families.weight_map import WeightRule, decoder_rules

Config = dict[str, Any]
"""The content of a config.json, with the family's own meaning of absent fields."""


def whole(config: Config, name: str, least: int = 1) -> int:
    """The whole number that a field holds. Raises ValueError for anything else."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not possible: only a whole number from {least} on is")
    return value


def listed_kinds(config: Config, num_layers: int) -> list[str]:
    """The attention of each layer as `layer_types` lists it; in all layers the window (if there is one) without a list."""
    kinds = config.get("layer_types")
    return ["sliding_attention"] * num_layers if kinds is None else kinds


def windows_but_every(interval: int) -> Callable[[Config, int], list[str]]:
    """Layers as `layer_types` lists them; without it every `interval`-th has no window (or as `sliding_window_pattern` says).

    For families with layers of both kinds, where RoPE may go by the kind: without a window they are refused.
    """

    def kinds(config: Config, num_layers: int) -> list[str]:
        if config.get("sliding_window") is None:
            raise ValueError(
                "sliding_window=None is not supported: a number is, for this family has layers with a window and others"
            )
        if (listed := config.get("layer_types")) is not None:
            return listed
        every = config.get("sliding_window_pattern", interval)
        return ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(num_layers)]

    return kinds


def nothing_added(config: Config) -> dict[str, Any]:
    """The options of a family that adds none."""
    return {}


@dataclass(frozen=True)
class Experts:
    """The fields of config.json that speak of a mixture of experts."""

    feed_forward: str
    """Field with the size of an expert."""
    renormalizes: str | None = None
    """Field that says whether the weights of a token's experts are made to sum to 1, false if absent; None: always."""
    count: tuple[str, ...] = ("num_local_experts", "num_experts")
    """Fields with the number of experts; the first that is there counts."""
    chosen: str = "num_experts_per_tok"
    """Field with the number of experts that a token is sent to."""
    understood: frozenset[str] = frozenset({"norm_topk_prob", "router_aux_loss_coef", "output_router_logits"})
    """More fields that may be set: they change nothing, or are read above."""

    @property
    def fields(self) -> frozenset[str]:
        """All of these."""
        return self.understood | {self.feed_forward, self.chosen, *self.count}


ATTENTION_BIAS = {"attention_bias": frozenset({"qkv_bias", "output_bias"})}
MLP_BIAS = {"mlp_bias": frozenset({"mlp_bias"})}
"""The usual fields that switch biases on."""


@dataclass(frozen=True)
class Family:
    """What a `model_type` of Hugging Face means: everything that is particular to it.

    The hooks raise ValueError, without the file's name, for what is not supported.
    """

    model_type: str
    tiny: Config
    """Fields of a miniature that exercises what is particular, beside those of its size: the tests make a model of it."""
    fixed: Config = field(default_factory=dict)
    """Fields that must have one value (when present)."""
    understood: frozenset[str] = frozenset()
    """Fields that a hook reads, beside those that all families have."""
    absent: Config = field(default_factory=dict)
    """What fields mean where they are absent: transformers' defaults, where they are not Llama's."""
    qkv_bias: bool = False
    """Whether q, k and v have biases whatever the config says."""
    biases: dict[str, frozenset[str]] = field(default_factory=dict)
    """Field of the config → which biases of an `Architecture` it switches on (`qkv_bias`, `output_bias`, `mlp_bias`)."""
    partial_rotary: bool = False
    """Whether `partial_rotary_factor` is heeded; elsewhere transformers' model turns whole heads."""
    qk_norm: bool = False
    norms: LayerNorms = LayerNorms()
    experts: Experts | None = None
    optional_window: bool = False
    """Whether `use_sliding_window` switches the window on."""
    one_kind_of_layer: bool = False
    """Whether transformers' model does without `layer_types`: a window holds in all layers."""
    layer_kinds: Callable[[Config, int], list[str]] = listed_kinds
    """Config and number of layers → for each layer `full_attention` or its other kind: `sliding_attention`, where there is a
    window, or what `other_kind` says."""
    other_kind: str = "sliding_attention"
    """`linear_attention` in families with delta nets."""
    transformer_options: Callable[[Config], dict[str, Any]] = nothing_added
    """What the family adds to megatron's TransformerConfig: numbers, strings, and lists of them."""
    full_rope: Callable[[Config], Config] = lambda config: config
    """The config with RoPE of layers without a window in the fields where other families have it."""
    further: Callable[[Config], dict[str, Any]] = nothing_added
    """Fields of the `Architecture` that only families of this kind have, or set by the config."""
    weight_rules: Callable[[Architecture], list[WeightRule]] = decoder_rules

    @property
    def own_fields(self) -> frozenset[str]:
        """Fields that are understood here and not in every family."""
        return self.understood | self.biases.keys() | (self.experts.fields if self.experts else frozenset())


_FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known, and return it. Raises ValueError if its `model_type` is taken."""
    if family.model_type in _FAMILIES:
        raise ValueError(f"the model family {family.model_type!r} is registered twice: remove one")
    _FAMILIES[family.model_type] = family
    return family


def family_of(model_type: str) -> Family:
    """The family of a `model_type`. Raises KeyError for one that is not known."""
    return _FAMILIES[model_type]


def family_names() -> tuple[str, ...]:
    """The `model_type` of every family, in alphabetical order."""
    return tuple(sorted(_FAMILIES))
